"""The vision tower: pairs do not see each other, windows of any shape, gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from triton_tools import run_triton
from utils import random_rows

from vtts_rt.models import qwen2_vl, qwen3_vl, vision
from vtts_rt.models.qwen2_5_vl import GEOMETRY, VisionConfig
from vtts_rt.models.qwen2_5_vl.vision import VisionTransformer
from vtts_rt.models.vision import group_pairs, window_classes
from vtts_rt.ops.dispatch import backends
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PixelBox

CONFIG = VisionConfig(
    depth=3,
    hidden_size=64,
    num_heads=2,
    intermediate_size=72,
    out_hidden_size=48,
    fullatt_block_indexes=(1,),
)
GRIDS = [(2, 10, 6), (1, 8, 8), (3, 16, 12), (1, 2, 2), (2, 8, 8), (1, 6, 20)]


@pytest.fixture(scope="module", params=["windows", "whole pairs", "levels"])
def tower(request: pytest.FixtureRequest) -> vision.VisionTransformer:
    torch.manual_seed(1)
    if request.param == "windows":
        return VisionTransformer(CONFIG, GEOMETRY)
    if request.param == "levels":
        config = qwen3_vl.VisionConfig(3, 64, 2, 72, 48, 25, (0, 2))
        return qwen3_vl.VisionTransformer(config, GEOMETRY)
    return qwen2_vl.VisionTransformer(qwen2_vl.VisionConfig(3, 64, 2, 128, 48), GEOMETRY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_has_the_same_bits_in_any_batch(
    tower: vision.VisionTransformer, dtype: torch.dtype
) -> None:
    if "cpu" not in backends("linear", "cpu"):
        pytest.skip("built without the native extension")
    tower, rows = copy.deepcopy(tower).to(dtype), random_rows(GRIDS)
    threads = torch.get_num_threads()
    with torch.no_grad():
        try:
            torch.set_num_threads(3)
            together = tower(rows, GRIDS)
        finally:
            torch.set_num_threads(threads)
        alone = []
        parts = rows.split([t * h * w for t, h, w in GRIDS])
        for (_, h, w), part in zip(GRIDS, parts, strict=True):
            alone += [tower(pair, [(1, h, w)]) for pair in part.split(h * w)]
    assert together.shape == (len(rows) // 4, tower.config.feature_dim)
    assert torch.equal(together, torch.cat(alone))


def test_full_attention_reaches_the_whole_pair_and_no_further(
    tower: vision.VisionTransformer,
) -> None:
    rows = random_rows([(2, 16, 12)])
    touched = rows.clone()
    touched[-1] += 1.0
    with torch.no_grad():
        change = (tower(touched, [(2, 16, 12)]) - tower(rows, [(2, 16, 12)])).abs().amax(1)
    assert torch.all(change[:48] == 0)
    assert torch.all(change[48:] > 0)


@pytest.mark.parametrize("grid", [(8, 8), (10, 6), (16, 12), (2, 2), (6, 20), (2, 34)])
def test_window_classes_hold_every_token_once(grid: tuple[int, int]) -> None:
    classes = window_classes(*grid, 4, 16, torch.device("cpu"))
    tokens = torch.cat([cls.tokens for cls in classes])
    assert sorted(tokens.tolist()) == list(range(grid[0] * grid[1] // 4))
    for cls in classes:
        for window in cls.tokens.view(-1, cls.window_tokens):
            rows, columns = window // (grid[1] // 2), window % (grid[1] // 2)
            assert rows.unique_consecutive().numel() * columns.unique().numel() == len(window)
            assert (rows // 4).unique().numel() == (columns // 4).unique().numel() == 1


@pytest.mark.parametrize("max_rows", [1, 64, 200])
def test_pairs_go_through_in_parts_with_the_same_features(
    tower: vision.VisionTransformer, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(GRIDS)
    with torch.no_grad():
        at_once = tower(rows, GRIDS)
        monkeypatch.setattr(vision, "ROWS_AT_ONCE", max_rows)
        in_parts = tower(rows, GRIDS)
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=1e-6)


def test_parts_hold_every_pair_in_order_and_stay_within_the_limit() -> None:
    for max_rows in (1, 60, 120, 200, 10_000):
        parts = list(group_pairs(GRIDS, max_rows))
        pairs = [(1, h, w) for t, h, w in GRIDS for _ in range(t)]
        assert [pair for part in parts for pair in part] == pairs
        num_rows = [sum(h * w for _, h, w in part) for part in parts]
        assert all(n <= max_rows or len(part) == 1 for n, part in zip(num_rows, parts, strict=True))
        firsts = [part[0][1] * part[0][2] for part in parts[1:]]
        assert all(n + f > max_rows for n, f in zip(num_rows, firsts, strict=False))


def test_gradients_flow_even_after_inference_mode_filled_the_cache() -> None:
    window_classes.cache_clear()
    tower = VisionTransformer(CONFIG, GEOMETRY)
    rows = random_rows([(1, 10, 6)])
    with torch.inference_mode():
        tower(rows, [(1, 10, 6)])
    tower(rows, [(1, 10, 6)]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tower.parameters())


def test_no_items_give_no_features(tower: vision.VisionTransformer) -> None:
    assert tower(torch.empty(0, GEOMETRY.row_size), []).shape == (0, tower.config.feature_dim)


@pytest.mark.parametrize("grid", [(1, 5, 4), (0, 4, 4), (1, 4, 0)])
def test_bad_grids_are_named(tower: vision.VisionTransformer, grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="grid_thw must be positive with even height, width"):
        tower(torch.empty(20, GEOMETRY.row_size), [grid])


def test_rows_must_fit_the_grids(tower: vision.VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"rows must be of shape \(16, 1176\), got \(12, 1176\)"):
        tower(torch.empty(12, GEOMETRY.row_size), [(1, 4, 4)])


def some_jobs() -> list[PatchifyJob]:
    """Pairs of the sizes of GRIDS, each with frames of its own."""
    frames = torch.randint(0, 256, (20, 70, 80, 3), dtype=torch.uint8)
    grids = [grid for t, *grid in GRIDS for _ in range(t)]
    return [
        PatchifyJob(frames[2 * i], frames[2 * i + 1], PixelBox(3, 5, 77, 66), (14 * h, 14 * w))
        for i, (h, w) in enumerate(grids)
    ]


@pytest.mark.parametrize("max_rows", [100, 10_000])
def test_jobs_have_the_features_of_their_rows(
    tower: vision.VisionTransformer, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "ROWS_AT_ONCE", max_rows)
    jobs = some_jobs()
    with torch.no_grad():
        expected = tower(patchify(jobs, GEOMETRY), GRIDS)
        torch.testing.assert_close(tower.encode_jobs(jobs), expected, rtol=0, atol=1e-6)
        assert tower.encode_jobs([]).shape == (0, tower.config.feature_dim)
    with pytest.raises(ValueError, match="resized_hw must be positive multiples of 28 px"):
        tower.encode_jobs([replace(jobs[0], resized_hw=(0, 28))])


def test_jobs_see_weights_that_were_loaded_later() -> None:
    tower, jobs = VisionTransformer(CONFIG, GEOMETRY), some_jobs()[:1]
    with torch.no_grad():
        first = tower.encode_jobs(jobs)
        tower.load_state_dict(VisionTransformer(CONFIG, GEOMETRY).state_dict(), assign=True)
        second = tower.encode_jobs(jobs)
        _, h, w = GRIDS[0]
        torch.testing.assert_close(
            second, tower(patchify(jobs, GEOMETRY), [(1, h, w)]), rtol=0, atol=1e-6
        )
    assert not torch.allclose(first, second)


INTERPRETED = """
import os

import torch

from vtts_rt.models.qwen2_5_vl import GEOMETRY, VisionConfig
from vtts_rt.models.qwen2_5_vl.vision import VisionTransformer
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PixelBox

torch.set_num_threads(1)
torch.manual_seed(0)
tower = VisionTransformer(VisionConfig(
    depth=2, hidden_size=64, num_heads=2, intermediate_size=72, out_hidden_size=48,
    window_size=56, fullatt_block_indexes=(1,),
), GEOMETRY)
frames = torch.randint(0, 256, (2, 70, 80, 3), dtype=torch.uint8)
jobs = [PatchifyJob(frames[0], frames[1], PixelBox(3, 5, 77, 66), (56, 84))]
grids = [(1, 4, 6)]
for dtype in (torch.float16, torch.bfloat16):
    tower.to(dtype)
    wide = VisionTransformer(tower.config, GEOMETRY).double()
    wide.load_state_dict(tower.state_dict())
    with torch.inference_mode():
        exact = wide(patchify(jobs, GEOMETRY, backend="reference").double(), grids)
        eager = tower(patchify(jobs, GEOMETRY, backend="reference"), grids)
        os.environ["VTTS_RT_BACKEND"] = "patch_embed=triton,segment_attention=triton"
        found = tower.encode_jobs(jobs)
        assert tower.embed_numerics == "folded"
        del os.environ["VTTS_RT_BACKEND"]
        assert tower.embed_numerics == "rows" and not torch.equal(found, eager)
    bound = float((eager - exact).abs().max())
    error = float((found - exact).abs().max())
    ulp = torch.finfo(dtype).eps * float(exact.abs().max())
    assert error <= 2 * bound + ulp, (dtype, error, bound, ulp)
"""


@pytest.mark.slow
def test_a_pair_through_triton_is_as_exact_as_through_torch() -> None:
    run_triton(INTERPRETED, interpret=True)
