"""rmsnorm: root-mean-square norm with an optional residual add.

    h = x + residual;  y = h / sqrt(mean(h^2) + eps) * weight

Legend: ... any leading shape, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_refuses, triton_supports
from vtts_rt.types import require


def rmsnorm_ref(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The equation in float32, whatever the inputs: the yardstick of the other backends."""
    h = x.float() if residual is None else x.float() + residual.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight.float(), h


def _eager(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rounds where transformers' Qwen2RMSNorm rounds: the sum, and before the weight."""
    total = x if residual is None else x + residual
    h = total.float()
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), total


def _triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from vtts_rt.kernels import rmsnorm as kernel

    added = None if residual is None else native.rows_of(residual)
    y, total = kernel.rmsnorm(native.rows_of(x), added, weight.contiguous(), eps)
    return y.view(x.shape), x if residual is None else total.view(x.shape)


def _triton_refuses(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> str | None:
    from vtts_rt.kernels.rmsnorm import MAX_FEATURES

    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features, more than {MAX_FEATURES}"
    return triton_refuses(x, residual, weight)


def _native(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from vtts_rt import _C

    rows = native.rows_of(x)
    added = rows if residual is None else native.rows_of(residual)
    y = rows.new_empty(rows.shape)
    total = None if residual is None else rows.new_empty(rows.shape)
    _C.rmsnorm(
        *(rows.data_ptr(), rows.stride(0)),
        *(0 if residual is None else added.data_ptr(), added.stride(0)),
        *(weight.data_ptr(), eps, *rows.shape, y.data_ptr(), native.address(total)),
        *(torch.get_num_threads(), "auto", native.STORAGE[x.dtype]),
    )
    return y.view(x.shape), x if total is None else total.view(x.shape)


def _native_refuses(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> str | None:
    if not weight.is_contiguous():
        return "a weight that is not contiguous"
    return native.refusal(x, residual, weight, dtypes=native.STORAGE)


_OP = register(
    "rmsnorm",
    Backend("triton", triton_supports, _triton, _triton_refuses),
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("reference", anything, _eager),
)


def rmsnorm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension.

    x: (..., D) any float dtype; residual: shape and dtype of x, added first;
    weight: (D,) of x's dtype; all on one device. eps > 0 (Qwen2.5-VL: 1e-6).
    backend: "auto", "triton" (CUDA, no gradient wanted), "cpu" (native: float32 or bfloat16
        on the CPU, no gradient wanted; a row's bits do not depend on other rows) or "reference"
        (eager torch, any device). "auto" takes the first two where it can: one pass instead of
        seven operators.

    Returns (y, h), both (..., D) of x's dtype: the normalised value, and x + residual (x itself
    without a residual), which is the next layer's residual.
    Raises ValueError on shapes or dtypes that do not match, RuntimeError on an unusable backend.
    """
    require("rmsnorm", "x's dtype", x.dtype, x.is_floating_point(), "a float dtype")
    require("rmsnorm", "x", tuple(x.shape), x.dim() >= 1 and x.shape[-1] >= 1, "(..., D)")
    for name, tensor, shape in (("weight", weight, x.shape[-1:]), ("residual", residual, x.shape)):
        if tensor is None:
            continue
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, x.dtype, x.device):
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            require("rmsnorm", name, got, False, f"{tuple(shape)} {x.dtype} on {x.device}")
    require("rmsnorm", "eps", eps, eps > 0, "> 0")
    y, total = _OP(x.device.type, backend, x, residual, weight, eps)
    return y, total
