"""swiglu: the gate of a gated MLP.

    out[n, i] = silu(x[n, i]) * x[n, I + i],   silu(a) = a / (1 + exp(-a))

Legend: N rows, I hidden channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_refuses, triton_supports
from vtts_rt.types import require


def swiglu_ref(x: Tensor) -> Tensor:
    """The equation in float64: the yardstick of the backends. (..., 2 I) -> (..., I) float64."""
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def _torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _native(x: Tensor) -> Tensor:
    from vtts_rt import _C

    num_rows, num_hidden = x.shape[0], x.shape[1] // 2
    out = x.new_empty((num_rows, num_hidden))
    threads, dtype = torch.get_num_threads(), native.STORAGE[x.dtype]
    _C.swiglu(x.data_ptr(), num_rows, num_hidden, out.data_ptr(), threads, "auto", dtype)
    return out


def _triton(x: Tensor) -> Tensor:
    from vtts_rt.kernels import swiglu as kernel

    out: Tensor = kernel.swiglu(native.rows_of(x).contiguous())
    return out.view(*x.shape[:-1], out.shape[-1])


def _native_refuses(x: Tensor) -> str | None:
    if x.dim() != 2 or not x.is_contiguous():
        return f"x of shape {tuple(x.shape)}, not contiguous (N, 2 I)"
    return native.refusal(x, dtypes=native.STORAGE)


_OP = register(
    "swiglu",
    Backend("triton", triton_supports, _triton, triton_refuses),
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("torch", anything, _torch),
)


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up of rows [gate; up].

    x: (..., 2 I), any float dtype and device.
    backend: "auto", "triton" (CUDA, no gradient wanted), "cpu" (native: contiguous (N, 2 I)
        float32 or bfloat16 on the CPU, no gradient wanted; a row's bits do not depend on other
        rows) or "torch". "auto" takes the first two where it can: one pass instead of three
        operators.

    Returns (..., I) in x's dtype.
    Raises ValueError on an odd number of channels and on a tensor that a backend asked for by
    name does not take, RuntimeError on an unusable backend.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        require("swiglu", "x", tuple(x.shape), False, "(..., 2 I)")
    out: Tensor = _OP(x.device.type, backend, x)
    return out
