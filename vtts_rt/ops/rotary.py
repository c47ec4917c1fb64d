"""rotary: rotary position embedding of queries and keys.

    out[n, h, i]       = x[n, h, i] cos[n, i] - x[n, h, i + D/2] sin[n, i]
    out[n, h, i + D/2] = x[n, h, i + D/2] cos[n, i] + x[n, h, i] sin[n, i],   i < D/2

Legend: N rows, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_refuses, triton_supports
from vtts_rt.types import require


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The equation in float64: the yardstick of the backends. Returns (N, H, D) float64."""
    low, high = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1)


def _torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.to(cos.dtype).chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(x.dtype)


def _native(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from vtts_rt import _C

    cos, sin = cos.float(), sin.float()
    _C.rotary(
        *(x.data_ptr(), x.stride(0), *x.shape, cos.data_ptr(), sin.data_ptr()),
        *(torch.get_num_threads(), "auto", native.STORAGE[x.dtype]),
    )
    return x


def _triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from vtts_rt.kernels import rotary as kernel

    return kernel.rotary(x, cos.contiguous(), sin.contiguous())  # type: ignore[no-any-return]


def _native_refuses(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    num_rows, num_heads, dim = x.shape
    packed = x.stride(2) == 1 and x.stride(1) == dim
    apart = num_rows < 2 or x.stride(0) >= num_heads * dim
    if x.numel() and not (packed and apart and cos.is_contiguous() and sin.is_contiguous()):
        return "heads that are not packed, rows that overlap, or angles that are not contiguous"
    if torch.is_grad_enabled():
        return "gradients that may need what is overwritten"
    refusals = (native.refusal(*group, dtypes=native.STORAGE) for group in ((x,), (cos, sin)))
    return next(filter(None, refusals), None)


def _triton_refuses(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    num_rows, num_heads, dim = x.shape
    apart = num_heads < 2 or x.stride(1) >= dim
    apart = apart and (num_rows < 2 or x.stride(0) >= (num_heads - 1) * x.stride(1) + dim)
    if x.numel() and not (x.stride(2) == 1 and apart):
        return "values of a head that are not adjacent, or heads or rows that overlap"
    if torch.is_grad_enabled():
        return "gradients that may need what is overwritten"
    return triton_refuses(x, cos)


_OP = register(
    "rotary",
    Backend("triton", triton_supports, _triton, _triton_refuses),
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("torch", anything, _torch),
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Turn every head of each row by the row's angles. May overwrite x: use the result.

    x: (N, H, D), D even, any float dtype and device; cos, sin: (N, D/2) of one dtype, in which
        the arithmetic is done ("triton", "cpu": in float32).
    backend: "auto", "triton" (CUDA, rows and heads that do not overlap, a head's values adjacent,
        gradients disabled), "cpu" (native: float32 or bfloat16 on the CPU, heads of a row packed,
        rows that do not overlap, gradients disabled) or "torch". The first two turn in place, one
        sweep instead of seven; "auto" takes them where it can.

    Returns (N, H, D) in x's dtype, in x's memory or its own.
    Raises ValueError on shapes that do not match and on tensors that a backend asked for by name
    does not take, RuntimeError on an unusable backend.
    """
    fits = x.dim() == 3 and x.shape[2] % 2 == 0
    require("rotary", "x", tuple(x.shape), fits, "(N, H, D), D even")
    expected = (x.shape[0], x.shape[2] // 2)
    for name, angles in (("cos", cos), ("sin", sin)):
        require("rotary", name, tuple(angles.shape), angles.shape == expected, f"{expected}")
    out: Tensor = _OP(x.device.type, backend, x, cos, sin)
    return out
