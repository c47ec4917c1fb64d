"""linear_int8: decoding steps and prefills; torch's product of float32 weights beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from op_cases import products
from op_cases.case import Build, Scale
from vtts_rt.ops.linear_int8 import linear_int8, linear_int8_ref, quantize_int8
from vtts_rt.ops.quantized import dequantize

SHAPES = {
    "cuda": ((1, 3584, 37888),),  # 7B's gate_up, which only torch runs there
    "cpu": products.BENCH_MODEL,
}


def _prepare(weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int, Tensor]:
    """Outputs of different sizes."""
    # Near each other: the error of one output says little beside torch's.
    sizes = torch.logspace(-0.5, 0.5, len(weight))[:, None].to(weight.device)
    weight8, scale = quantize_int8(sizes * weight)
    return (weight8, scale), weight8.numel(), dequantize(weight8, scale, dtype)


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """`products.cases` of the op."""
    return products.cases(device, scale, SHAPES, linear_int8, linear_int8_ref, _prepare)
