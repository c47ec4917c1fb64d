"""Builders that tests share: a small random Qwen2.5-VL of transformers and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from vtts_rt import PerceptionConfig, SamplingParams
from vtts_rt.models.qwen2_5_vl.chat import SPECIAL_TOKENS
from vtts_rt.rounds.results import Answer
from vtts_rt.types import PATCH_ROW

_CORPUS = (
    "Which pattern is on the red card? Think first, then answer between tags.",
    "You are a helpful assistant. <12.0s> <3.5s> system user assistant",
    "naïve café, 東京 and Zürich: – “quotes” and \U0001f600 faces",
)
VOCAB_SIZE = 400


def seeds(num_quick: int, num_all: int) -> list[Any]:
    """Parameters 0 .. num_all - 1, of which all but the first `num_quick` are slow."""
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(num_quick, num_all)]
    return [*range(num_quick), *slow]


def tiny_tokenizer() -> Any:
    """A fast transformers tokenizer: byte-level BPE over a few sentences, Qwen's specials."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    # Plain added tokens, as Qwen's own vocabulary has for tool calls.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]) + ["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def tiny_qwen2_5_vl(
    *,
    tie_word_embeddings: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 3,
    vision_heads: int = 2,
    vision_depth: int = 4,
    full_blocks: tuple[int, ...] = (1, 3),
    window_size: int = 112,
    tokens_per_second: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """transformers' Qwen2_5_VLForConditionalGeneration with large random weights.

    Weights are drawn wider than usual (std 0.1) and norms and biases are not trivial, so that a
    tensor put in the wrong place shows.
    """
    torchvision_shim.install()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vocab = tiny_tokenizer().get_vocab()
    hidden = heads * head_dim
    half = head_dim // 2
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision_depth,
            "hidden_size": 32 * vision_heads,
            "num_heads": vision_heads,
            "intermediate_size": 72,
            "out_hidden_size": hidden,
            "window_size": window_size,
            "fullatt_block_indexes": list(full_blocks),
            "tokens_per_second": tokens_per_second,
        },
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden + 8,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half - half // 4 - half // 3, half // 3],
            },
            "bos_token_id": None,
            "eos_token_id": vocab["<|im_end|>"],
        },
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or "ln_q" in name else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return model.to(dtype)


def tiny_checkpoint(folder: Path, **variation: Any) -> Path:
    """A checkpoint folder with `tiny_qwen2_5_vl(**variation)` and its tokenizer."""
    tiny_qwen2_5_vl(**variation).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def copy_config(
    source: Path, target: Path, change: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """`source`'s config.json in `target`, changed in place or by what `change` returns."""
    config = json.loads((source / "config.json").read_text())
    if change is not None:
        config = change(config) or config
    (target / "config.json").write_text(json.dumps(config))


def random_rows(grids: list[tuple[int, int, int]]) -> torch.Tensor:
    """Patch rows of random pixels for `grids`, about the range of normalised images."""
    return torch.randn(sum(t * h * w for t, h, w in grids), PATCH_ROW)


LOOK: dict[str, Any] = {"sample_fps": 1.0, "min_pixels": 3136, "total_pixels": 60_000}
CLUES: list[Any] = [[[2, 5]], {"spans": [[3, 4]], "boxes": [[0.25, 0.25, 0.75, 0.75]]}]


def request(video: Any, strategy: str = "append", **more: Any) -> dict[str, Any]:
    """Arguments of `ask`: three short rounds with forced clues."""
    return {
        "video": video,
        "question": "which?",
        "perception": PerceptionConfig(strategy=strategy, **LOOK),  # type: ignore[arg-type]
        "sampling": SamplingParams(max_tokens=6, ignore_eos=True),
        "assume_clues": CLUES,
        "options": ["red", "blue"],
    } | more


def tokens(answer: Answer) -> list[list[int]]:
    return [r.token_ids for r in answer.rounds]
