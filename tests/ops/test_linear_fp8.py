"""linear_fp8: the nearest 8-bit weights, their product with rows, and a model made of them."""

from __future__ import annotations

import pytest
import torch
from op_cases import cases
from op_cases.case import error_of
from triton_tools import check_interpreted, run_triton

from vtts_rt.ops import quantized
from vtts_rt.ops.linear_fp8 import linear_fp8, quantize_fp8
from vtts_rt.ops.quantized import dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_the_nearest(dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 300) * torch.logspace(-4, 3, 7)[:, None]).to(dtype)
    weight8, scale = quantize_fp8(weight)
    assert weight8.dtype is torch.float8_e4m3fn and scale.dtype is torch.float32
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()]
    wide = weight.double() / scale.double()[:, None]
    nearest = (wide[..., None] - values).abs().amin(-1)
    assert bool(((weight8.double() - wide).abs() <= nearest + 1e-4).all())
    assert bool((weight8.float().abs().amax(1) == 448).all())
    off = (dequantize(weight8, scale) - weight.float()).abs()
    bound = torch.maximum(weight.float().abs() / 16, scale[:, None] * 2**-10)
    assert bool((off <= 1.0001 * bound).all())


def test_rows_of_nothing_and_tiny_rows_become_zeros() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = 1e-44
    weight[2, 0] = -3.0
    weight8, scale = quantize_fp8(weight)
    assert torch.equal(dequantize(weight8, scale)[2], weight[2])
    assert not weight8[:2].float().any() and bool(scale.isfinite().all())
    assert quantize_fp8(torch.zeros(2, 0))[0].shape == (2, 0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(2, 2)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="quantize_fp8: weight must be finite"):
        quantize_fp8(weight)


def test_every_case_is_within_rounding_of_the_equation() -> None:
    for case in cases("linear_fp8", "cpu", "check"):
        assert error_of(case, "torch").within, (case.name, case.dtype)


def test_decoding_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = torch.randn(2, 3, 20), torch.randn(11)
    weight, scale = quantize_fp8(torch.randn(11, 20))
    whole = linear_fp8(x, weight, scale, bias)
    monkeypatch.setattr(quantized, "_WEIGHTS_AT_ONCE", 40)  # two outputs
    assert whole.shape == (2, 3, 11)
    torch.testing.assert_close(linear_fp8(x, weight, scale, bias), whole)
    x.requires_grad_()
    linear_fp8(x, weight, scale).sum().backward()
    expected = dequantize(weight, scale).sum(0).expand(2, 3, 20)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("name", "make", "rule"),
    [
        ("weight", lambda w: w.float(), r"weight must be \(O, C\) float8_e4m3fn, contiguous"),
        ("weight", lambda w: w.mT, r"weight must be \(O, C\) float8_e4m3fn, contiguous"),
        ("x", lambda x: x[:, :3], r"x must be \(\.\.\., 4\) of floats, got \(2, 3, torch.float32"),
        ("x", lambda x: x.long(), r"x must be \(\.\.\., 4\) of floats"),
        ("scale", lambda s: s.double(), r"scale must be \(3,\) torch.float32, contiguous"),
        ("scale", lambda s: s[:2], r"scale must be \(3,\) torch.float32, contiguous"),
        ("bias", lambda b: b.half(), r"bias must be \(3,\) torch.float32, contiguous"),
        ("bias", lambda b: b.to("meta"), "devices must be one device"),
    ],
)
def test_bad_arguments_are_named(name: str, make, rule: str) -> None:
    weight, scale = quantize_fp8(torch.randn(3, 4))
    args = {"x": torch.randn(2, 4), "weight": weight, "scale": scale, "bias": torch.randn(3)}
    args[name] = make(args[name])
    with pytest.raises(ValueError, match=f"linear_fp8: {rule}"):
        linear_fp8(**args)


EVERY_BYTE = """
import torch
from vtts_rt.ops.linear_fp8 import linear_fp8

weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].contiguous()
weight = weight[weight.float().isfinite()[:, 0]]
assert len(weight) == 254
for rows in (1, 5):
    out = linear_fp8(torch.ones(rows, 1), weight, torch.ones(254), backend="triton")
    assert torch.equal(out, weight.float().mT.expand(rows, 254))
try:
    linear_fp8(torch.ones(1, 1, requires_grad=True), weight, torch.ones(254), backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("linear_fp8") == 36
    printed = run_triton(EVERY_BYTE, interpret=True)
    assert "what backend 'triton' takes, got 'a tensor that needs a gradient'" in printed
