"""swiglu: the native kernel against float64 and torch."""

from __future__ import annotations

import pytest
import torch
from triton_tools import check_interpreted

from vtts_rt.ops.native import STORAGE
from vtts_rt.ops.swiglu import swiglu, swiglu_ref

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (16, 64), (2, 1000), (700, 120)])
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_every_instruction_set_is_as_exact_as_torch(
    isa: str, shape: tuple[int, int], size: float, dtype: torch.dtype
) -> None:
    x = (size * torch.randn(shape)).to(dtype)
    out = torch.full((shape[0], shape[1] // 2), torch.nan, dtype=dtype)
    _C.swiglu(x.data_ptr(), shape[0], shape[1] // 2, out.data_ptr(), 2, isa, STORAGE[dtype])
    exact = swiglu_ref(x)
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    allowed = 2 * (swiglu(x, backend="torch") - exact).abs().max() + ulp
    assert (out - exact).abs().max() <= allowed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_values_do_not_depend_on_where_they_stand(isa: str, dtype: torch.dtype) -> None:
    gates = torch.tensor([-torch.inf, torch.inf, torch.nan, -200.0, 200.0, 0.0])
    rows = torch.cat([gates.repeat(3)[:17], torch.ones(17)])[None].to(dtype)  # 8, 8, and one more
    out = torch.empty(1, 17, dtype=dtype)
    _C.swiglu(rows.data_ptr(), 1, 17, out.data_ptr(), 1, isa, STORAGE[dtype])
    for at in range(6):
        same = out[0, at::6]
        assert bool((same == same[0]).all()) or bool(same.isnan().all())


def test_what_the_kernel_cannot_take_goes_to_torch() -> None:
    x = torch.randn(17, 12)
    strided = torch.randn(17, 24)[:, :12]
    assert torch.equal(swiglu(strided), swiglu(strided, backend="torch"))
    torch.testing.assert_close(swiglu(x, backend="cpu"), swiglu(x, backend="torch"))
    assert torch.equal(swiglu(x)[3:4], swiglu(x[3:4]))
    assert swiglu(x[:0]).shape == (0, 6)
    assert swiglu(x.double()).dtype == torch.float64
    needs_gradient = x[:2].clone().requires_grad_()
    swiglu(needs_gradient).sum().backward()
    assert needs_gradient.grad is not None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"swiglu: x must be \(..., 2 I\), got \(2, 3\)"):
        swiglu(torch.randn(2, 3))
    with pytest.raises(ValueError, match="what backend 'cpu' takes, got 'x of shape"):
        swiglu(torch.randn(4, 6)[:, 1:5], backend="cpu")


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("swiglu") == 30
