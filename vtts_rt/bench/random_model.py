"""The real shapes of Qwen2.5-VL, with random weights built where they will be used."""

from __future__ import annotations

import torch

from vtts_rt.bench.model import CONFIG
from vtts_rt.config import LanguageConfig, ModelConfig, VisionConfig
from vtts_rt.models.qwen2_5_vl import INIT_STD, Qwen2_5_VL


def _config(vision: VisionConfig, language: LanguageConfig) -> ModelConfig:
    """Token ids are those of Qwen2.5-VL's tokenizer."""
    return ModelConfig(
        vision,
        language,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        eos_token_ids=(151645, 151643),
    )


def _vision(out_hidden_size: int) -> VisionConfig:
    """The tower that 3B and 7B share."""
    return VisionConfig(32, 1280, 16, 3420, out_hidden_size, 112, (7, 15, 23, 31))


def _small() -> ModelConfig:
    """The 118 M bench model."""
    text, vision = CONFIG["text_config"], CONFIG["vision_config"]
    rope = text["rope_parameters"]
    plain = {name: value for name, value in text.items() if name != "rope_parameters"}
    section = tuple(rope["mrope_section"])
    blocks = tuple(vision["fullatt_block_indexes"])
    return _config(
        VisionConfig(**{**vision, "fullatt_block_indexes": blocks}),
        LanguageConfig(**plain, rope_theta=rope["rope_theta"], mrope_section=section),
    )


# 3b, 7b: config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
SHAPES = {
    "118m": _small(),
    "3b": _config(
        _vision(2048),
        LanguageConfig(
            *(151936, 2048, 11008, 36, 16, 2, 1e6, (16, 24, 24)), tie_word_embeddings=True
        ),
    ),
    "7b": _config(_vision(3584), LanguageConfig(152064, 3584, 18944, 28, 28, 4, 1e6, (16, 24, 24))),
}


@torch.inference_mode()
def random_model(config: ModelConfig, device: str, dtype: torch.dtype) -> Qwen2_5_VL:
    """Matrices normal with standard deviation 0.02, biases 0, norms 1; equal for equal devices."""
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim == 2:
            tensor.normal_(std=INIT_STD, generator=generator)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def bytes_per_step(model: Qwen2_5_VL) -> int:
    """Weights that every decoding step reads: the language tower and the head, of the embedding a
    row for each token only, unless it is the head as well."""
    language = model.language
    total = sum(p.numel() * p.element_size() for p in language.parameters())
    table = language.embed_tokens.weight
    return total - (0 if language.lm_head is None else table.numel() * table.element_size())
