"""linear: decoding steps and prefills, weights packed on a CPU; torch's own product beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from op_cases import products
from op_cases.case import Build, Scale
from vtts_rt.ops.linear import linear, linear_ref, packs, quantize_int8
from vtts_rt.ops.packed import Matrix, pack
from vtts_rt.ops.quantized import dequantize

SHAPES = {
    "cuda": ((1, 3584, 37888), (256, 3584, 37888), (1, 3584, 3584)),  # 7B's gate_up and o_proj
    "cpu": products.BENCH_MODEL,
}


def _dense(weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Matrix, ...], int, Tensor]:
    dense = weight.to(dtype)
    return _packed(Matrix.of(dense)), dense.numel() * dtype.itemsize, dense


def _int8(weight: Tensor, dtype: torch.dtype) -> tuple[tuple[Matrix, ...], int, Tensor]:
    """Outputs of different sizes."""
    # Near each other: the error of one output says little beside torch's.
    sizes = torch.logspace(-0.5, 0.5, len(weight))[:, None].to(weight.device)
    matrix = Matrix.of(*quantize_int8(sizes * weight))
    assert matrix.scale is not None
    dense = dequantize(matrix.tensor, matrix.scale, dtype)
    return _packed(matrix), matrix.tensor.numel(), dense


def _packed(matrix: Matrix) -> tuple[Matrix, ...]:
    return (matrix._replace(tensor=pack(matrix.tensor)) if packs(matrix) else matrix,)


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """`products.cases` of the op, and again with int8 weights."""
    yield from products.cases(device, scale, SHAPES, linear, linear_ref, _dense)
    yield from products.cases(device, scale, SHAPES, linear, linear_ref, _int8, " of int8")
