"""Causal attention over packed sequences: the plan of a forward pass, made once for all layers.

A plan takes a layer's qkv product and its rotary angles and gives what every row attends to:
`PackedAttention` without a cache, `PagedKV` with keys and values in pages. Integers of a `PagedKV`
lie where its pages do, so that nothing in the layers asks the host on a GPU.

Shape letters: N packed new tokens, S sequences, P most pages of one, G groups of sequences, H query
heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops.cascade_attention import cascade_attention, find_groups
from vtts_rt.ops.paged_attention import paged_attention
from vtts_rt.ops.rotary import rotary
from vtts_rt.ops.rotary_kv import rotary_kv
from vtts_rt.types import require

# A decoding sequence and its drafts (EngineConfig.draft_tokens is 15). Longer runs are prefill, for
# which a GPU's kernel is launched in another shape.
FEW_ROWS = 16
# The parts of a transfer begin at multiples of 16 bytes, for which Triton compiles one kernel.
_INTS_PER_PART = 2


class PackedAttention:
    """No cache: every sequence attends to itself. Differentiable; the training path.

    Neighbouring sequences of equal length share one attention call.
    """

    def __init__(self, seqlens: Sequence[int], num_kv_heads: int) -> None:
        self._num_kv_heads = num_kv_heads
        self._runs: list[tuple[int, int, int]] = []  # start, sequences, length
        start = 0
        for length in seqlens:
            if self._runs and self._runs[-1][2] == length:
                first, num, _ = self._runs.pop()
                self._runs.append((first, num + 1, length))
            elif length:
                self._runs.append((start, 1, length))
            start += length

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """qkv: (N, H + 2 K, D), taken over; cos, sin: (N, D/2) -> (N, H * D), or (M, H * D) of
        `rows`."""
        qk = rotary(qkv[:, : -self._num_kv_heads], cos, sin)
        q, k = qk[:, : -self._num_kv_heads], qk[:, -self._num_kv_heads :]
        v = qkv[:, -self._num_kv_heads :]
        outputs = []
        for start, num, length in self._runs:
            query, key, value = (
                x[start : start + num * length].view(num, length, *x.shape[1:]).transpose(1, 2)
                for x in (q, k, v)
            )
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            outputs.append(out.transpose(1, 2).reshape(num * length, -1))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined if rows is None else joined.index_select(0, rows)


class Attend(NamedTuple):
    """One call of `paged_attention`, for neighbouring sequences.

    start, stop: their packed rows. page_table: (S, P); cu_seqlens_q: (S + 1,), from 0;
    seqlens_k: (S,): int64. max_seqlen_q, max_seqlen_k: bounds, known to the host.
    """

    start: int
    stop: int
    page_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q: (N, H, D) of all rows -> (rows of these, H, D)."""
        return paged_attention(
            q[self.start : self.stop],
            keys,
            values,
            *self[2:5],
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
        )


class Cascade(NamedTuple):
    """One call of `cascade_attention`, for neighbouring sequences of one new token.

    start, stop: their packed rows. shared_table: (G, P) and shared_seqlens: (G,), of each group;
    cu_groups: (G + 1,), from 0; page_table: (S, P) and seqlens_k: (S,), what is behind the shared
    pages: integers. max_shared, max_seqlen_k: bounds, known to the host.
    """

    start: int
    stop: int
    shared_table: Tensor
    shared_seqlens: Tensor
    cu_groups: Tensor
    page_table: Tensor
    seqlens_k: Tensor
    max_shared: int
    max_seqlen_k: int

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q: (N, H, D) of all rows -> (rows of these, H, D)."""
        return cascade_attention(
            q[self.start : self.stop],
            keys,
            values,
            *self[2:7],
            max_shared=self.max_shared,
            max_seqlen_k=self.max_seqlen_k,
        )


Call = Attend | Cascade


@dataclass(slots=True)
class PagedKV:
    """Writes new keys and values into pages, then attends over all keys of each sequence.

    pages: (layers, 2, num_pages, page_size, K, D), keys at [:, 0], values at [:, 1]; written in
        place. slot_mapping: (N,) int64, page * page_size + offset of every new token, negative for
        rows of padding. calls: of all rows, in order. last: of the wanted rows (ForwardBatch.rows),
        in order, for the last layer; None: all attend there too, and the wanted are chosen.
    """

    pages: Tensor
    slot_mapping: Tensor
    calls: Sequence[Call]
    last: Sequence[Call] | None = None

    @property
    def only_call(self) -> Attend | None:
        """The one call of all rows, if it is one and of `paged_attention`."""
        first = self.calls[0]
        return first if len(self.calls) == 1 and isinstance(first, Attend) else None

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """As `PackedAttention`; no gradient is recorded."""
        keys, values = self.pages[layer]
        num_heads = qkv.shape[1] - 2 * keys.shape[2]
        q = rotary_kv(qkv, cos, sin, keys, values, self.slot_mapping, num_heads=num_heads)
        calls = self.calls
        if rows is not None and self.last is not None:
            q, calls, rows = q.index_select(0, rows), self.last, None
        outputs = [call(q, keys, values) for call in calls]
        if len(outputs) == 1:
            out = outputs[0].flatten(1)
        else:
            out = torch.cat([q[:0], *outputs]).flatten(1)
        return out if rows is None else out.index_select(0, rows)


def plan_calls(
    pages: Sequence[Sequence[int]],
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    page_size: int,
    *,
    on_gpu: bool = False,
) -> list[Call]:
    """How sequences attend, tensors on the CPU: all in one call; for a GPU neighbours of few new
    rows in one and neighbours of many in another, and sequences that share leading pages may read
    them once (`find_groups`).

    pages: of each sequence, in order. seqlens_q: its new rows; those of sequences without one have
    no place in the result. seqlens_k: its keys, the new ones included; query i of n sees the first
    seqlens_k - n + i + 1 (bottom-right aligned).
    """
    sequences = []
    for own, num_rows, num_keys in zip(pages, seqlens_q, seqlens_k, strict=True):
        require("PagedKV", "seqlens_k", num_keys, num_keys >= num_rows, f">= {num_rows} new")
        if num_rows:
            sequences.append((own, num_rows, num_keys))
    calls: list[Call] = []
    start = 0
    for _, run in groupby(sequences, lambda sequence: on_gpu and sequence[1] <= FEW_ROWS):
        tables, sizes, num_keys_of = zip(*run, strict=True)
        stop = start + sum(sizes)
        groups = None
        if on_gpu and max(sizes) == 1:
            groups = find_groups(tables, num_keys_of, page_size)
        if groups is not None:
            calls.append(Cascade(start, stop, *groups))
        else:
            # Filled up with page 0, which is not read there.
            table = np.zeros((len(tables), max(map(len, tables))), np.int64)
            for row, own in zip(table, tables, strict=True):
                row[: len(own)] = own
            bounds, lengths = torch.tensor([0, *sizes]).cumsum(0), torch.tensor(num_keys_of)
            most = max(sizes), max(num_keys_of)
            calls.append(Attend(start, stop, torch.from_numpy(table), bounds, lengths, *most))
        start = stop
    return calls


def tensors_of(calls: Sequence[Call]) -> list[Tensor]:
    """All tensors of calls, in order."""
    return [field for call in calls for field in call if isinstance(field, Tensor)]


def with_tensors(calls: Sequence[Call], tensors: Iterator[Tensor]) -> list[Call]:
    """Calls with their tensors replaced by the next of those given."""
    found = []
    for call in calls:
        fields: list[Any] = [next(tensors) if isinstance(x, Tensor) else x for x in call]
        found.append(type(call)(*fields))
    return found


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integers on the CPU as int64 on the device, in one transfer; the host does not wait."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.numel() // _INTS_PER_PART) * _INTS_PER_PART)
    packed = torch.zeros(starts[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
    places = [slice(a, a + t.numel()) for a, t in zip(starts, tensors, strict=False)]
    for place, tensor in zip(places, tensors, strict=True):
        packed[place] = tensor.flatten()
    moved = packed.to(device, non_blocking=True)
    return [moved[p].view(t.shape) for p, t in zip(places, tensors, strict=True)]
