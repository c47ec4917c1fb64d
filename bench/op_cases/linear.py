"""linear: decoding steps and prefills; torch's own product is the other backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from op_cases import products
from op_cases.case import Build, Scale
from vtts_rt.ops.linear import linear, linear_ref

SHAPES = {
    "cuda": ((1, 3584, 37888), (256, 3584, 37888), (1, 3584, 3584)),  # 7B's gate_up and o_proj
    "cpu": products.BENCH_MODEL,
}


def _prepare(weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int, Tensor]:
    dense = weight.to(dtype)
    return (dense,), dense.numel() * dtype.itemsize, dense


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """`products.cases` of the op."""
    return products.cases(device, scale, SHAPES, linear, linear_ref, _prepare)
