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

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register
from vtts_rt.ops.quantized import check_arguments, exact_product, product_in_parts, scaled

LARGEST = 127.0  # -128 is not used: weights are symmetric

linear_int8_ref = exact_product


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest weights in bytes, each output's largest at 127.

    weight: (O, C) any float dtype, finite. Returns (weight8 (O, C) int8, scale (O,) float32):
    weight is about scale[:, None] * weight8, off by at most half a scale.
    """
    wide, scale = scaled("quantize_int8", weight, LARGEST)
    return wide.round().to(torch.int8), scale


def _native(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from vtts_rt import _C

    rows = native.rows_of(x)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _C.linear_int8(
        *(rows.data_ptr(), rows.stride(0), weight.data_ptr(), scale.data_ptr()),
        *(native.address(bias), out.data_ptr(), *rows.shape, weight.shape[0]),
        torch.get_num_threads(),
    )
    return out


_OP = register(
    "linear_int8",
    Backend(
        "cpu",
        native.supports,
        _native,
        lambda x, *_: native.refusal(x),
        lambda x, *_: native.slow_tiles(x.numel() // max(1, x.shape[-1])),
    ),
    Backend("torch", anything, product_in_parts),
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
    out: Tensor = _OP(x.device.type, backend, x, weight, scale, bias)
    return out
