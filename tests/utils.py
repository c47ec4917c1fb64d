"""Builders that tests share: small random models of transformers and their tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from vtts_rt import Ask, PerceptionConfig, SamplingParams
from vtts_rt.config import ResolvedPerception
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import SPECIAL_TOKENS
from vtts_rt.rounds.results import Answer
from vtts_rt.types import Geometry

_CORPUS = (
    "Which pattern is on the red card? Think first, then answer between tags.",
    "You are a helpful assistant. <12.0s> <3.5s> system user assistant",
    "naïve café, 東京 and Zürich: – “quotes” and \U0001f600 faces",
)
VOCAB_SIZE = 400


# transformers, Qwen3VLVideoProcessor; and values that no model has.
QWEN3_VL = Geometry(patch_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
UNEVEN = Geometry(patch_px=16, mean=(0.31, 0.07, 0.9), std=(0.7, 0.11, 1.3))


def resolved(**settings: Any) -> ResolvedPerception:
    """Perception of a Qwen2.5-VL: settings, and defaults where there are none."""
    return PerceptionConfig(**settings).resolve(GEOMETRY)


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
    vision_heads: int = 2,
    vision_depth: int = 4,
    full_blocks: tuple[int, ...] = (1, 3),
    window_size: int = 112,
    tokens_per_second: int = 2,
    **more: Any,
) -> Any:
    """transformers' Qwen2_5_VLForConditionalGeneration with large random weights."""
    vision = {
        "depth": vision_depth,
        "hidden_size": 32 * vision_heads,
        "num_heads": vision_heads,
        "intermediate_size": 72,
        "window_size": window_size,
        "fullatt_block_indexes": list(full_blocks),
        "tokens_per_second": tokens_per_second,
    }
    return _tiny("Qwen2_5_VL", vision, "out_hidden_size", **more)


def tiny_qwen2_vl(
    *, vision_heads: int = 2, vision_depth: int = 3, mlp_ratio: int = 2, **more: Any
) -> Any:
    """transformers' Qwen2VLForConditionalGeneration with large random weights."""
    vision = {
        "depth": vision_depth,
        "embed_dim": 32 * vision_heads,
        "num_heads": vision_heads,
        "mlp_ratio": mlp_ratio,
    }
    return _tiny("Qwen2VL", vision, "hidden_size", **more)


def tiny_qwen3_vl(
    *,
    vision_heads: int = 2,
    vision_depth: int = 3,
    levels: tuple[int, ...] = (0, 1),
    side: int = 5,
    **more: Any,
) -> Any:
    """transformers' Qwen3VLForConditionalGeneration with large random weights."""
    vision = {
        "depth": vision_depth,
        "hidden_size": 32 * vision_heads,
        "num_heads": vision_heads,
        "intermediate_size": 72,
        "num_position_embeddings": side * side,
        "deepstack_visual_indexes": list(levels),
    }
    return _tiny("Qwen3VL", vision, "out_hidden_size", **more)


def _tiny(
    name: str,
    vision: dict[str, Any],
    vision_out: str,
    *,
    hidden: int = 0,
    tie_word_embeddings: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model of transformers; vision_out: what its `vision_config` calls the width of features;
    hidden: where it is not heads * head_dim.

    Weights are drawn wider than usual (std 0.1) and norms and biases are not trivial, so that a
    tensor put in the wrong place shows.
    """
    torchvision_shim.install()
    import transformers

    vocab = tiny_tokenizer().get_vocab()
    hidden = hidden or heads * head_dim
    half = head_dim // 2
    config = getattr(transformers, f"{name}Config")(
        vision_config={vision_out: hidden, **vision},
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden + 8,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            **({"head_dim": head_dim} if name == "Qwen3VL" else {}),
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
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = key.endswith("weight") and ("norm" in key or "ln_q" in key)
            centre = 1.0 if norm else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return model.to(dtype)


def tiny_checkpoint(
    folder: Path, family: Callable[..., Any] = tiny_qwen2_5_vl, **variation: Any
) -> Path:
    """A checkpoint folder with `family(**variation)` and its tokenizer."""
    family(**variation).save_pretrained(folder)
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


def random_rows(grids: list[tuple[int, int, int]], geometry: Geometry = GEOMETRY) -> torch.Tensor:
    """Patch rows of random pixels for `grids`, about the range of normalised images."""
    return torch.randn(sum(t * h * w for t, h, w in grids), geometry.row_size)


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


def as_ask(video: Any, strategy: str = "append", **more: Any) -> Ask:
    """`request` as an Ask."""
    arguments = request(video, strategy, **more)
    return Ask(arguments.pop("video"), **arguments)


@contextmanager
def held(runtime: Any, event: str = "round_started") -> Iterator[None]:
    """Inside, the engine steps only while a request has not had its first `event` yet: no request
    ends, however slow the test is beside it."""
    driver, seen = runtime._driver, set()
    step, hand_over = driver._step, driver._hand_over

    def note(request_id: int, output: Any) -> None:
        if getattr(output, "type", "") == event:
            seen.add(request_id)
        hand_over(request_id, output)

    def step_if_needed() -> None:
        if driver._deliver.keys() <= seen:
            driver._serve_aborts()
            time.sleep(0.001)
        else:
            step()

    driver._step, driver._hand_over = step_if_needed, note
    try:
        yield
    finally:
        del driver._step, driver._hand_over  # those of the class


def tokens(answer: Answer) -> list[list[int]]:
    return [r.token_ids for r in answer.rounds]


def told(answer: Answer) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities, whose bits depend on nothing but the question and weights."""
    return [(r.token_ids, r.logprobs) for r in answer.rounds]


def choose_by(patch: pytest.MonkeyPatch, choose: Callable[..., tuple[int, float]]) -> None:
    """Let the engine's tokens and log-probabilities be what `choose(logits (V,), params, *, member,
    round_index, position)` says of each row. A script may end (IndexError) before the drafts do."""

    def chosen_of(*row: Any, **place: int) -> tuple[int, float]:
        try:
            return choose(*row, **place)
        except IndexError:
            return 0, 0.0

    def sample(
        logits: torch.Tensor, params: Any, *, members: Any, rounds: Any, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = zip(logits, params, members, rounds, map(int, positions), strict=True)
        chosen = [
            chosen_of(row, own, member=member, round_index=round_index, position=position)
            for row, own, member, round_index, position in places
        ]
        tokens, logprobs = zip(*chosen, strict=True)
        return torch.tensor(tokens), torch.tensor(logprobs)

    patch.setattr("vtts_rt.engine.runner.sample", sample)
