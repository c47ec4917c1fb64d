"""Helpers of products with 8-bit weights: weight is about scale[:, None] * weight8.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.types import require

_WEIGHTS_AT_ONCE = 1 << 25  # dequantized: 64 MB of bfloat16


def scaled(op: str, weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Weights of which each output's largest is `largest`, (O, C) float32, and the scale of each
    output, (O,) float32, by which they were divided.

    weight: (O, C) any float dtype. Raises ValueError unless it is finite.
    """
    require(op, "weight", tuple(weight.shape), weight.dim() == 2, "(O, C)")
    wide = weight.detach().float()
    most = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    require(op, "weight", "infinity or NaN", bool(most.isfinite().all()), "finite")
    # A row too small for its scale to be a normal float32 becomes zeros.
    scale = (most / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return wide / scale[:, None], scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(O, C) of 8 bits and (O,) float32 -> (O, C) in `dtype`, rounded once."""
    return (weight.to(scale.dtype) * scale[:, None]).to(dtype)


def exact_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (scale weight)^T + bias in float64: the yardstick of the backends. Returns (..., O)."""
    out = x.double() @ dequantize(weight, scale.double(), torch.float64).T
    return out if bias is None else out + bias.double()


def product_in_parts(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product by torch, of weights turned into x's dtype a part at a time."""
    step = max(1, _WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    parts = [
        F.linear(
            x,
            dequantize(weight[start : start + step], scale[start : start + step], x.dtype),
            None if bias is None else bias[start : start + step],
        )
        for start in range(0, max(1, weight.shape[0]), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def check_arguments(
    op: str,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_dtype: torch.dtype,
) -> None:
    """ValueError unless x is (..., C) of floats, weight (O, C) of its dtype, scale (O,) float32,
    bias (O,) of x's dtype, all on one device and all but x contiguous."""
    fits = weight.dim() == 2 and weight.dtype is weight_dtype and weight.is_contiguous()
    got = (*weight.shape, weight.dtype)
    rule = f"(O, C) {str(weight_dtype).removeprefix('torch.')}, contiguous"
    require(op, "weight", got, fits, rule)
    num_outputs, num_channels = weight.shape
    fits = x.dim() >= 1 and x.shape[-1] == num_channels and x.is_floating_point()
    require(op, "x", (*x.shape, x.dtype), fits, f"(..., {num_channels}) of floats")
    for name, tensor, dtype in (("scale", scale, torch.float32), ("bias", bias, x.dtype)):
        if tensor is not None:
            fits = tensor.shape == (num_outputs,) and tensor.dtype is dtype
            rule = f"({num_outputs},) {dtype}, contiguous"
            got = (*tensor.shape, tensor.dtype)
            require(op, name, got, fits and tensor.is_contiguous(), rule)
    devices = {str(t.device) for t in (x, weight, scale, bias) if t is not None}
    require(op, "devices", sorted(devices), len(devices) == 1, "one device")
