"""rotary: the native kernel against float64 and torch, in place and strided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_tools import check_interpreted, run_triton

from vtts_rt.ops.native import STORAGE
from vtts_rt.ops.rotary import rotary, rotary_ref

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]


def some(
    num_rows: int, num_heads: int, dim: int, extra: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that share their rows with `extra` others, and angles."""
    x = torch.randn(num_rows, num_heads + extra, dim).to(dtype)[:, :num_heads]
    angles = 100 * torch.randn(num_rows, dim // 2)
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 6), (7, 4, 64), (2, 3, 80), (500, 6, 32)])
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_every_instruction_set_is_as_exact_as_torch(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, cos, sin = some(*shape, dtype=dtype)
    exact, eager = rotary_ref(x, cos, sin), rotary(x.clone(), cos, sin, backend="torch")
    whole = x._base
    assert whole is not None
    others = whole[:, shape[1] :].clone()
    angles = cos.data_ptr(), sin.data_ptr()
    _C.rotary(x.data_ptr(), x.stride(0), *shape, *angles, 2, isa, STORAGE[dtype])
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (x - exact).abs().max() <= 2 * (eager - exact).abs().max() + ulp
    assert torch.equal(whole[:, shape[1] :], others), "other heads of a row stay"


def test_auto_turns_in_place_where_it_can_and_asks_torch_otherwise() -> None:
    x, cos, sin = some(4, 3, 8)
    expected = rotary(x.clone(), cos, sin, backend="torch")
    with torch.no_grad():
        got = rotary(x, cos, sin)
    assert got.data_ptr() == x.data_ptr()
    torch.testing.assert_close(got, expected)
    overlapping = torch.randn(1, 3, 8).expand(4, 3, 8)
    transposed = torch.randn(8, 3, 4).transpose(0, 2)
    for other in (overlapping, transposed, torch.randn(4, 3, 8).half()):
        before = other.clone()
        with torch.no_grad():
            got = rotary(other, cos, sin)
        assert torch.equal(other, before) and got.dtype == other.dtype
        limit = 0.01 if other.dtype is torch.float16 else 1e-5
        assert (got - rotary_ref(before, cos, sin)).abs().max() < limit
    x, weight = torch.randn(4, 3, 8), torch.ones(1, requires_grad=True)
    product = x * weight  # its gradient needs x as it is now
    before = x.clone()
    rotary(x, cos, sin)
    product.sum().backward()
    assert weight.grad is not None and torch.allclose(weight.grad, before.sum())
    needs_gradient = torch.randn(4, 3, 8, requires_grad=True)
    rotary(needs_gradient, cos, sin).square().sum().backward()
    assert needs_gradient.grad is not None
    assert rotary(x[:0], cos[:0], sin[:0]).shape == (0, 3, 8)


def test_bad_arguments_are_named() -> None:
    x, cos, sin = some(4, 3, 8)
    with pytest.raises(ValueError, match=r"rotary: x must be \(N, H, D\), D even, got \(4, 3, 7\)"):
        rotary(x[:, :, :7], cos, sin)
    with pytest.raises(ValueError, match=r"rotary: sin must be \(4, 4\), got \(3, 4\)"):
        rotary(x, cos, sin[:3])
    with torch.no_grad(), pytest.raises(ValueError, match="takes, got 'heads that are not packed"):
        rotary(torch.randn(8, 3, 4).transpose(0, 2), cos, sin, backend="cpu")
    with pytest.raises(ValueError, match="got 'gradients that may need what is overwritten'"):
        rotary(x, cos, sin, backend="cpu")


REFUSALS = """
import torch
from vtts_rt.ops.native import STORAGE
from vtts_rt.ops.rotary import rotary

angles = torch.randn(4, 4)
overlapping, x = torch.randn(1, 3, 8).expand(4, 3, 8), torch.randn(4, 3, 8)
with torch.no_grad():
    assert rotary(x, angles.cos(), angles.sin(), backend="triton").data_ptr() == x.data_ptr()
    assert rotary(x, angles.cos(), angles.sin()).data_ptr() == x.data_ptr()
    for other in (overlapping, torch.randn(4, 8, 3).mT, x.double()):
        before = other.clone()
        rotary(other, angles.cos(), angles.sin())
        assert torch.equal(other, before)
assert rotary(x, angles.cos(), angles.sin()).data_ptr() != x.data_ptr()
try:
    rotary(x, angles.cos(), angles.sin(), backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("rotary") == 25
    printed = run_triton(REFUSALS, interpret=True)
    assert "takes, got 'gradients that may need what is overwritten'" in printed
