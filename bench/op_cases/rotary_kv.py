"""rotary_kv: a decoding step's rows and a prefill's, with pages in any order and padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.rotary_kv import rotary_kv, rotary_kv_ref

# Rows, query heads, key/value heads, head dim: 3B has 16 and 2 of 128, 7B 28 and 4, the 118 M bench
# model (on a CPU) 8 and 2 of 64.
SHAPES = {
    "check": ((1, 1, 1, 2), (3, 6, 2, 16), (5, 7, 1, 80), (11, 3, 3, 64), (0, 2, 1, 8)),
    "cuda": ((1, 28, 4, 128), (16, 28, 4, 128), (4096, 28, 4, 128), (4096, 16, 2, 128)),
    "cpu": ((1, 8, 2, 64), (2048, 8, 2, 64)),
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale rows that are not adjacent, rows of padding, and pools of other dtypes."""
    check = scale == "check"
    dtypes = DTYPES if check else (bench_dtype(device),)
    for rows, heads, kv_heads, dim in SHAPES["check" if check else device]:
        for dtype in dtypes:
            yield _case(device, dtype, dtype, rows, heads, kv_heads, dim, check)
    if check:
        yield _case(device, torch.bfloat16, torch.float32, 4, 5, 2, 8, check)
        yield _case(device, torch.float32, torch.bfloat16, 4, 5, 2, 8, check)


@built_later
def _case(
    device: str,
    dtype: torch.dtype,
    pool: torch.dtype,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    check: bool,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + heads * 31 + dim)
    page_size = 3 if check else 16
    num_pages = rows // page_size + 2

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    qkv = normal(rows, heads + 2 * kv_heads + 2 * check, dim)[:, : heads + 2 * kv_heads]
    turns = 100 * torch.randn(rows, dim // 2, generator=generator)
    cos, sin = turns.cos().to(device, dtype), turns.sin().to(device, dtype)
    keys, values = (normal(num_pages, page_size, kv_heads, dim, dtype=pool) for _ in range(2))
    slots = torch.randperm(num_pages * page_size, generator=generator)[:rows]
    if check:
        slots[2::4] = -1 - slots[2::4]
    slots = slots.to(device, torch.int32 if check and rows % 2 else torch.int64)

    def run(backend: str) -> tuple[torch.Tensor, ...]:
        """A bench turns the same rows again and again."""
        x = qkv.clone() if check else qkv
        k, v = (keys.clone(), values.clone()) if check else (keys, values)
        q = rotary_kv(x, cos, sin, k, v, slots, num_heads=heads, backend=backend)
        return q, k, v

    return Case(
        name=f"{rows} x {heads} + 2 x {kv_heads} x {dim}"
        + ("" if pool is dtype else f", pool {str(pool).removeprefix('torch.')}"),
        dtype=dtype,
        run=run,
        exact=lambda: rotary_kv_ref(qkv, cos, sin, keys, values, slots, heads),
        eager=lambda: run("torch"),
        num_bytes=2 * rows * (heads + 2 * kv_heads) * dim * dtype.itemsize,
        num_flops=3 * rows * (heads + kv_heads) * dim,
        without=() if pool is dtype else ("cpu",),
    )
