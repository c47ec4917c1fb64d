"""swiglu: hidden channels of the language models and of the vision tower."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.swiglu import swiglu, swiglu_ref

# Rows, hidden channels: 7B and 3B, the tower of both; on a CPU the 118 M bench model.
SHAPES = {
    "check": ((1, 1), (3, 5), (2, 1027), (7, 64), (0, 8)),
    "cuda": ((1, 18944), (16, 18944), (4096, 18944), (4096, 11008), (16384, 3420)),
    "cpu": ((1, 1408), (16, 1408), (2048, 1408)),
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """Rows x hidden; at "check" scale rows that are not adjacent, and gates of any size."""
    check = scale == "check"
    for rows, hidden in SHAPES["check" if check else device]:
        for dtype in DTYPES if check else (bench_dtype(device),):
            for size in (1.0, 60.0) if check else (1.0,):
                yield _case(device, dtype, rows, hidden, size, 2 if check else 1)


@built_later
def _case(device: str, dtype: torch.dtype, rows: int, hidden: int, size: float, step: int) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + hidden)
    x = size * torch.randn(rows * step, 2 * hidden, generator=generator)
    x = x.to(device, dtype)[::step]
    return Case(
        name=f"{rows} x {hidden}, gates about {size:g}",
        dtype=dtype,
        run=lambda backend: (swiglu(x, backend=backend),),
        exact=lambda: (swiglu_ref(x),),
        eager=lambda: (swiglu(x, backend="torch"),),
        num_bytes=3 * rows * hidden * dtype.itemsize,
        num_flops=5 * rows * hidden,
        without=("cpu",) if step > 1 and rows > 1 else (),
    )
