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
from torch.nn import functional as F

from vtts_rt.ops.dispatch import Backend, register, triton_supports
from vtts_rt.types import require

LARGEST = 448.0  # of e4m3: torch.finfo(torch.float8_e4m3fn).max
# With more rows "auto" decodes for cuBLAS, whose tiles then gain more than writing and reading the
# decoded weights costs. An estimate, not a measurement.
MANY_ROWS = 256
_WEIGHTS_AT_ONCE = 1 << 25  # decoded: 64 MB of bfloat16


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest e4m3 weights, each output's largest at 448.

    weight: (O, C) any float dtype, finite. Returns (weight8 (O, C) float8_e4m3fn, scale (O,)
    float32): weight is about scale[:, None] * weight8, off by at most a 16th of a value, or by
    scale * 2^-10 where that is more.
    """
    require("quantize_fp8", "weight", tuple(weight.shape), weight.dim() == 2, "(O, C)")
    wide = weight.detach().float()
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    finite = bool(largest.isfinite().all())
    require("quantize_fp8", "weight", "infinity or NaN", finite, "finite")
    # A row too small for its scale to be a normal float32 becomes zeros.
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale[:, None]).to(torch.float8_e4m3fn), scale


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, C) float8_e4m3fn and (O,) float32 -> (O, C) in `dtype`, rounded once."""
    return (weight.to(scale.dtype) * scale[:, None]).to(dtype)


def linear_fp8_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The equation in float64: the yardstick of the backends. Returns (..., O) float64."""
    out = x.double() @ dequantize_fp8(weight, scale.double(), torch.float64).T
    return out if bias is None else out + bias.double()


def _torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    step = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    parts = [
        F.linear(
            x,
            dequantize_fp8(weight[start : start + step], scale[start : start + step], x.dtype),
            None if bias is None else bias[start : start + step],
        )
        for start in range(0, weight.shape[0], step)
    ]
    if not parts:
        return x.new_empty(*x.shape[:-1], 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


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
    Backend("torch", lambda device: None, _torch),
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
    fits = weight.dim() == 2 and weight.dtype is torch.float8_e4m3fn and weight.is_contiguous()
    got = (*weight.shape, weight.dtype)
    require("linear_fp8", "weight", got, fits, "(O, C) float8_e4m3fn, contiguous")
    num_outputs, num_channels = weight.shape
    fits = x.dim() >= 1 and x.shape[-1] == num_channels and x.is_floating_point()
    require("linear_fp8", "x", (*x.shape, x.dtype), fits, f"(..., {num_channels}) of floats")
    for name, tensor, dtype in (("scale", scale, torch.float32), ("bias", bias, x.dtype)):
        if tensor is not None:
            fits = tensor.shape == (num_outputs,) and tensor.dtype is dtype
            rule = f"({num_outputs},) {dtype}, contiguous"
            got = (*tensor.shape, tensor.dtype)
            require("linear_fp8", name, got, fits and tensor.is_contiguous(), rule)
    devices = {str(t.device) for t in (x, weight, scale, bias) if t is not None}
    require("linear_fp8", "devices", sorted(devices), len(devices) == 1, "one device")
    run = _OP.resolve(x.device.type, backend).run
    if run is _triton and (refusal := _triton_refusal(x)) is not None:
        require("linear_fp8", "x", refusal, backend == "auto", f"what backend {backend!r} takes")
        run = _torch
    elif run is _triton and backend == "auto" and x.numel() > MANY_ROWS * num_channels:
        run = _torch
    out: Tensor = run(x, weight, scale, bias)
    return out
