"""patch_embed: native and unfused to the bit of rows and a product, Triton and folding by the 2x
rule, choices by measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton_tools import check_interpreted

from vtts_rt.ops import native
from vtts_rt.ops.linear import linear
from vtts_rt.ops.patch_embed import (
    PatchEmbedWeight,
    fold_patch_embed,
    patch_embed,
    patch_embed_ref,
)
from vtts_rt.ops.patch_jobs import mean_and_std
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PixelBox, ResizeKernel

pytest.importorskip("vtts_rt._C", reason="built without the native extension")
CPU = torch.device("cpu")


def some_jobs(low: int = 0, high: int = 256, resize: ResizeKernel = "fixed") -> list[PatchifyJob]:
    """Of noise between two pixel values."""
    rng = np.random.default_rng(0)
    frames = rng.integers(low, high, (2, 60, 75, 3), dtype=np.uint8)
    job = PatchifyJob(frames[0], frames[1], PixelBox(3, 2, 70, 55), (56, 84))
    return [job, replace(job, frame_b=frames[0], resized_hw=(28, 56), resize=resize)]


JOBS = some_jobs()
PLACES = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])


def some_weight(outputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(outputs, 1176) / 34).to(dtype)


@pytest.mark.parametrize("resize", ["float", "pil"])
@pytest.mark.parametrize("places", [None, PLACES, PLACES.int()])
@pytest.mark.parametrize("with_bias", [False, True])
def test_native_and_unfused_have_the_bits_of_rows_and_a_product(
    resize: ResizeKernel, places: torch.Tensor | None, with_bias: bool
) -> None:
    jobs, weight = some_jobs(resize=resize), some_weight(37)
    bias = torch.randn(37) if with_bias else None
    rows = patchify(jobs, places=places)
    for backend, product in (("cpu", "cpu"), ("unfused", "auto")):
        expected = linear(rows, weight, bias, backend=product)
        for embed in (weight, PatchEmbedWeight(weight, bias)):
            own = bias if embed is weight else None
            out = patch_embed(jobs, embed, own, places=places, backend=backend, num_threads=2)
            assert torch.equal(out, expected), backend
    exact = patch_embed_ref(jobs, weight, bias, places=places)
    out = patch_embed(jobs, weight, bias, places=places)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_needs_the_bias_of_the_rounded_weight(dtype: torch.dtype) -> None:
    """Plainly so on pixels near the mean, where the rounded weight's errors cancel."""
    jobs = some_jobs(100, 130)
    weight, bias = some_weight(64, dtype), torch.randn(64).to(dtype)
    folded, folded_bias = fold_patch_embed(weight, bias)
    assert folded.dtype == dtype and folded_bias.dtype == torch.float32
    turned, _ = fold_patch_embed(weight.t().contiguous().t(), bias)
    assert torch.equal(turned, folded) and turned.is_contiguous()
    mean, std = (part.double().repeat_interleave(392) for part in mean_and_std(CPU))
    pixels = (patchify(jobs).double() * std + mean).round()
    exact = patch_embed_ref(jobs, weight, bias)
    eager = linear(patchify(jobs, dtype=dtype), weight, bias)
    allowed = 2 * (eager - exact).abs().max()

    def error(moved_bias: torch.Tensor) -> torch.Tensor:
        return (pixels @ folded.double().T + moved_bias - exact).abs().max()

    found = error(folded_bias.double())
    assert found <= allowed
    assert error(bias.double() - (weight.double() / std) @ mean) > 3 * found


def test_a_prepared_weight_folds_once_and_again_when_it_changes() -> None:
    weight = some_weight(8, torch.bfloat16)
    embed = PatchEmbedWeight(weight)
    first = embed.folded()
    assert embed.folded() is first
    weight.mul_(2)
    second = embed.folded()
    assert torch.equal(second[0], 2 * first[0]) and torch.equal(second[1], 2 * first[1])
    weight.data = some_weight(8, torch.bfloat16)
    assert not torch.equal(embed.folded()[0], second[0])
    with torch.inference_mode():
        assert PatchEmbedWeight(weight.clone()).folded()[0].shape == (8, 1176)


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("patch_embed") == 7


def test_what_wants_a_gradient_or_another_type_goes_to_torch() -> None:
    weight = some_weight(8).requires_grad_()
    patch_embed(JOBS, weight).sum().backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match="backend 'cpu' takes, got 'a tensor that needs a grad"):
        patch_embed(JOBS, weight, backend="cpu")
    wide = some_weight(8).t().contiguous().t()
    assert torch.equal(patch_embed(JOBS, wide), linear(patchify(JOBS), wide))
    with pytest.raises(ValueError, match="not contiguous"):
        patch_embed(JOBS, wide, backend="cpu")
    assert patch_embed(JOBS, some_weight(8, torch.bfloat16)).dtype == torch.bfloat16
    assert patch_embed([], some_weight(8)).shape == (0, 8)


def test_many_rows_are_native_where_linear_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = some_weight(8)
    for most, backend in ((31, "torch"), (32, "cpu")):
        monkeypatch.setattr(native, "most_rows", lambda op, most=most: most)
        expected = linear(patchify(JOBS), weight, backend=backend)
        assert torch.equal(patch_embed(JOBS, weight), expected)


def test_bad_arguments_are_named() -> None:
    weight = some_weight(8)
    for bad in (weight[:, :1175], weight[0], weight.double()):
        with pytest.raises(ValueError, match=r"weight must be \(O, 1176\) float32, float16 or bf"):
            patch_embed(JOBS, bad)
    for bias in (torch.ones(7), torch.ones(8).half()):
        with pytest.raises(ValueError, match=r"bias must be \(8,\) torch.float32 on cpu"):
            patch_embed(JOBS, weight, bias)
    with pytest.raises(ValueError, match="bias must be in the PatchEmbedWeight"):
        patch_embed(JOBS, PatchEmbedWeight(weight), torch.ones(8))
    with pytest.raises(ValueError, match="patch_embed: box must be not empty and inside"):
        patch_embed([replace(JOBS[0], box=PixelBox(0, 0, 76, 60))], weight)
    with pytest.raises(ValueError, match="patch_embed: places must be a permutation"):
        patch_embed(JOBS, weight, places=torch.zeros(8).long())
    with pytest.raises(ValueError, match="num_threads must be >= 0"):
        patch_embed(JOBS, weight, num_threads=-1)
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        patch_embed(JOBS, weight, backend="triton")
