"""M-RoPE positions against transformers and against a slow reading of the release's rule."""

from __future__ import annotations

import random

import pytest
import torch
from utils import tiny_qwen2_5_vl, tiny_qwen2_vl

from vtts_rt.models.mrope import MropePositions

Item = int | tuple[str, tuple[int, int, int], float]


def random_items(rng: random.Random) -> list[Item]:
    """Alternating text runs and vision items; vision never first, as markers stand before it."""
    items: list[Item] = []
    for _ in range(rng.randint(1, 5)):
        items.append(rng.randint(1, 12))
        image = rng.random() < 0.3
        grid = (1 if image else rng.randint(1, 12), 2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
        seconds = rng.choice([1.0, 0.5, 1 / 3, 0.1, 2 / 29.97, rng.uniform(0.01, 9.0)])
        items.append(("image" if image else "video", grid, seconds))
    items.append(rng.randint(1, 12))
    return items


def ours(items: list[Item], builder: MropePositions) -> torch.Tensor:
    parts = []
    for item in items:
        if isinstance(item, int):
            parts.append(builder.text(item))
        else:
            kind, grid, seconds = item
            parts.append(builder.vision(grid, seconds, kind == "image"))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("tokens_per_second", [2, 4, None])
def test_transformers_equals_get_rope_index(tokens_per_second: int | None) -> None:
    if tokens_per_second is None:
        model = tiny_qwen2_vl(vision_depth=1, layers=1).model
    else:
        model = tiny_qwen2_5_vl(tokens_per_second=tokens_per_second, vision_depth=1, layers=1).model
    rng = random.Random(tokens_per_second or 0)
    for _ in range(150):
        items = random_items(rng)
        kinds: list[int] = []
        for item in items:
            if isinstance(item, int):
                kinds += [0] * item
            else:
                t, h, w = item[1]
                kinds += [1 if item[0] == "image" else 2] * (t * h * w // 4)
        vision = [item for item in items if not isinstance(item, int)]
        images = [grid for kind, grid, _ in vision if kind == "image"]
        videos = [grid for kind, grid, _ in vision if kind == "video"]
        seconds = [s for kind, _, s in vision if kind == "video"]
        expected, _ = model.get_rope_index(
            torch.zeros(1, len(kinds), dtype=torch.long),
            mm_token_type_ids=torch.tensor([kinds]),
            image_grid_thw=torch.tensor(images) if images else None,
            video_grid_thw=torch.tensor(videos) if videos else None,
            second_per_grid_ts=torch.tensor(seconds) if videos else None,
        )
        builder = MropePositions("transformers", tokens_per_second)
        assert torch.equal(ours(items, builder), expected[:, 0])
        assert builder.next_position == int(expected[:, 0, -1].max()) + 1


def test_release_goes_on_after_the_largest_position() -> None:
    rng = random.Random(0)
    for _ in range(100):
        items = random_items(rng)
        expected: list[tuple[int, int, int]] = []
        for item in items:
            start = 1 + max((max(place) for place in expected), default=-1)
            if isinstance(item, int):
                expected += [(start + i,) * 3 for i in range(item)]
                continue
            kind, (t, h, w), seconds = item
            for frame in range(t):
                # Half-exact products in float32, as the original computes them.
                step = torch.tensor(seconds, dtype=torch.float32) * 2
                time = frame if kind == "image" else int(torch.tensor(float(frame)) * step)
                expected += [
                    (start + time, start + y, start + x)
                    for y in range(h // 2)
                    for x in range(w // 2)
                ]
        builder = MropePositions("release", 2)
        assert ours(items, builder).T.tolist() == [list(place) for place in expected]
        assert builder.next_position == 1 + max(map(max, expected))


def test_rules_coincide_with_one_pair_a_segment() -> None:
    items: list[Item] = [3, ("video", (1, 6, 4), 2.0), 2, ("video", (1, 2, 8), 2.0), 1]
    assert torch.equal(
        ours(items, MropePositions("release", 2)), ours(items, MropePositions("transformers", 2))
    )


def test_text_and_generated_tokens_follow_the_larger_side_in_transformers() -> None:
    builder = MropePositions("transformers", 2)
    builder.text(4)
    assert builder.vision((10, 4, 6), 1.0)[0].max() == 4 + 18
    assert builder.next_position == 4 + 3


def test_copy_is_independent_and_continues() -> None:
    whole = MropePositions("release", 2)
    whole.text(5)
    kept = whole.copy()
    first = whole.text(3)
    assert kept.next_position == 5
    assert torch.equal(kept.text(3), first)


def test_unknown_parity_is_named() -> None:
    with pytest.raises(ValueError, match="parity must be one of .* got 'hf4'"):
        MropePositions("hf4", 2)  # type: ignore[arg-type]
