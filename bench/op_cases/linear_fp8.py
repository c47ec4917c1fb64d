"""linear_fp8: decoding steps and prefills; torch's product of bfloat16 weights beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from op_cases import products
from op_cases.case import Build, Scale
from vtts_rt.ops.linear_fp8 import linear_fp8, linear_fp8_ref, quantize_fp8
from vtts_rt.ops.quantized import dequantize

# 7B's gate_up, o_proj and down, 3B's gate_up; on a CPU the 118 M bench model's gate_up.
SHAPES = {
    "cuda": (
        *((rows, 3584, 37888) for rows in (1, 8, 16, 64, 256, 2048)),
        (1, 3584, 3584),
        (1, 18944, 3584),
        (1, 2048, 22016),
    ),
    "cpu": ((1, 512, 2816), (16, 512, 2816), (512, 512, 2816)),
}


def _prepare(weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int, Tensor]:
    """Outputs of different sizes."""
    sizes = torch.logspace(-3, 3, len(weight))[:, None].to(weight.device)
    weight8, scale = quantize_fp8(sizes * weight)
    return (weight8, scale), weight8.numel(), dequantize(weight8, scale, dtype)


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """`products.cases` of the op."""
    return products.cases(device, scale, SHAPES, linear_fp8, linear_fp8_ref, _prepare)
