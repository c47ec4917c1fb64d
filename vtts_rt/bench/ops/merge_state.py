"""merge_state: halves of an attention result, some of them without keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vtts_rt.bench.ops.case import DTYPES, Case, Scale, bench_dtype
from vtts_rt.ops.merge_state import merge_state, merge_state_ref

SHAPES = {
    "check": ((1, 1, 1), (3, 5, 16), (7, 7, 80), (5, 2, 12), (2, 28, 128), (0, 4, 8)),
    "bench": ((1, 28, 128), (16, 28, 128), (4096, 28, 128), (4096, 16, 128)),  # 7B, 3B
}


def cases(device: str, scale: Scale) -> Iterator[Case]:
    """Rows x heads x head dim; at "check" scale rows that are not adjacent, and NaN where a part
    has no keys."""
    for shape in SHAPES[scale]:
        for dtype in DTYPES if scale == "check" else (bench_dtype(device),):
            yield _case(device, dtype, shape, scale == "check")


def _case(device: str, dtype: torch.dtype, shape: tuple[int, int, int], check: bool) -> Case:
    rows, heads, dim = shape
    generator = torch.Generator().manual_seed(rows * 7919 + heads * 31 + dim)
    step = 2 if check else 1
    parts = []
    for number in range(2):
        out = torch.randn(step * rows, heads, dim, generator=generator)[::step]
        lse = 5 * torch.randn(step * rows, heads, generator=generator)[::step]
        if check:
            empty = torch.arange(rows * heads).view(rows, heads) % 7 <= 2 * number
            lse, out = (
                lse.masked_fill(empty, -torch.inf),
                out.masked_fill(empty[..., None], torch.nan),
            )
        parts += [out.to(device, dtype), lse.to(device)]
    out_a, lse_a, out_b, lse_b = parts
    return Case(
        name=f"{rows} x {heads} x {dim}",
        dtype=dtype,
        run=lambda backend: merge_state(*parts, backend=backend),
        exact=lambda: merge_state_ref(*(x.double() for x in parts)),
        eager=lambda: merge_state(*parts, backend="reference"),
        num_bytes=rows * heads * (3 * dim * dtype.itemsize + 12),
        num_flops=rows * heads * 3 * dim,
    )
