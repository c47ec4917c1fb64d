"""cascade_attention: rollout groups that share a prompt, against paged_attention on their keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from op_cases.case import DTYPES, Build, Case, Outputs, Scale, bench_dtype, built_later
from op_cases.paged_attention import paged
from vtts_rt.ops.cascade_attention import cascade_attention, cascade_attention_ref
from vtts_rt.ops.paged_attention import paged_attention


class Shape(NamedTuple):
    """Rows and shared keys of each group; own keys of every row; query heads, key/value heads, head
    dim; page size."""

    rows: tuple[int, ...]
    shared: tuple[int, ...]
    own: tuple[int, ...]
    heads: tuple[int, int, int]
    page_size: int = 16


CHECKS = (
    Shape((2,), (8,), (1, 5), (2, 1, 16), 4),
    Shape((1,), (0,), (3,), (1, 1, 16), 1),
    Shape((3, 1, 4), (37, 0, 20), (1, 2, 70, 9, 5, 4, 3, 2), (4, 2, 80)),  # 37: not whole pages
    Shape((5,), (300,), (1, 150, 20, 3, 9), (14, 2, 24), 5),  # both parts split
    Shape((9, 2), (40, 33), (1,) * 11, (7, 1, 128)),
)
# 256 own keys: an answer half way.
BENCHES = {
    "cuda": [
        Shape((rows,), (shared,), (256,) * rows, heads)
        for heads in ((28, 4, 128), (16, 2, 128))  # 7B, 3B
        for rows in (4, 8, 16)
        for shared in (4096, 16384, 32768)
    ],
    "cpu": [Shape((4,), (2048,), (64,) * 4, (8, 2, 64))],  # the 118 M bench model
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale queries inside wider rows, indices of both types and NaN in slots that
    must not be read."""
    check = scale == "check"
    for shape in CHECKS if check else BENCHES[device]:
        for dtype in DTYPES if check else (bench_dtype(device),):
            yield _case(device, dtype, shape, check)


@built_later
def _case(device: str, dtype: torch.dtype, shape: Shape, check: bool) -> Case:
    rows, shared, own, (num_heads, num_kv_heads, head_dim), page_size = shape
    generator = torch.Generator().manual_seed(sum(shared) * 7919 + num_heads * 31 + head_dim)
    pools, tables = paged((*shared, *own), num_kv_heads, head_dim, page_size, generator)
    index_dtype = torch.int32 if len(rows) > 1 else torch.int64
    keys, values = pools.to(device, dtype)
    num_groups, num_rows = len(rows), len(own)
    q = torch.randn(num_rows, num_heads + 2 * check, head_dim, generator=generator)
    q = q.to(device, dtype)[:, :num_heads]
    table, lengths, bounds, own_table, own_lengths = (
        x.to(device, index_dtype)
        for x in (
            tables[:num_groups],
            torch.tensor(shared),
            torch.tensor([0, *rows]).cumsum(0),
            tables[num_groups:],
            torch.tensor(own),
        )
    )

    def run(backend: str) -> Outputs:
        groups = (table, lengths, bounds, own_table, own_lengths)
        most = (max(shared), max(own))
        out = cascade_attention(
            q, keys, values, *groups, max_shared=most[0], max_seqlen_k=most[1], backend=backend
        )
        return (out,)

    def exact() -> Outputs:
        pool = (keys.double(), values.double())
        groups = (table, lengths, bounds, own_table, own_lengths)
        return (cascade_attention_ref(q.double(), *pool, *groups),)

    def plain() -> Outputs:
        out = paged_attention(
            q,
            keys,
            values,
            whole_table,
            whole_bounds,
            whole_lengths,
            max_seqlen_q=1,
            max_seqlen_k=shared[0] + max(own),
        )
        return (out,)

    # At "bench" scale one group shares whole pages: the same sequences as paged_attention has them.
    whole_table = torch.cat(
        (table[:1, : -(-shared[0] // page_size)].expand(num_rows, -1), own_table), 1
    )
    whole_bounds = torch.arange(num_rows + 1, device=device)
    whole_lengths = own_lengths + shared[0]
    seen = sum(n * m for n, m in zip(rows, shared, strict=True)) + sum(own)
    once = 2 * num_kv_heads * (sum(shared) + sum(own)) + 2 * num_rows * num_heads
    names = (", ".join(map(str, sizes)) for sizes in (rows, shared, sorted(set(own))))
    return Case(
        name="{} rows share {} keys, {} own, ".format(*names)
        + f"{num_heads} over {num_kv_heads} x {head_dim}, pages of {page_size}",
        dtype=dtype,
        run=run,
        exact=exact,
        eager=(lambda: run("reference")) if check else plain,
        num_bytes=once * head_dim * dtype.itemsize,
        num_flops=4 * seen * num_heads * head_dim,
    )
