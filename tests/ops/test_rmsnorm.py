"""rmsnorm: eager against the equation, Triton under the interpreter."""

from __future__ import annotations

import pytest
import torch
import torchvision_shim
from triton_tools import check_interpreted, run_triton

from vtts_rt.ops.native import STORAGE
from vtts_rt.ops.rmsnorm import rmsnorm, rmsnorm_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (4, 1, 64), (0, 8)])
def test_eager_is_within_rounding_of_the_equation(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    y, total = rmsnorm(x, weight, residual=residual)
    exact, _ = rmsnorm_ref(x + residual, weight)
    assert torch.equal(total, x + residual) and y.dtype == dtype and y.shape == shape
    eps = torch.finfo(dtype).eps
    assert bool(((y.float() - exact).abs() <= 2 * eps * exact.abs() + 1e-6).all())


def test_eager_equals_transformers() -> None:
    torchvision_shim.install()
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = Qwen2RMSNorm(48, eps=1e-6).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 48).to(torch.bfloat16)
    y, same = rmsnorm(x, norm.weight.detach(), eps=1e-6, backend="reference")
    assert torch.equal(y, norm(x)) and same is x


def test_bad_arguments_are_refused() -> None:
    x, weight = torch.randn(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must be \(4,\) torch.float32 on cpu, got"):
        rmsnorm(x, torch.ones(5))
    with pytest.raises(ValueError, match=r"residual must be \(2, 4\)"):
        rmsnorm(x, weight, residual=torch.randn(1, 4))
    with pytest.raises(ValueError, match="dtype must be a float dtype"):
        rmsnorm(x.long(), weight.long())
    with pytest.raises(ValueError, match="eps must be > 0"):
        rmsnorm(x, weight, eps=0.0)
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        rmsnorm(x, weight, backend="triton")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "neon"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 64), (2, 515), (900, 96)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", list(STORAGE))
def test_native_is_as_exact_as_eager_on_every_instruction_set(
    isa: str, shape: tuple[int, int], with_residual: bool, dtype: torch.dtype
) -> None:
    _C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
    if not _C.isa_supported(isa):
        pytest.skip(f"no {isa} here")
    # Rows that are not adjacent, in both.
    x = 3 * torch.randn(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]]
    residual = torch.randn(shape[0], shape[1] + 1).to(dtype)[:, : shape[1]]
    weight = torch.randn(shape[1]).to(dtype)
    y, h = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    _C.rmsnorm(
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr() if with_residual else 0,
        residual.stride(0),
        weight.data_ptr(),
        1e-6,
        *shape,
        y.data_ptr(),
        h.data_ptr(),
        2,
        isa,
        STORAGE[dtype],
    )
    total = x + residual if with_residual else x
    assert torch.equal(h, total) if with_residual else bool(h.isnan().all())
    wide = total.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    eager, _ = rmsnorm(total, weight, backend="reference")
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= 2 * (eager - exact).abs().max() + ulp


@pytest.mark.parametrize("dtype", list(STORAGE))
def test_native_gives_a_row_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    pytest.importorskip("vtts_rt._C", reason="built without the native extension")
    weight, residual, x = (torch.randn(*s, 640).to(dtype) for s in ((), (170,), (170,)))
    y, total = rmsnorm(x, weight, residual=residual, backend="cpu")
    assert torch.equal(total, x + residual)
    assert torch.equal(y[33:34], rmsnorm(total[33:34], weight, backend="cpu")[0])
    same = rmsnorm(x.view(2, 85, 640), weight, residual=residual.view(2, 85, 640), backend="cpu")
    assert torch.equal(same[0].view(y.shape), y) and torch.equal(same[1].view(y.shape), total)
    weight.requires_grad_()
    rmsnorm(x, weight)[0].sum().backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match="got 'a tensor that needs a gradient'"):
        rmsnorm(x, weight, backend="cpu")
    assert rmsnorm(x[:0], weight)[0].shape == (0, 640)


GRADIENTS = """
import torch
from vtts_rt.ops.native import STORAGE
from vtts_rt.ops.rmsnorm import rmsnorm

x, weight = torch.randn(3, 8), torch.ones(8, requires_grad=True)
rmsnorm(x, weight)[0].sum().backward()
assert weight.grad is not None
with torch.no_grad():
    print(rmsnorm(x, weight, backend="triton")[0].requires_grad)
"""


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("rmsnorm") == 36
    assert run_triton(GRADIENTS, interpret=True).split() == ["False"]
