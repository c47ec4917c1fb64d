"""cascade_attention: one new row of each sequence, where sequences share leading pages of keys.

    out[i, h] = softmax_j(scale * q[i, h] . key_j[h // (H / K)]) value_j[h // (H / K)]

over the shared keys of row i's group, then row i's own. The members of a rollout group share a
prompt with its video: paged_attention would read those keys once a member, this reads them once a
group.

Legend: N rows, one a sequence; S groups of consecutive rows; P0, P1 most pages of a shared prefix
and of a row's own keys; H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtts_rt.ops.dispatch import Backend, anything, register, triton_supports
from vtts_rt.ops.native import adjacent
from vtts_rt.ops.pages import check_indices, check_pool, pages_refused

# A group is worth a separate launch from about 3 x 1,024 keys that are not read again: 6 MB a
# layer of the 7B model (2,048 bytes a key and layer), 2 microseconds at 3.35 TB/s. Groups that fit
# a GPU's L2 cache (50 MB on an H100) gain less: their second reading is a cached one.
MIN_GROUP = 4  # rows
MIN_SHARED = 1024  # keys


def cascade_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    shared_table: Tensor,
    shared_seqlens: Tensor,
    cu_groups: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """The equation, row by row, in q's dtype. Arguments as `cascade_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    page_size, heads = keys.shape[1], q.shape[1] // keys.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = cu_groups.tolist()
    for group, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for row in range(start, stop):
            places = []
            for table, num_keys in (
                (shared_table[group], int(shared_seqlens[group])),
                (page_table[row], int(seqlens_k[row])),
            ):
                slot = torch.arange(num_keys, device=q.device)
                places.append(table[slot // page_size].long() * page_size + slot % page_size)
            key, value = (
                pool.flatten(0, 1)[torch.cat(places)].to(q.dtype).repeat_interleave(heads, dim=1)
                for pool in (keys, values)
            )
            weights = (torch.einsum("hd,jhd->hj", q[row], key) * scale).softmax(-1)
            out[row] = torch.einsum("hj,jhd->hd", weights, value)
    return out


def _triton(q: Tensor, *call: Any) -> Tensor:
    from vtts_rt.kernels import cascade_attention as kernel

    return kernel.cascade_attention(adjacent(q), *call)  # type: ignore[no-any-return]


_OP = register(
    "cascade_attention",
    Backend("triton", triton_supports, _triton, lambda *call: pages_refused(*call[:3])),
    Backend("reference", anything, lambda *call: cascade_attention_ref(*call[:8], scale=call[-1])),
)


def cascade_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    shared_table: Tensor,
    shared_seqlens: Tensor,
    cu_groups: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    max_shared: int,
    max_seqlen_k: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of decoding rows to the keys of their group and to their own.

    q: (N, H, D), H a multiple of K; keys, values: (num_pages, page_size, K, D), all of one float
    dtype and device. shared_table: (S, P0) pages and shared_seqlens: (S,) keys of each shared
    prefix, whole pages or not, 0 for a row that shares nothing; cu_groups: (S + 1,), from 0 to N,
    ascending: first row of each group. page_table: (N, P1) pages and seqlens_k: (N,) keys of each
    row after the shared ones, its new one included. All int64 or int32 on q's device, neighbours
    adjacent. `find_groups` makes them.
    max_shared, max_seqlen_k: upper bounds of shared_seqlens and seqlens_k. What a captured CUDA
        graph was given holds for every replay.
    scale: of the scores, None for D ** -0.5.
    backend: "auto", "triton" (CUDA tensors of up to 32 bits, D <= 256, no gradient wanted) or
        "reference" (eager torch, any device).

    Returns (N, H, D) in q's dtype.
    Raises ValueError on shapes that do not match and on tensors that a backend asked for by name
    does not take; RuntimeError on an unusable backend. Numbers on a device are not looked at: wrong
    pages read any memory, and rows from cu_groups[-1] on get any values.
    """
    num_groups = shared_table.shape[0]
    check_pool("cascade_attention", q, keys, values)
    check_indices(
        "cascade_attention",
        q.device,
        shared_table=(shared_table, (num_groups, shared_table.shape[-1])),
        shared_seqlens=(shared_seqlens, (num_groups,)),
        cu_groups=(cu_groups, (num_groups + 1,)),
        page_table=(page_table, (q.shape[0], page_table.shape[-1])),
        seqlens_k=(seqlens_k, (q.shape[0],)),
    )
    groups = (shared_table, shared_seqlens, cu_groups, page_table, seqlens_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _OP(
        q.device.type, backend, q, keys, values, *groups, max_shared, max_seqlen_k, scale
    )
    return out


class Groups(NamedTuple):
    """What `cascade_attention` takes beside q, keys, values and scale; int32 on the CPU."""

    shared_table: Tensor
    shared_seqlens: Tensor
    cu_groups: Tensor
    page_table: Tensor
    seqlens_k: Tensor
    max_shared: int
    max_seqlen_k: int


def find_groups(
    pages: Sequence[Sequence[int]],
    num_keys: Sequence[int],
    page_size: int,
    *,
    min_group: int = MIN_GROUP,
    min_shared: int = MIN_SHARED,
) -> Groups | None:
    """Split a decode batch into groups of consecutive rows that begin with the same pages.

    pages: of each sequence, in order; num_keys: of each, its new one included. Groups have at least
    `min_group` rows and `min_shared` shared keys, are chosen so that as few keys as possible are
    read, and share whole pages only; every row keeps at least its newest key for itself. Rows of no
    group become groups of one that share nothing.

    Returns None where there is no group.
    """
    num_rows = len(pages)
    # alike[i]: leading pages that rows i and i + 1 have in common.
    alike = [_common(a, b) for a, b in zip(pages, pages[1:], strict=False)]
    # saved[j]: most keys that groups of the first j rows spare; begins[j]: where the last begins.
    saved, begins, shared = [0] * (num_rows + 1), [0] * (num_rows + 1), [0] * (num_rows + 1)
    for stop in range(1, num_rows + 1):
        saved[stop], begins[stop] = saved[stop - 1], stop - 1
        common = (num_keys[stop - 1] - 1) // page_size
        for start in range(stop - 2, -1, -1):
            common = min(common, alike[start], (num_keys[start] - 1) // page_size)
            if common * page_size < max(min_shared, 1):
                break
            spares = saved[start] + (stop - start - 1) * common * page_size
            if stop - start >= min_group and spares > saved[stop]:
                saved[stop], begins[stop], shared[stop] = spares, start, common
    if saved[num_rows] == 0:
        return None
    stops = [num_rows]
    while begins[stops[-1]] > 0:
        stops.append(begins[stops[-1]])
    stops.reverse()
    own_pages, own_keys, prefixes = [], [], []
    for start, stop in zip([0, *stops], stops, strict=False):
        prefixes.append(pages[start][: shared[stop]])
        for row in range(start, stop):
            last = -(-num_keys[row] // page_size)
            own_pages.append(pages[row][shared[stop] : last])
            own_keys.append(num_keys[row] - shared[stop] * page_size)
    lengths = [len(prefix) * page_size for prefix in prefixes]
    return Groups(
        _table(prefixes),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor([0, *stops], dtype=torch.int32),
        _table(own_pages),
        torch.tensor(own_keys, dtype=torch.int32),
        max(lengths),
        max(own_keys),
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading values are equal, by halving: slices compare faster than a loop."""
    lengths = range(min(len(a), len(b)) + 1)
    return bisect_left(lengths, True, key=lambda n: a[:n] != b[:n]) - 1


def _table(rows: list[Sequence[int]]) -> Tensor:
    """Rows of different lengths as one (len(rows), longest) int32 table, filled up with zeros."""
    width = max(1, *(len(row) for row in rows))
    padded = [[*row, *[0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int32)
