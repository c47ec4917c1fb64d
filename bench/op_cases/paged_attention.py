"""paged_attention: decoding, prefill and chunks of it, with pages in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from op_cases.case import DTYPES, Build, Case, Outputs, Scale, bench_dtype, built_later
from vtts_rt.ops.paged_attention import paged_attention, paged_attention_ref

EXACT_ROWS = 256  # scores of one block of rows of 28 heads to 16,384 keys: 0.9 GB of float64


class Shape(NamedTuple):
    """New rows and keys of each sequence; query heads, key/value heads, head dim; page size."""

    num_new: tuple[int, ...]
    num_keys: tuple[int, ...]
    heads: tuple[int, int, int]
    page_size: int = 16


CHECKS = (
    Shape((1,), (1,), (1, 1, 16), 1),
    Shape((1, 1, 1), (5, 40, 37), (4, 2, 16), 4),
    Shape((1,), (300,), (8, 2, 16)),  # split
    Shape((3, 1, 16, 0, 2), (3, 40, 130, 7, 33), (6, 2, 80)),
    Shape((4,), (290,), (14, 2, 24), 3),  # drafts, split
    Shape((16,), (16,), (7, 1, 128), 5),
    Shape((33,), (200,), (3, 3, 40), 7),
    Shape((2,), (35,), (2, 1, 256)),
    Shape((70, 1), (70, 9), (6, 2, 16)),
    Shape((5,), (9,), (2, 1, 12), 4),
    Shape((0,), (0,), (2, 1, 8), 4),
)
DECODED = (4096, 16384, 32768)
PREFILLED = ((4096, 4096), (16384, 16384), (1024, 16384))  # new rows, keys
BENCHES = {
    "cuda": [
        Shape((new,), (keys,), heads)
        for heads in ((28, 4, 128), (16, 2, 128))  # 7B, 3B
        for new, keys in (*((1, keys) for keys in DECODED), *PREFILLED)
    ],
    "cpu": [  # the 118 M bench model
        Shape((new,), (keys,), (8, 2, 64)) for new, keys in ((1, 2700), (540, 4559), (2048, 2048))
    ],
}


class Batch(NamedTuple):
    """Arguments of paged_attention."""

    q: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale queries inside wider rows, indices of both types and NaN in slots that
    must not be read."""
    check = scale == "check"
    for shape in CHECKS if check else BENCHES[device]:
        for dtype in DTYPES if check else (bench_dtype(device),):
            yield _case(device, dtype, shape, check)


@built_later
def _case(device: str, dtype: torch.dtype, shape: Shape, check: bool) -> Case:
    batch = _batch(device, dtype, shape, check)
    num_heads, num_kv_heads, head_dim = shape.heads
    # Scores that are computed: all keys before a sequence's new rows, and half of those among them.
    scores = sum(n * (m - n) + n * (n + 1) // 2 for n, m in zip(*shape[:2], strict=True))
    moved = 2 * sum(shape.num_keys) * num_kv_heads + 2 * sum(shape.num_new) * num_heads

    def run(backend: str) -> Outputs:
        most = (max(shape.num_new), max(shape.num_keys))
        bounds = {"max_seqlen_q": most[0], "max_seqlen_k": most[1]}
        return (paged_attention(*batch, **bounds, backend=backend),)

    def exact() -> Outputs:
        return (paged_attention_ref(*_in_blocks(batch)),)

    # Interpreted, native and eager kernels of small shapes are held against the equation's own
    # operators; what is timed, against torch's fastest.
    eager = (lambda: run("reference")) if check else (lambda: (sdpa(batch),))
    news, keys = (", ".join(map(str, lengths)) for lengths in shape[:2])
    return Case(
        name=f"{news} new of {keys} keys, {num_heads} over {num_kv_heads} x {head_dim}, pages of "
        f"{shape.page_size}",
        dtype=dtype,
        run=run,
        exact=exact,
        eager=eager,
        num_bytes=moved * head_dim * dtype.itemsize,
        num_flops=4 * scores * num_heads * head_dim,
        without=("cpu",) if head_dim % 8 else (),
    )


def _batch(device: str, dtype: torch.dtype, shape: Shape, check: bool) -> Batch:
    num_new, num_keys, (num_heads, num_kv_heads, head_dim), page_size = shape
    generator = torch.Generator().manual_seed(sum(num_keys) * 7919 + num_heads * 31 + head_dim)
    pools, table = paged(num_keys, num_kv_heads, head_dim, page_size, generator)
    q = torch.randn(sum(num_new), num_heads + 2 * check, head_dim, generator=generator)
    q = q.to(device, dtype)[:, :num_heads]
    index_dtype = torch.int32 if check and len(num_keys) > 1 else torch.int64
    indices = (table, torch.tensor([0, *num_new]).cumsum(0), torch.tensor(num_keys))
    keys, values = pools.to(device, dtype)
    page_table, cu_seqlens_q, seqlens_k = (x.to(device, index_dtype) for x in indices)
    return Batch(q, keys, values, page_table, cu_seqlens_q, seqlens_k)


def paged(
    num_keys: Sequence[int],
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Keys and values of sequences, or of prefixes, in pages in any order: pools (2, num_pages,
    page_size, K, D), NaN in slots that must not be read, and the page table, (S, P) int64."""
    counts = [-(-n // page_size) for n in num_keys]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=generator)
    table = torch.zeros(len(counts), max(1, *counts), dtype=torch.int64)
    pools = torch.full((2, num_pages, page_size, num_kv_heads, head_dim), torch.nan)
    for row, (count, length) in enumerate(zip(counts, num_keys, strict=True)):
        table[row, :count], order = order[:count], order[count:]
        slot = torch.arange(length)
        pools[:, table[row, slot // page_size], slot % page_size] = torch.randn(
            2, length, num_kv_heads, head_dim, generator=generator
        )
    return pools, table


def _in_blocks(batch: Batch) -> Batch:
    """The same in float64, with sequences of at most EXACT_ROWS rows."""
    bounds, num_keys = batch.cu_seqlens_q.tolist(), batch.seqlens_k.tolist()
    starts, seqlens, tables = [], [], []
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for first in range(start, stop, EXACT_ROWS):
            last = min(first + EXACT_ROWS, stop)
            starts.append(first)
            seqlens.append(num_keys[s] - stop + last)
            tables.append(s)
    return Batch(
        batch.q.double(),
        batch.keys.double(),
        batch.values.double(),
        batch.page_table[tables],
        torch.tensor([*starts, bounds[-1]]),
        torch.tensor(seqlens),
    )


def sdpa(batch: Batch) -> Tensor:
    """Without a kernel for pages: gather them, then torch's attention."""
    q, keys, values, page_table, cu_seqlens_q, seqlens_k = batch
    page_size, outputs = keys.shape[1], []
    bounds = cu_seqlens_q.tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        num_new, num_keys = stop - start, int(seqlens_k[s])
        pages = page_table[s, : -(-num_keys // page_size)]
        key, value = (x[pages].flatten(0, 1)[:num_keys].transpose(0, 1) for x in (keys, values))
        if num_new == 1:  # the heads of a group as rows: keys are read once a group
            query = q[start].view(keys.shape[2], -1, q.shape[2])
            outputs.append(F.scaled_dot_product_attention(query, key, value).view(1, *q.shape[1:]))
            continue
        key, value = (x.repeat_interleave(q.shape[1] // keys.shape[2], 0) for x in (key, value))
        query, past = q[start:stop].transpose(0, 1), num_keys - num_new
        mask = None
        if past:
            mask = torch.ones(num_new, num_keys, dtype=torch.bool, device=q.device).tril(past)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], mask, is_causal=not past
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
