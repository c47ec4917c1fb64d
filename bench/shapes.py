"""Qwen2.5-VL at its released shapes with random weights, made on the device that they serve on.

Latency does not depend on what weights say, so nothing is downloaded. The same tensors become our
model and transformers'.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtts_rt.bench.model import (
    CONFIG,
    SEED,
    allow_broken_torchvision,
    byte_letters,
    qwen_tokenizer,
)
from vtts_rt.models.base import VideoLM
from vtts_rt.models.config import ModelConfig
from vtts_rt.models.qwen2_5_vl.chat import CHAT, SPECIAL_TOKENS
from vtts_rt.models.registry import INIT_STD, build_model, empty_model, read_model_config
from vtts_rt.models.tensor_files import StoredTensor
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.types import require

# config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct.
_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _released(hidden: int, tied: bool, vision: dict[str, Any], **text: int) -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": hidden,
            "rms_norm_eps": 1e-6,
            "rope_parameters": dict(_ROPE),
            "tie_word_embeddings": tied,
            **text,
        },
        "vision_config": {**vision, "out_hidden_size": hidden},
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "7b": _released(
        3584,
        False,
        _VISION,
        vocab_size=152064,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "3b": _released(
        2048,
        True,
        _VISION,
        vocab_size=151936,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    "118m": CONFIG,
    # For tests of the benches themselves.
    "1m": _released(
        64,
        True,
        {**_VISION, "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96}
        | {"fullatt_block_indexes": [1]},
        vocab_size=1024,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
}
SHAPES["1m"]["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]


def model_config(shape: str) -> ModelConfig:
    """Ours of a released shape; token ids are those of Qwen2.5-VL's tokenizer."""
    return _ours(hf_config(shape))


def hf_config(shape: str, **ids: int) -> Any:
    """transformers' of a shape of SHAPES; ids: of special tokens."""
    require("bench", "shape", shape, shape in SHAPES, f"one of {', '.join(SHAPES)}")
    allow_broken_torchvision()
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(**SHAPES[shape], **ids)


def _ours(hf_config: Any) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        hf_config.save_pretrained(folder)
        return read_model_config(Path(folder))


@torch.inference_mode()
def random_model(config: ModelConfig, device: str, dtype: torch.dtype) -> VideoLM:
    """Matrices normal with standard deviation 0.02, biases 0, norms 1; equal for equal devices."""
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(SEED)
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


def bytes_per_step(model: VideoLM) -> int:
    """Weights that every decoding step reads: the language tower and the head, of the embedding a
    row for each token only, unless it is the head as well."""
    language = model.language
    total = sum(p.numel() * p.element_size() for p in language.parameters())
    table = language.embed_tokens.weight
    return total - (0 if language.lm_head is None else table.numel() * table.element_size())


@dataclass(frozen=True, slots=True)
class Twins:
    """One set of random weights as our model and as transformers', with a tokenizer for each."""

    model: VideoLM
    tokenizer: Tokenizer
    hf_model: Any
    hf_tokenizer: Any


def make_twins(shape: str, dtype: torch.dtype, device: str) -> Twins:
    """shape: of SHAPES. 7B in bfloat16 takes 33 GB, half of it transformers' copy."""
    require("bench", "shape", shape, shape in SHAPES, f"one of {', '.join(SHAPES)}")
    hf_tokenizer = _tokenizer(SHAPES[shape]["text_config"]["vocab_size"])
    ids = {
        f"{name}_token_id": hf_tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = hf_config(shape, **ids)
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf_model = Qwen2_5_VLForConditionalGeneration._from_config(
                config, attn_implementation="sdpa", dtype=dtype
            ).eval()
    finally:
        torch.set_default_dtype(before)
    with tempfile.TemporaryDirectory() as folder:
        hf_tokenizer.save_pretrained(folder)
        generation = {"eos_token_id": hf_tokenizer.eos_token_id}
        (Path(folder) / "generation_config.json").write_text(json.dumps(generation))
        config.save_pretrained(folder)
        tokenizer = Tokenizer.from_pretrained(folder, CHAT)
    tensors = {name: StoredTensor.of(t) for name, t in hf_model.state_dict().items()}
    model = build_model(_ours(config), tensors, dtype, torch.device(device))
    return Twins(model.eval(), tokenizer, hf_model, hf_tokenizer)


def _tokenizer(vocab_size: int) -> Any:
    """Qwen's own where its ranks are installed and fit, else one token a byte, told apart by
    results: prompts are longer then, for all sides."""
    if importlib.util.find_spec("dashscope") is not None and vocab_size > 151_000:
        return qwen_tokenizer()
    from transformers import Qwen2Tokenizer

    vocab = {letter: index for index, letter in enumerate(byte_letters())}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token=SPECIAL_TOKENS[0])
    tokenizer.add_tokens(list(SPECIAL_TOKENS[1:]), special_tokens=True)
    tokenizer.eos_token = CHAT.end_of_turn
    return tokenizer
