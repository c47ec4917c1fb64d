"""Cases of linear and linear_fp8: rows times a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later

Shape = tuple[int, int, int]  # rows, channels, outputs
CHECKS: tuple[Shape, ...] = (
    *((1, 1, 1), (1, 1030, 65), (3, 48, 33), (16, 130, 7), (17, 65, 129), (0, 8, 8)),
)
# The 118 M bench model's head, gate_up and down, alone, with drafts and in a prefill.
BENCH_MODEL: tuple[Shape, ...] = (
    *((rows, 512, 151936) for rows in (1, 9, 72)),
    *((rows, 512, 2816) for rows in (1, 9, 72, 1024)),
    (1, 1408, 512),
    (1024, 1408, 512),
)
# An op's name, its reference, its bits in the matrix's place and what torch multiplies instead:
# (O, C) float32 weights, dtype -> (operands, their bytes, the dense matrix of that dtype).
Prepare = Callable[[Tensor, torch.dtype], tuple[tuple[Tensor, ...], int, Tensor]]


def cases(
    device: str,
    scale: Scale,
    shapes: Mapping[str, Sequence[Shape]],
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    prepare: Prepare,
    about: str = "",
) -> Iterator[Build]:
    """At "check" scale rows that are not adjacent, with a bias and without.

    shapes: of "bench" scale by device. run, reference: take x, prepare's operands and a bias.
    about: behind the shapes in a case's name.
    """
    check = scale == "check"
    for shape in CHECKS if check else shapes[device]:
        for dtype in DTYPES if check else (bench_dtype(device),):
            for with_bias in (False, True) if check else (False,):
                how = (run, reference, prepare, about)
                yield _case(device, dtype, shape, with_bias, check, *how)


@built_later
def _case(
    device: str,
    dtype: torch.dtype,
    shape: Shape,
    with_bias: bool,
    check: bool,
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    prepare: Prepare,
    about: str,
) -> Case:
    rows, channels, outputs = shape
    generator = torch.Generator().manual_seed(rows * 7919 + channels)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = normal(rows, channels * (2 if check else 1)).to(device, dtype)[:, :channels]
    operands, num_bytes, dense = prepare(normal(outputs, channels).to(device), dtype)
    bias = normal(outputs).to(device, dtype) if with_bias else None
    return Case(
        name=f"{rows} x {channels} -> {outputs}{about}{', bias' if with_bias else ''}",
        dtype=dtype,
        run=lambda backend: (run(x, *operands, bias, backend=backend),),
        exact=lambda: (reference(x, *operands, bias),),
        eager=lambda: (F.linear(x, dense, bias),),
        num_bytes=num_bytes + (x.numel() + rows * outputs) * dtype.itemsize,
        num_flops=2 * rows * channels * outputs,
        without=("cpu",) if dtype is torch.bfloat16 and channels % 2 else (),
    )
