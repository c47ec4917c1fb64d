"""rotary: heads of the language model and of the vision tower."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.rotary import rotary, rotary_ref

# Rows, heads, head dim. On a GPU a tower's, and queries and keys of 7B; on a CPU those of the 118 M
# bench model.
SHAPES = {
    "check": ((1, 1, 2), (3, 5, 6), (2, 9, 80), (7, 4, 64), (0, 2, 8)),
    "cuda": ((16384, 32, 80), (4096, 32, 128)),
    "cpu": ((1, 10, 64), (2048, 10, 64)),
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale heads that share their rows with others; angles in float32 too."""
    dtypes = DTYPES if scale == "check" else (bench_dtype(device),)
    for rows, heads, dim in SHAPES["check" if scale == "check" else device]:
        for dtype in dtypes:
            for angles in sorted({dtype, torch.float32}, key=str):
                yield _case(device, dtype, angles, rows, heads, dim, 3 if scale == "check" else 0)


@built_later
def _case(
    device: str,
    dtype: torch.dtype,
    angles: torch.dtype,
    rows: int,
    heads: int,
    dim: int,
    extra: int,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + heads * 31 + dim)
    whole = torch.randn(rows, heads + extra, dim, generator=generator).to(device, dtype)
    turns = 100 * torch.randn(rows, dim // 2, generator=generator)
    cos, sin = turns.cos().to(device, angles), turns.sin().to(device, angles)

    copies: dict[str, torch.Tensor] = {}

    def run(backend: str) -> tuple[torch.Tensor, ...]:
        """What was turned, in place or not, and what stands beside it, which stays. A bench turns
        the same copy again and again."""
        if extra or backend not in copies:
            copies[backend] = whole.clone()
        x = copies[backend]
        return rotary(x[:, :heads], cos, sin, backend=backend), x[:, heads:]

    return Case(
        name=f"{rows} x {heads} x {dim}, angles {str(angles).removeprefix('torch.')}",
        dtype=dtype,
        run=run,
        exact=lambda: (rotary_ref(whole[:, :heads], cos, sin), whole[:, heads:]),
        eager=lambda: (rotary(whole[:, :heads], cos, sin, backend="torch"), whole[:, heads:]),
        num_bytes=2 * rows * heads * dim * dtype.itemsize,
        num_flops=3 * rows * heads * dim,
    )
