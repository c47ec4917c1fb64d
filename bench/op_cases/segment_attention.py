"""segment_attention: windows and whole pairs of a vision tower, q, k and v in one projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.segment_attention import Run, segment_attention, segment_attention_ref

# name: runs, heads, head dim
SHAPES: dict[str, dict[str, tuple[list[Run], int, int]]] = {
    "check": {
        "one row": ([Run(0, 1, 1)], 1, 1),
        "windows of 64, 32 and 4": ([Run(0, 3, 64), Run(192, 2, 32), Run(256, 1, 4)], 2, 80),
        "pairs of 131 and 70": ([Run(0, 2, 131), Run(262, 1, 70)], 2, 80),
        "empty, then 3 of 17": ([Run(0, 2, 0), Run(0, 3, 17)], 3, 12),
        "one of 65 x 128": ([Run(0, 1, 65)], 1, 128),
        "nothing": ([], 2, 8),
    },
    # A pass of 3,600 rows and a large pair (1008x560: 2,880 rows).
    "cuda": {
        "56 windows of 64": ([Run(0, 56, 64)], 16, 80),
        "256 windows of 64": ([Run(0, 256, 64)], 16, 80),
        "7 pairs of 480": ([Run(0, 7, 480)], 16, 80),
        "2 pairs of 2,880": ([Run(0, 2, 2880)], 16, 80),
        "a pair of 4,096": ([Run(0, 1, 4096)], 16, 80),
    },
    "cpu": {
        "15 windows of 64": ([Run(0, 15, 64)], 6, 64),
        "2 pairs of 480": ([Run(0, 2, 480)], 6, 64),
    },
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """Heads of a projection's output, so that rows are not adjacent."""
    dtypes = DTYPES if scale == "check" else (bench_dtype(device),)
    for name, shape in SHAPES[scale if scale == "check" else device].items():
        for dtype in dtypes:
            yield _case(name, device, dtype, *shape)


@built_later
def _case(
    name: str, device: str, dtype: torch.dtype, runs: list[Run], heads: int, dim: int
) -> Case:
    num_rows = sum(run.num * run.length for run in runs)
    generator = torch.Generator().manual_seed(num_rows + dim)
    qkv = 2 * torch.randn(num_rows, 3 * heads, dim, generator=generator)
    q, k, v = torch.split(qkv.to(device, dtype), heads, dim=1)

    def run(backend: str) -> tuple[Tensor]:
        return (segment_attention(q, k, v, runs, backend=backend),)

    def exact() -> tuple[Tensor]:
        return (segment_attention_ref(q.double(), k.double(), v.double(), runs),)

    return Case(
        name=f"{name}, {heads} x {dim}",
        dtype=dtype,
        run=run,
        exact=exact,
        eager=lambda: (segment_attention_ref(q, k, v, runs),),
        num_bytes=4 * q.numel() * dtype.itemsize,
        num_flops=4 * heads * dim * sum(run.num * run.length**2 for run in runs),
    )
