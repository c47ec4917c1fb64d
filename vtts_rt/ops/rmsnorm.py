"""rmsnorm: root-mean-square norm with an optional residual add.

    h = x + residual;  y = h / sqrt(mean(h^2) + eps) * weight

Legend: ... any leading shape, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, register, triton_supports
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

    num_features = x.shape[-1]
    require(
        "rmsnorm",
        "x's features",
        num_features,
        num_features <= kernel.MAX_FEATURES,
        f"<= {kernel.MAX_FEATURES} for the triton backend",
    )
    rows = _rows(x)
    y, total = kernel.rmsnorm(
        rows, None if residual is None else _rows(residual), weight.contiguous(), eps
    )
    return y.view(x.shape), x if residual is None else total.view(x.shape)


def _native(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from vtts_rt import _C

    rows = _rows(x)
    added = rows if residual is None else _rows(residual)
    y = rows.new_empty(rows.shape)
    total = rows if residual is None else rows.new_empty(rows.shape)
    _C.rmsnorm(
        rows.data_ptr(),
        rows.stride(0),
        0 if residual is None else added.data_ptr(),
        added.stride(0),
        weight.data_ptr(),
        eps,
        *rows.shape,
        y.data_ptr(),
        0 if residual is None else total.data_ptr(),
        torch.get_num_threads(),
    )
    return y.view(x.shape), x if residual is None else total.view(x.shape)


def _triton_refusal(x: Tensor, residual: Tensor | None, weight: Tensor) -> str | None:
    """Why the Triton kernel cannot take these tensors, or None."""
    tensors = (x, weight) if residual is None else (x, weight, residual)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a tensor that needs a gradient"
    return "float64, where sums are in float32" if x.dtype is torch.float64 else None


def _native_refusal(x: Tensor, residual: Tensor | None, weight: Tensor) -> str | None:
    """Why the native kernel cannot take these tensors, or None."""
    if not weight.is_contiguous():
        return "a weight that is not contiguous"
    return native.refusal(x, weight) if residual is None else native.refusal(x, weight, residual)


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (R, D) with adjacent features, copied only where strides demand it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


_OP = register(
    "rmsnorm",
    Backend("triton", triton_supports, _triton),
    Backend("cpu", native.supports, _native),
    Backend("reference", lambda device: None, _eager),
)
_REFUSALS = {_triton: _triton_refusal, _native: _native_refusal}


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
    backend: "auto", "triton" (CUDA, no gradient wanted), "cpu" (native: float32 on the CPU, no
        gradient wanted; one pass instead of seven operators, the same bits for a row in any
        company) or "reference" (eager torch, any device). "auto" takes the first two where it can.

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
    run = _OP.resolve(x.device.type, backend).run
    if run in _REFUSALS and (refusal := _REFUSALS[run](x, residual, weight)) is not None:
        require("rmsnorm", "x", refusal, backend == "auto", f"what backend {backend!r} takes")
        run = _eager
    elif run is _native and backend == "auto" and x.numel() > native.MAX_ROWS * x.shape[-1]:
        run = _native if native.has_vectors() else _eager
    y, total = run(x, residual, weight, eps)
    return y, total
