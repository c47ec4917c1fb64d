"""linear_fp8: rows times a matrix of 8-bit floats, half the bytes of bfloat16.

    out[n, o] = scale[o] * sum_c x[n, c] * weight[o, c] + bias[o]

Weights are e4m3 (float8_e4m3fn: 3 bits of mantissa, largest 448) with a scale for each output, rows
keep their type. For a few rows the weights' bytes are the cost of a product; for many it is
arithmetic, and the weights are turned back into x's type, a part at a time, for cuBLAS.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops.dispatch import Backend, anything, register, triton_refuses, triton_supports
from vtts_rt.ops.native import rows_of
from vtts_rt.ops.quantized import check_arguments, exact_product, product_in_parts, scaled

LARGEST = 448.0  # of e4m3: torch.finfo(torch.float8_e4m3fn).max
# With more rows "auto" decodes for cuBLAS, whose tiles then gain more than writing and reading the
# decoded weights costs. An estimate, not a measurement.
MANY_ROWS = 256

linear_fp8_ref = exact_product


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 weights, each output's largest at 448.

    weight: (O, C) any float dtype, finite. Returns (weight8 (O, C) float8_e4m3fn, scale (O,)
    float32): weight is about scale[:, None] * weight8, off by at most a 16th of a value, or by
    scale * 2^-10 where that is more.
    """
    wide, scale = scaled("quantize_fp8", weight, LARGEST)
    return wide.to(torch.float8_e4m3fn), scale


def _triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from vtts_rt.kernels import linear_fp8 as kernel

    out: Tensor = kernel.linear_fp8(rows_of(x), weight.view(torch.uint8), scale, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _leaves(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    return "many rows" if x.numel() > MANY_ROWS * weight.shape[1] else None


_OP = register(
    "linear_fp8",
    Backend("triton", triton_supports, _triton, lambda x, *_: triton_refuses(x), _leaves),
    Backend("torch", anything, product_in_parts),
)


def linear_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x (scale weight)^T + bias.

    x: (..., C) any float dtype; weight: (O, C) float8_e4m3fn; scale: (O,) float32; bias: (O,) of
    x's dtype or None; all on one device, all but x contiguous. See `quantize_fp8`.
    backend: "auto", "triton" (CUDA, no gradient wanted: one read of the 8-bit weights; "auto" takes
        it up to MANY_ROWS rows) or "torch" (decodes them, a part at a time).

    Returns (..., O) in x's dtype.
    Raises ValueError on shapes, dtypes or devices that do not match and on rows that a backend
    asked for by name does not take, RuntimeError on an unusable backend.
    """
    check_arguments("linear_fp8", x, weight, scale, bias, torch.float8_e4m3fn)
    out: Tensor = _OP(x.device.type, backend, x, weight, scale, bias)
    return out
