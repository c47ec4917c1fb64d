"""linear_fp8: rows times a matrix of 8-bit floats, half the bytes of bfloat16.

    out[n, o] = scale[o] * sum_c x[n, c] * weight[o, c] + bias[o]

Weights are e4m3 (float8_e4m3fn: 3 bits of mantissa, largest 448) with a scale for each output, rows
keep their type. For a few rows the weights' bytes are the cost of a product; for many it is
arithmetic, and the weights are turned back into x's type, a part at a time, for cuBLAS.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtts_rt.ops.dispatch import Backend, register, triton_supports
from vtts_rt.ops.quantized import check_arguments, exact_product, product_in_parts, scale_of
from vtts_rt.types import require

LARGEST = 448.0  # of e4m3: torch.finfo(torch.float8_e4m3fn).max
# With more rows "auto" decodes for cuBLAS, whose tiles then gain more than writing and reading the
# decoded weights costs. An estimate, not a measurement.
MANY_ROWS = 256


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 weights, each output's largest at 448.

    weight: (O, C) any float dtype, finite. Returns (weight8 (O, C) float8_e4m3fn, scale (O,)
    float32): weight is about scale[:, None] * weight8, off by at most a 16th of a value, or by
    scale * 2^-10 where that is more.
    """
    scale = scale_of("quantize_fp8", weight, LARGEST)
    return (weight.detach().float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def linear_fp8_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The equation in float64: the yardstick of the backends. Returns (..., O) float64."""
    return exact_product(x, weight, scale, bias)


def _triton(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from vtts_rt.kernels import linear_fp8 as kernel

    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out: Tensor = kernel.linear_fp8(rows, weight.view(torch.uint8), scale, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _triton_refusal(x: Tensor) -> str | None:
    """Why the Triton kernel cannot take these rows, or None."""
    if torch.is_grad_enabled() and x.requires_grad:
        return "a tensor that needs a gradient"
    return "float64, where sums are in float32" if x.dtype is torch.float64 else None


_OP = register(
    "linear_fp8",
    Backend("triton", triton_supports, _triton),
    Backend("torch", lambda device: None, product_in_parts),
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
    run = _OP.resolve(x.device.type, backend).run
    if run is _triton and (refusal := _triton_refusal(x)) is not None:
        require("linear_fp8", "x", refusal, backend == "auto", f"what backend {backend!r} takes")
        run = product_in_parts
    elif run is _triton and backend == "auto" and x.numel() > MANY_ROWS * weight.shape[1]:
        run = product_in_parts
    out: Tensor = run(x, weight, scale, bias)
    return out
