"""linear: rows times a matrix of weights.

    out[n, o] = sum_c x[n, c] * weight[o, c] + bias[o]

Few rows (decoding): the cost is reading the weights. MKL reads them again for every few rows: a
head of 151,936 x 512 took 24 ms with one row, 48 with four and 75 with eight (float32, one AVX2
core); the native kernel takes 20, 23 and 28 ms.

Many rows (prefill, vision tower): the cost is arithmetic. MKL does not run AVX-512 on processors
that are not Intel's; the native kernel does, and is 0.95 to 1.65 times as fast at the shapes of the
bench model (bench/bench_phases.py, two cores of an AMD EPYC). Elsewhere torch is left in place.

A row's values are the same to the bit whatever other rows stand beside it and however many threads
run, among up to MAX_ROWS rows and among more.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register
from vtts_rt.types import require


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The equation in float64: the yardstick of the backends. Returns (N, O) float64."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from vtts_rt import _C

    x = native.adjacent(x)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    _C.linear(
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), native.address(bias), out.data_ptr()),
        *(*x.shape, weight.shape[0]),
        torch.get_num_threads(),
    )
    return out


def _native_refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dim() != 2:
        return f"x of shape {tuple(x.shape)}, not (N, C)"
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return "a weight or bias that is not contiguous"
    return native.refusal(x, weight, bias)


_OP = register(
    "linear",
    Backend(
        "cpu",
        native.supports,
        _native,
        _native_refuses,
        lambda x, *_: native.slow_tiles(x.shape[0]),
    ),
    Backend("torch", anything, F.linear),
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x weight^T + bias.

    x: (..., C); weight: (O, C); bias: (O,) or None; one float dtype and device.
    backend: "auto", "cpu" (native: (N, C) float32 on the CPU, weight and bias contiguous, no
        gradient wanted) or "torch". "auto" takes the native one where it can, for more than
        MAX_ROWS rows only with AVX-512 on a processor that is not Intel's.

    Returns (..., O) in x's dtype.
    Raises ValueError on shapes that do not match and on tensors that a backend asked for by name
    does not take, RuntimeError on an unusable backend.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        require("linear", "x", tuple(x.shape), False, f"(..., C) for weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        require("linear", "bias", tuple(bias.shape), False, f"{tuple(weight.shape[:1])}")
    out: Tensor = _OP(x.device.type, backend, x, weight, bias)
    return out
