"""Logits equal transformers' on random small models: same rows, same ids, our own loader."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from utils import VOCAB_SIZE, random_rows, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl

from vtts_rt.models.attention import PagedKV, plan_calls
from vtts_rt.models.base import ForwardBatch, VideoLM, VisionRows
from vtts_rt.models.registry import load_model


@dataclass
class Vision:
    """One vision item of a test prompt."""

    grid: tuple[int, int, int]
    seconds_per_grid: float = 1.0
    is_image: bool = False


# Grids in patches; windows are 8 x 8 patches, so 10 x 6, 12 x 4 and 6 x 18 leave odd windows.
PROMPTS: dict[str, list[int | Vision]] = {
    "window-unfriendly video": [7, Vision((3, 10, 6), 0.7), 9],
    "two videos": [3, Vision((2, 8, 8), 1.5), 4, Vision((4, 12, 4), 0.25), 6],
    "image and video": [2, Vision((1, 6, 18), is_image=True), 5, Vision((5, 4, 6), 2.0), 3],
    "long time span": [4, Vision((9, 4, 4), 3.0), 8],
    "text": [24],
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped, tied": {"heads": 4, "kv_heads": 2},
    "one kv head, untied": {"heads": 4, "kv_heads": 1, "tie_word_embeddings": False, "seed": 1},
    "ungrouped, head_dim 8": {"heads": 6, "kv_heads": 6, "head_dim": 8, "seed": 2},
    "small windows, 4 tokens a second": {
        "heads": 8,
        "kv_heads": 4,
        "window_size": 56,
        "full_blocks": (2,),
        "tokens_per_second": 4,
        "tie_word_embeddings": False,
        "seed": 3,
    },
}
QWEN2_VL: dict[str, dict[str, Any]] = {
    "grouped, tied": {"heads": 4, "kv_heads": 2},
    "one kv head, untied": {"heads": 4, "kv_heads": 1, "tie_word_embeddings": False, "seed": 1},
    "ungrouped, head_dim 8": {"heads": 6, "kv_heads": 6, "head_dim": 8, "seed": 2},
    "one wide block, untied": {
        "heads": 8,
        "kv_heads": 4,
        "tie_word_embeddings": False,
        "vision_depth": 1,
        "mlp_ratio": 4,
        "seed": 3,
    },
    "three vision heads": {"heads": 2, "kv_heads": 1, "vision_heads": 3, "layers": 1, "seed": 4},
    "seven heads over one": {"heads": 7, "kv_heads": 1, "mlp_ratio": 1, "layers": 2, "seed": 5},
}
QWEN3_VL: dict[str, dict[str, Any]] = {
    "grouped, tied": {"heads": 4, "kv_heads": 2},
    "one kv head, untied": {"heads": 4, "kv_heads": 1, "tie_word_embeddings": False, "seed": 1},
    "narrow, heads wider": {"heads": 4, "kv_heads": 2, "head_dim": 24, "hidden": 40, "seed": 2},
    "wide, one level": {
        "heads": 2,
        "kv_heads": 2,
        "hidden": 80,
        "levels": (1,),
        "tie_word_embeddings": False,
        "seed": 3,
    },
    "no levels": {"levels": (), "side": 9, "layers": 1, "seed": 4},
    "five layers, three levels": {
        "vision_depth": 4,
        "levels": (0, 2, 3),
        "layers": 5,
        "vision_heads": 3,
        "seed": 5,
    },
}
FAMILIES = [
    *(pytest.param((tiny_qwen2_5_vl, options), id=name) for name, options in MODELS.items()),
    *(pytest.param((tiny_qwen2_vl, options), id=f"2, {n}") for n, options in QWEN2_VL.items()),
    *(pytest.param((tiny_qwen3_vl, options), id=f"3, {n}") for n, options in QWEN3_VL.items()),
]


@dataclass
class Inputs:
    token_ids: Tensor
    rows: Tensor
    items: list[Vision]
    positions: Tensor


def make_inputs(model: VideoLM, parts: list[int | Vision]) -> Inputs:
    """Random text with pads, random rows for each item in prompt order, transformers' positions.
    Where the family writes a video pair by pair, text stands before each pair."""
    config, positions = model.config, model.positions("transformers")
    ids, places, items = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(torch.randint(0, 300, (part,)))
            places.append(positions.text(part))
        else:
            t, h, w = part.grid
            pad = config.image_token_id if part.is_image else config.video_token_id
            pairs = t if model.chat.per_pair else 1
            for _ in range(pairs):
                if pairs > 1:
                    ids.append(torch.randint(0, 300, (2,)))
                    places.append(positions.text(2))
                grid = (t // pairs, h, w)
                ids.append(torch.full((grid[0] * h * w // 4,), pad))
                places.append(positions.vision(grid, part.seconds_per_grid, part.is_image))
            items.append(part)
    rows = random_rows([item.grid for item in items], model.geometry)
    return Inputs(torch.cat(ids), rows, items, torch.cat(places, dim=1))


def hf_logits(model: Any, inputs: Inputs) -> Tensor:
    config = model.config
    ids = inputs.token_ids[None]
    chunks = inputs.rows.split([t * h * w for t, h, w in (item.grid for item in inputs.items)])

    def select(is_image: bool) -> tuple[Tensor | None, Tensor | None]:
        both = zip(chunks, inputs.items, strict=True)
        chosen = [(chunk, item) for chunk, item in both if item.is_image == is_image]
        if not chosen:
            return None, None
        return torch.cat([c for c, _ in chosen]), torch.tensor([i.grid for _, i in chosen])

    pixel_values, image_grid_thw = select(True)
    pixel_values_videos, video_grid_thw = select(False)
    kinds = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    timed = hasattr(config.vision_config, "tokens_per_second")
    seconds = [item.seconds_per_grid for item in inputs.items if timed and not item.is_image]
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=torch.tensor(seconds) if seconds else None,
            mm_token_type_ids=kinds.int(),
        )
    return out.logits[0]


def shown(model: VideoLM, inputs: Inputs) -> VisionRows:
    features = model.visual(inputs.rows, [item.grid for item in inputs.items])
    return model.vision_rows(inputs.token_ids, features)


def our_logits(model: VideoLM, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        ids, vision = inputs.token_ids, shown(model, inputs)
        return model.logits(model(ForwardBatch(ids, vision, inputs.positions, [0, len(ids)])))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any, tmp_path_factory: Any) -> tuple[Any, VideoLM]:
    family, options = request.param
    theirs = family(**options)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_transformers(pair: tuple[Any, VideoLM], name: str) -> None:
    theirs, ours = pair
    inputs = make_inputs(ours, PROMPTS[name])
    expected = hf_logits(theirs, inputs)
    assert expected.shape == (len(inputs.token_ids), VOCAB_SIZE)
    assert expected.std() > 0.1  # else the tolerance would mean nothing
    torch.testing.assert_close(our_logits(ours, inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_qwen3_vl_equals_transformers(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    heads, depth, layers = (dice.randint(1, 6) for _ in range(3))
    levels = dice.sample(range(depth), dice.randint(0, min(depth, layers - 1)))
    theirs = tiny_qwen3_vl(
        heads=heads,
        kv_heads=dice.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=dice.choice([8, 16, 24]),
        hidden=dice.choice([0, 40, 72]),
        layers=layers,
        vision_depth=depth,
        vision_heads=dice.randint(1, 3),
        levels=tuple(sorted(levels)),
        side=dice.randint(2, 12),
        tie_word_embeddings=dice.random() < 0.5,
        seed=seed,
    )
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    parts: list[int | Vision] = []
    for _ in range(dice.randint(1, 4)):
        sides, is_image = [2 * dice.randint(1, 8) for _ in range(2)], dice.random() < 0.4
        t = 1 if is_image else dice.randint(1, 4)
        parts += [dice.randint(1, 9), Vision((t, *sides), is_image=is_image)]  # type: ignore[arg-type]
    inputs = make_inputs(ours, [*parts, dice.randint(1, 9)])
    expected = hf_logits(theirs, inputs)
    torch.testing.assert_close(our_logits(ours, inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunks", [[11, 1, 30, 1, 7], [1] * 9 + [41], [50]])
@pytest.mark.parametrize("pages", ["in order", "shuffled"])
def test_paged_prefill_in_chunks_and_decode_equal_one_pass(
    pair: tuple[Any, VideoLM], chunks: list[int], pages: str
) -> None:
    theirs, ours = pair
    inputs = make_inputs(ours, [7, Vision((3, 10, 6), 0.7)])
    total, page_size = len(inputs.token_ids), 4
    chunks = [*chunks, total - sum(chunks)]
    shape = (ours.kv.num_layers, 2, 20, page_size, ours.kv.num_heads, ours.kv.head_dim)
    pool = torch.full(shape, float("nan"))  # unwritten slots must not be read
    table = torch.arange(2, 20) if pages == "in order" else torch.randperm(20)
    rows, features = shown(ours, inputs)
    logits = []
    start = 0
    for size in chunks:
        end = start + size
        index = torch.arange(start, end)
        slots = table[index // page_size] * page_size + index % page_size
        inside = (rows >= start) & (rows < end)
        batch = ForwardBatch(
            inputs.token_ids[start:end],
            VisionRows(rows[inside] - start, features[inside]),
            inputs.positions[:, start:end],
            torch.tensor([0, size]),
            PagedKV(pool, slots, plan_calls([table.tolist()], [size], [end], page_size)),
        )
        logits.append(ours.logits(ours(batch)))
        start = end
    expected = hf_logits(theirs, inputs)
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [tiny_qwen2_5_vl, tiny_qwen3_vl])
def test_bf16_error_is_at_most_twice_that_of_transformers(family: Any, tmp_path: Path) -> None:
    exact = family(seed=5, dtype=torch.bfloat16)
    exact.save_pretrained(tmp_path)
    ours = load_model(tmp_path, "bfloat16")
    inputs = make_inputs(ours, PROMPTS["two videos"])
    low = hf_logits(exact, inputs).float()
    expected = hf_logits(exact.float(), inputs)
    theirs_error = (low - expected).abs()
    error = (our_logits(ours, inputs).float() - expected).abs()
    assert theirs_error.max() > 0
    assert error.max() <= 2 * theirs_error.max()
    assert error.mean() <= 2 * theirs_error.mean()
