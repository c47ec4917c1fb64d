"""linear_int8: the nearest bytes, and their product with rows, the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from op_cases import cases
from op_cases.case import error_of
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.linear_int8 import linear_int8, linear_int8_ref, quantize_int8
from vtts_rt.ops.native import MAX_ROWS
from vtts_rt.ops.quantized import dequantize

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]


def on_isa(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, isa: str, num_threads: int
) -> Tensor:
    """The native kernel on a given instruction set, which the public function does not offer."""
    guard = 8
    out = torch.full((x.shape[0] * weight.shape[0] + guard,), torch.nan)
    _C.linear_int8(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *x.shape,
        weight.shape[0],
        num_threads,
        isa,
    )
    assert bool(out[-guard:].isnan().all()), "nothing is written behind the result"
    return out[:-guard].view(x.shape[0], weight.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_the_nearest(dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 300) * torch.logspace(-4, 3, 7)[:, None]).to(dtype)
    weight8, scale = quantize_int8(weight)
    assert weight8.dtype is torch.int8 and scale.dtype is torch.float32
    assert bool((weight8.short().abs().amax(1) == 127).all())
    off = (dequantize(weight8, scale) - weight.float()).abs()
    assert bool((off <= 0.5001 * scale[:, None]).all())


def test_rows_of_nothing_and_tiny_rows_become_zeros() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = 1e-44
    weight[2, 0] = -3.0
    weight8, scale = quantize_int8(weight)
    assert not weight8[:2].any() and bool(scale.isfinite().all())
    assert weight8[2].tolist() == [-127, 0, 0, 0]
    assert quantize_int8(torch.zeros(2, 0))[0].shape == (2, 0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(2, 2)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="quantize_int8: weight must be finite"):
        quantize_int8(weight)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_case_is_within_rounding_of_the_equation(backend: str) -> None:
    ran = [case for case in cases("linear_int8", "cpu", "check") if case.takes(backend)]
    assert len(ran) == (12 if backend == "cpu" else 36)
    for case in ran:
        error = error_of(case, backend)
        assert error.within, (case.name, case.dtype, error)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 3), (7, 24), (64, 31), (100, 513), (50, 64), (31, 1100), (3, 0)]
)  # (O, C): parts of vectors, whole cache lines, and more channels than go through at once
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_instruction_set_is_as_exact_as_torch(
    isa: str, shape: tuple[int, int], with_bias: bool
) -> None:
    weight, scale = quantize_int8(torch.randn(shape))
    bias = torch.randn(shape[0]) if with_bias else None
    for rows in (1, 2, 3, 4, 5, MAX_ROWS, MAX_ROWS + 1, 43):
        x = torch.randn(rows, 2 * shape[1])[:, : shape[1]]  # rows that are not adjacent
        out = on_isa(x, weight, scale, bias, isa, num_threads=1)
        exact = linear_int8_ref(x, weight, scale, bias)
        eager = F.linear(x, dequantize(weight, scale), bias)
        ulp = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max() + ulp


@pytest.mark.parametrize("isa", ISAS)
def test_every_byte_is_taken_for_its_value(isa: str) -> None:
    weight = torch.arange(-128, 128, dtype=torch.int8)[:, None].contiguous()
    for rows in (1, MAX_ROWS + 1):
        out = on_isa(torch.ones(rows, 1), weight, torch.ones(256), None, isa, num_threads=1)
        assert torch.equal(out, weight.float().mT.expand(rows, 256))
    wide = torch.arange(-128, 128, dtype=torch.int8).view(2, 128)  # whole vectors
    for rows in (1, MAX_ROWS + 1):
        x = torch.eye(128)[:rows]
        out = on_isa(x, wide, torch.full((2,), 0.5), None, isa, num_threads=1)
        assert torch.equal(out, 0.5 * wide[:, :rows].float().mT)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_in_any_company_and_on_two_threads(isa: str) -> None:
    weight, scale = quantize_int8(torch.randn(600, 517))
    bias = torch.randn(600)
    few, many = torch.randn(16, 517), torch.randn(90, 517)
    together = on_isa(few, weight, scale, bias, isa, num_threads=2)
    for rows in (1, 2, 3, 5, 8):
        part = on_isa(few[:rows], weight, scale, bias, isa, num_threads=1)
        assert torch.equal(part, together[:rows])
    together = on_isa(many, weight, scale, bias, isa, num_threads=2)
    for first, last in ((0, 17), (3, 61), (73, 90)):
        part = on_isa(many[first:last], weight, scale, bias, isa, num_threads=1)
        assert torch.equal(part, together[first:last])


@pytest.mark.parametrize("rows", [0, 1, MAX_ROWS, MAX_ROWS + 1, 200])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_the_public_function_takes_any_number_of_rows(rows: int, backend: str) -> None:
    weight, scale = quantize_int8(torch.randn(30, 40))
    x = torch.randn(rows, 2, 40)
    out = linear_int8(x, weight, scale, backend=backend)
    assert out.shape == (rows, 2, 30) and out.dtype is torch.float32
    torch.testing.assert_close(out, F.linear(x, dequantize(weight, scale)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("refusal", [None, "an Intel processor"])
def test_many_rows_go_where_they_were_measured_to_be_faster(
    refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "tiles_refusal", lambda: refusal)
    weight, scale = quantize_int8(torch.randn(40, 300))
    x = torch.randn(MAX_ROWS + 1, 300)
    expected = linear_int8(x, weight, scale, backend="torch" if refusal else "cpu")
    assert torch.equal(linear_int8(x, weight, scale), expected)
    few = linear_int8(x[1:], weight, scale, backend="cpu")
    assert torch.equal(linear_int8(x[1:], weight, scale), few)


def test_what_the_kernel_cannot_take_goes_to_torch_or_is_refused() -> None:
    weight, scale = quantize_int8(torch.randn(6, 5))
    x = torch.randn(2, 5)
    for rows in (x.double(), x.bfloat16(), x.clone().requires_grad_()):
        expected = F.linear(rows, dequantize(weight, scale, rows.dtype))
        assert torch.equal(linear_int8(rows, weight, scale), expected)
        with pytest.raises(
            ValueError, match="linear_int8: arguments must be what backend 'cpu' takes"
        ):
            linear_int8(rows, weight, scale, backend="cpu")
    wanted = x.clone().requires_grad_()
    linear_int8(wanted, weight, scale).sum().backward()
    assert wanted.grad is not None
    torch.testing.assert_close(wanted.grad, dequantize(weight, scale).sum(0).expand(2, 5))


@pytest.mark.parametrize(
    ("name", "make", "rule"),
    [
        ("weight", lambda w: w.float(), r"weight must be \(O, C\) int8, contiguous"),
        ("weight", lambda w: w.mT, r"weight must be \(O, C\) int8, contiguous"),
        ("x", lambda x: x[:, :3], r"x must be \(\.\.\., 4\) of floats, got \(2, 3, torch.float32"),
        ("scale", lambda s: s.double(), r"scale must be \(3,\) torch.float32, contiguous"),
        ("scale", lambda s: s[:2], r"scale must be \(3,\) torch.float32, contiguous"),
        ("bias", lambda b: b.half(), r"bias must be \(3,\) torch.float32, contiguous"),
        ("bias", lambda b: b.to("meta"), "devices must be one device"),
    ],
)
def test_bad_arguments_are_named(name: str, make, rule: str) -> None:
    weight, scale = quantize_int8(torch.randn(3, 4))
    args = {"x": torch.randn(2, 4), "weight": weight, "scale": scale, "bias": torch.randn(3)}
    args[name] = make(args[name])
    with pytest.raises(ValueError, match=f"linear_int8: {rule}"):
        linear_int8(**args)
