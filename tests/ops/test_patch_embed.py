"""patch_embed: native and unfused to the bit of rows and a product, Triton and folding by the 2x
rule, choices by measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton_tools import check_interpreted, run_triton
from utils import QWEN3_VL, UNEVEN

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.linear import linear
from vtts_rt.ops.patch_embed import (
    PatchEmbedWeight,
    fold_patch_embed,
    patch_embed,
    patch_embed_ref,
)
from vtts_rt.ops.patch_jobs import mean_and_std
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import Geometry, PixelBox, ResizeKernel

pytest.importorskip("vtts_rt._C", reason="built without the native extension")
CPU = torch.device("cpu")


def some_jobs(
    low: int = 0, high: int = 256, resize: ResizeKernel = "fixed", geometry: Geometry = GEOMETRY
) -> list[PatchifyJob]:
    """Of noise between two pixel values."""
    rng, side = np.random.default_rng(0), geometry.token_px
    frames = rng.integers(low, high, (2, 60, 75, 3), dtype=np.uint8)
    job = PatchifyJob(frames[0], frames[1], PixelBox(3, 2, 70, 55), (2 * side, 3 * side))
    return [job, replace(job, frame_b=frames[0], resized_hw=(side, 2 * side), resize=resize)]


JOBS = some_jobs()
PLACES = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])


def some_weight(
    outputs: int, dtype: torch.dtype = torch.float32, geometry: Geometry = GEOMETRY
) -> torch.Tensor:
    return (torch.randn(outputs, geometry.row_size) / 34).to(dtype)


@pytest.mark.parametrize("geometry", [GEOMETRY, UNEVEN], ids=["14 px", "16 px"])
@pytest.mark.parametrize("resize", ["float", "pil"])
@pytest.mark.parametrize("places", [None, PLACES, PLACES.int()])
@pytest.mark.parametrize("with_bias", [False, True])
def test_native_and_unfused_have_the_bits_of_rows_and_a_product(
    geometry: Geometry, resize: ResizeKernel, places: torch.Tensor | None, with_bias: bool
) -> None:
    jobs = some_jobs(resize=resize, geometry=geometry)
    weight = some_weight(37, geometry=geometry)
    bias = torch.randn(37) if with_bias else None
    embed = PatchEmbedWeight(weight, geometry, bias)
    rows = patchify(jobs, geometry, places=places)
    for backend, product in (("cpu", "cpu"), ("unfused", "auto")):
        expected = linear(rows, weight, bias, backend=product)
        out = patch_embed(jobs, embed, places=places, backend=backend, num_threads=2)
        assert torch.equal(out, expected), backend
    exact = patch_embed_ref(jobs, embed, places=places)
    out = patch_embed(jobs, embed, places=places)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("geometry", [GEOMETRY, QWEN3_VL], ids=["14 px", "16 px"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_needs_the_bias_of_the_rounded_weight(
    dtype: torch.dtype, geometry: Geometry
) -> None:
    """Plainly so on pixels near the mean, where the rounded weight's errors cancel."""
    jobs = some_jobs(100, 130, geometry=geometry)
    weight, bias = some_weight(64, dtype, geometry), torch.randn(64).to(dtype)
    folded, folded_bias = fold_patch_embed(weight, geometry, bias)
    assert folded.dtype == dtype and folded_bias.dtype == torch.float32
    turned, _ = fold_patch_embed(weight.t().contiguous().t(), geometry, bias)
    assert torch.equal(turned, folded) and turned.is_contiguous()
    values = mean_and_std(geometry, CPU).double()
    mean, std = values.repeat_interleave(geometry.row_size // 3, dim=1)
    pixels = (patchify(jobs, geometry).double() * std + mean).round()
    exact = patch_embed_ref(jobs, PatchEmbedWeight(weight, geometry, bias))
    eager = linear(patchify(jobs, geometry, dtype=dtype), weight, bias)
    allowed = 2 * (eager - exact).abs().max()

    def error(moved_bias: torch.Tensor) -> torch.Tensor:
        return (pixels @ folded.double().T + moved_bias - exact).abs().max()

    found = error(folded_bias.double())
    assert found <= allowed
    assert error(bias.double() - (weight.double() / std) @ mean) > 3 * found


def test_a_prepared_weight_folds_once_and_again_when_it_changes() -> None:
    weight = some_weight(8, torch.bfloat16)
    embed = PatchEmbedWeight(weight, GEOMETRY)
    first = embed.folded()
    assert embed.folded() is first
    weight.mul_(2)
    second = embed.folded()
    assert torch.equal(second[0], 2 * first[0]) and torch.equal(second[1], 2 * first[1])
    weight.data = some_weight(8, torch.bfloat16)
    assert not torch.equal(embed.folded()[0], second[0])
    with torch.inference_mode():
        assert PatchEmbedWeight(weight.clone(), GEOMETRY).folded()[0].shape == (8, 1176)


PATCHES_OF_16_PX = """
import torch
from vtts_rt.ops.linear import linear
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed, patch_embed_ref
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import Geometry, PixelBox

geometry = Geometry(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
a, b = torch.randint(0, 256, (2, 71, 53, 3), dtype=torch.uint8, generator=torch.Generator())
jobs = [PatchifyJob(a, b, PixelBox(1, 2, 50, 70), (32, 64))]
for dtype in (torch.float16, torch.bfloat16):
    weight, bias = (torch.randn(40, 1536) / 39).to(dtype), torch.randn(40).to(dtype)
    embed = PatchEmbedWeight(weight, geometry, bias)
    exact = patch_embed_ref(jobs, embed)
    eager = linear(patchify(jobs, geometry, dtype=dtype), weight, bias, backend="torch")
    error, allowed = ((x.double() - exact).abs().max() for x in (
        patch_embed(jobs, embed, backend="triton"), eager))
    assert error <= 2 * allowed + exact.abs().max() * torch.finfo(dtype).eps, dtype
print("done")
"""


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("patch_embed") == 7
    assert run_triton(PATCHES_OF_16_PX, interpret=True).split() == ["done"]


def test_what_wants_a_gradient_or_another_type_goes_to_torch() -> None:
    weight = some_weight(8).requires_grad_()
    patch_embed(JOBS, PatchEmbedWeight(weight, GEOMETRY)).sum().backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match="backend 'cpu' takes, got 'a tensor that needs a grad"):
        patch_embed(JOBS, PatchEmbedWeight(weight, GEOMETRY), backend="cpu")
    wide = some_weight(8).t().contiguous().t()
    embed = PatchEmbedWeight(wide, GEOMETRY)
    assert torch.equal(patch_embed(JOBS, embed), linear(patchify(JOBS, GEOMETRY), wide))
    with pytest.raises(ValueError, match="not contiguous"):
        patch_embed(JOBS, embed, backend="cpu")
    half = PatchEmbedWeight(some_weight(8, torch.bfloat16), GEOMETRY)
    assert patch_embed(JOBS, half).dtype == torch.bfloat16
    assert patch_embed([], embed).shape == (0, 8)


def test_bad_arguments_are_named() -> None:
    weight = some_weight(8)
    for bad in (weight[:, :1175], weight[0], weight.double()):
        with pytest.raises(ValueError, match=r"weight must be \(O, 1176\) float32, float16 or bf"):
            PatchEmbedWeight(bad, GEOMETRY)
    with pytest.raises(ValueError, match=r"weight must be \(O, 1536\) float32, float16 or bf"):
        PatchEmbedWeight(weight, QWEN3_VL)
    for bias in (torch.ones(7), torch.ones(8).half()):
        with pytest.raises(ValueError, match=r"bias must be \(8,\) torch.float32 on cpu"):
            PatchEmbedWeight(weight, GEOMETRY, bias)
    embed = PatchEmbedWeight(weight, GEOMETRY)
    with pytest.raises(ValueError, match="patch_embed: box must be not empty and inside"):
        patch_embed([replace(JOBS[0], box=PixelBox(0, 0, 76, 60))], embed)
    with pytest.raises(ValueError, match="patch_embed: places must be a permutation"):
        patch_embed(JOBS, embed, places=torch.zeros(8).long())
    with pytest.raises(ValueError, match="num_threads must be >= 0"):
        patch_embed(JOBS, embed, num_threads=-1)
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        patch_embed(JOBS, embed, backend="triton")
