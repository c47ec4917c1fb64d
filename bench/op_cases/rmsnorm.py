"""rmsnorm: rows of the language model and of the vision tower, with and without a residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.rmsnorm import rmsnorm

SHAPES = {
    "check": ((1, 1), (3, 5), (7, 128), (5, 257), (2, 1536), (0, 8)),
    "bench": ((1, 3584), (16, 3584), (4096, 3584), (4096, 2048), (16384, 1280)),  # 7B, 3B, tower
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """Rows x features; at "check" scale rows that are not adjacent."""
    step = 2 if scale == "check" else 1
    dtypes = DTYPES if scale == "check" else (bench_dtype(device),)
    for rows, features in SHAPES[scale]:
        for dtype in dtypes:
            for with_residual in (False, True):
                yield _case(device, dtype, rows, features, with_residual, step)


@built_later
def _case(
    device: str, dtype: torch.dtype, rows: int, features: int, with_residual: bool, step: int
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + features)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = (3 * normal(rows * step, features)).to(device, dtype)[::step]
    weight = (1 + 0.1 * normal(features)).to(device, dtype)
    residual = normal(rows * step, features).to(device, dtype)[::step] if with_residual else None
    # The sum is rounded before it is normalised: the equation starts from what later layers see.
    total = x if residual is None else x + residual

    def exact() -> tuple[torch.Tensor, ...]:
        wide = total.double()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
        return y, wide

    return Case(
        name=f"{rows} x {features}{', residual' if with_residual else ''}",
        dtype=dtype,
        run=lambda backend: rmsnorm(x, weight, residual=residual, backend=backend),
        exact=exact,
        eager=lambda: rmsnorm(x, weight, residual=residual, backend="reference"),
        num_bytes=x.numel() * dtype.itemsize * (4 if with_residual else 2),
    )
