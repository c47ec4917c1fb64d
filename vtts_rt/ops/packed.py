"""Matrices in the order in which native products read them.

A weight (O, C) is cut into panels of 16 outputs, each as [channel][output], so that a vector of
outputs lies together: (ceil(O / 16), C / k, 16, k), outputs filled up with zeros. k channels of an
output stand side by side: 2 of bfloat16, as AVX512_BF16 and AMX multiply them, else 1.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.types import require

PANEL = 16  # csrc/core/product_kernels.h, kPanel


class Matrix(NamedTuple):
    """A weight of products, packed or not.

    tensor: (O, C), or packed (ceil(O / 16), C / k, 16, k). num_outputs: O. scale: (O,) float32,
    what 8-bit weights are multiplied by, or None.
    """

    tensor: Tensor
    num_outputs: int
    scale: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None = None) -> Matrix:
        """Of a weight (O, C)."""
        require("Matrix", "weight", tuple(weight.shape), weight.dim() == 2, "(O, C)")
        return cls(weight, len(weight), scale)

    @property
    def packed(self) -> bool:
        return self.tensor.dim() == 4

    @property
    def shape(self) -> tuple[int, int]:
        """(O, C)."""
        return self.num_outputs, self.tensor.shape[1] * (self.tensor.shape[3] if self.packed else 1)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    @property
    def weight_dtype(self) -> str:
        """Name of the dtype, as native products take it."""
        return str(self.tensor.dtype).removeprefix("torch.")

    def plain(self) -> Tensor:
        """(O, C), a copy of what is packed; differentiable."""
        return unpack(self.tensor, self.num_outputs) if self.packed else self.tensor

    def rows(self, index: Tensor) -> Tensor:
        """Outputs `index` (N,) int64 of a packed matrix: (N, C)."""
        inside = not index.numel() or (
            int(index.min()) >= 0 and int(index.max()) < self.num_outputs
        )
        require("Matrix", "index", index.tolist(), inside, f"in [0, {self.num_outputs})")
        found = _units(self.tensor)[index // PANEL, :, index % PANEL].flatten(-2)
        return found if found.dtype is self.tensor.dtype else found.view(self.tensor.dtype)


def channels_together(dtype: torch.dtype) -> int:
    """k."""
    return 2 if dtype is torch.bfloat16 else 1


def _units(packed: Tensor) -> Tensor:
    """Where no gradient is wanted, pairs of 16 bits as one number each: copied 3 times as fast."""
    differentiable = torch.is_grad_enabled() and packed.requires_grad
    pairs = packed.shape[3] == 2 and packed.element_size() == 2 and not differentiable
    return packed.view(torch.int32) if pairs else packed


def pack(weight: Tensor) -> Tensor:
    """(O, C) -> (ceil(O / 16), C / k, 16, k), contiguous, no gradient. C is a multiple of k."""
    num_channels, together = weight.shape[1], channels_together(weight.dtype)
    even = num_channels % together == 0
    require("pack", "weight", tuple(weight.shape), even, f"(O, C) with C a multiple of {together}")
    weight = weight.detach().contiguous()
    if weight.storage_offset() % together:
        weight = weight.clone()
    if missing := -len(weight) % PANEL:
        weight = F.pad(weight, (0, 0, 0, missing))
    panels = weight.view(len(weight) // PANEL, PANEL, num_channels // together, together)
    units = _units(panels)
    lines = units.transpose(1, 2)
    packed = torch.empty_like(lines, memory_format=torch.contiguous_format)
    # A head of 151,936 x 512 in bfloat16 then takes two cores 4.8 ms instead of 5.5 with one row.
    native.prefer_huge_pages(packed)
    return packed.copy_(lines).view(weight.dtype)


def unpack(packed: Tensor, num_outputs: int) -> Tensor:
    """(ceil(O / 16), C / k, 16, k) of any dtype -> (O, C), contiguous; differentiable."""
    units = _units(packed)
    panels, steps, _, together = units.shape
    plain = units.transpose(1, 2).contiguous().view(panels * PANEL, steps * together)
    return (plain if units is packed else plain.view(packed.dtype))[:num_outputs]
