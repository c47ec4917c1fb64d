"""LinearFp8: a layer whose weights are 8-bit floats, made from a trained one."""

from __future__ import annotations

from torch import Tensor, nn

from vtts_rt.ops.linear_fp8 import linear_fp8, quantize_fp8


class LinearFp8(nn.Module):
    """`models.layers.Linear` with e4m3 weights and a scale for each output; no training.

    weight: (O, C) float8_e4m3fn; scale: (O,) float32; bias: (O,) or None. `.to(dtype)` must not
    reach these buffers: quantize after a model has its dtype.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: (O, C), bias: (O,), any float dtype."""
        super().__init__()
        weight8, scale = quantize_fp8(weight)
        self.register_buffer("weight", weight8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., O)."""
        return linear_fp8(x, self.weight, self.scale, self.bias)


def quantize_linears_fp8(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside `module` by a LinearFp8, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LinearFp8(child.weight, child.bias))
        else:
            quantize_linears_fp8(child)
