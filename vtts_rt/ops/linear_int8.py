"""linear_int8: rows times a matrix of bytes, a quarter of the bytes of float32.

    out[n, o] = scale[o] * sum_c x[n, c] * weight[o, c] + bias[o]

Rows and sums stay in float32: the only error beside that of `linear` is the rounding of the
weights, once. For a few rows the weights' bytes are the cost of a product, and the native kernel
reads them in place; for many it is arithmetic, and it turns them into float32 a panel at a time.

A row's values are the same to the bit whatever other rows stand beside it and however many threads
run, among up to MAX_ROWS rows and among more.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, register
from vtts_rt.ops.quantized import check_arguments, exact_product, product_in_parts, scale_of
from vtts_rt.types import require

LARGEST = 127.0  # -128 is not used: weights are symmetric


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest weights in bytes, each output's largest at 127.

    weight: (O, C) any float dtype, finite. Returns (weight8 (O, C) int8, scale (O,) float32):
    weight is about scale[:, None] * weight8, off by at most half a scale.
    """
    scale = scale_of("quantize_int8", weight, LARGEST)
    return (weight.detach().float() / scale[:, None]).round().to(torch.int8), scale


def linear_int8_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The equation in float64: the yardstick of the backends. Returns (..., O) float64."""
    return exact_product(x, weight, scale, bias)


def _native(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from vtts_rt import _C

    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _C.linear_int8(
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *rows.shape,
        weight.shape[0],
        torch.get_num_threads(),
    )
    return out


_OP = register(
    "linear_int8",
    Backend("cpu", native.supports, _native),
    Backend("torch", lambda device: None, product_in_parts),
)


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x (scale weight)^T + bias.

    x: (..., C) any float dtype; weight: (O, C) int8; scale: (O,) float32; bias: (O,) of x's dtype
    or None; all on one device, all but x contiguous. See `quantize_int8`.
    backend: "auto", "cpu" (native: float32 on the CPU, no gradient wanted) or "torch" (turns the
        weights into x's dtype, a part at a time). "auto" takes the native one where it can, for
        more than MAX_ROWS rows only with AVX-512 on a processor that is not Intel's.

    Returns (..., O) in x's dtype.
    Raises ValueError on shapes, dtypes or devices that do not match and on rows that a backend
    asked for by name does not take, RuntimeError on an unusable backend.
    """
    check_arguments("linear_int8", x, weight, scale, bias, torch.int8)
    run = _OP.resolve(x.device.type, backend).run
    num_rows = math.prod(x.shape[:-1])
    if run is _native and (refusal := native.refusal(x)) is not None:
        rule = f"what backend {backend!r} takes"
        require("linear_int8", "x", refusal, backend == "auto", rule)
        run = product_in_parts
    elif run is _native and backend == "auto" and num_rows > native.most_rows("linear_int8"):
        run = product_in_parts
    out: Tensor = run(x, weight, scale, bias)
    return out
