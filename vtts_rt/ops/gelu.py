"""gelu: the activation of vision towers, in the forms that models take.

    exact    out = x Phi(x), Phi being the normal distribution
    tanh     out = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    sigmoid  out = x / (1 + exp(-1.702 x))

Torch's operators compute what is left of a vector, or of a thread's share, by other functions: a
row's bits then depend on its company. The native kernel's do not.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register
from vtts_rt.types import require

Form = Literal["exact", "tanh", "sigmoid"]


def gelu_ref(x: Tensor, form: Form = "exact") -> Tensor:
    """The equation in float64: the yardstick of the backends."""
    x = x.double()
    if form == "exact":
        return x / 2 * torch.erfc(-x / math.sqrt(2))
    if form == "tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * torch.sigmoid(1.702 * x)


def _torch(x: Tensor, form: Form) -> Tensor:
    if form == "sigmoid":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


def _native(x: Tensor, form: Form) -> Tensor:
    from vtts_rt import _C

    out = x.new_empty(x.shape)
    num_rows, threads, dtype = x.shape[0], torch.get_num_threads(), native.STORAGE[x.dtype]
    _C.gelu(x.data_ptr(), num_rows, x.shape[1], form, out.data_ptr(), threads, "auto", dtype)
    return out


def _native_refuses(x: Tensor, form: Form) -> str | None:
    if x.dim() != 2 or not x.is_contiguous():
        return f"x of shape {tuple(x.shape)}, not contiguous (N, C)"
    return native.refusal(x, dtypes=native.STORAGE)


_OP = register(
    "gelu",
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("torch", anything, _torch),
)


def gelu(x: Tensor, form: Form = "exact", *, backend: str = "auto") -> Tensor:
    """The activation of every value.

    x: any float dtype, shape and device.
    backend: "auto", "cpu" (native: contiguous (N, C) float32 or bfloat16 on the CPU, no gradient
        wanted; a row's bits do not depend on other rows) or "torch".

    Returns the shape and dtype of x. Raises ValueError on another form and on a tensor that a
    backend asked for by name does not take, RuntimeError on an unusable backend.
    """
    require("gelu", "form", form, form in get_args(Form), f"one of {', '.join(get_args(Form))}")
    out: Tensor = _OP(x.device.type, backend, x, form)
    return out
