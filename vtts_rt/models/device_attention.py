"""Paged attention whose metadata lies on the device: nothing in the layers asks the host.

A plan is made once for a forward pass, from one transfer of all its integers, and serves every
layer: `rotary_kv`, then `paged_attention` for sequences of few new tokens and for those of many,
and `cascade_attention` for decoding ones that share leading pages.

Shape letters: N packed new tokens, S sequences, P most pages of one, G groups of sequences, H query
heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtts_rt.ops.cascade_attention import cascade_attention
from vtts_rt.ops.paged_attention import paged_attention
from vtts_rt.ops.rotary_kv import rotary_kv

# The parts of a transfer begin at multiples of 16 bytes, for which Triton compiles one kernel.
_INTS_PER_PART = 2


class Attend(NamedTuple):
    """One call of `paged_attention`, for neighbouring sequences.

    start, stop: their packed rows. page_table: (S, P); cu_seqlens_q: (S + 1,), from 0;
    seqlens_k: (S,): integers on the device. max_seqlen_q, max_seqlen_k: bounds, known to the host.
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
            self.page_table,
            self.cu_seqlens_q,
            self.seqlens_k,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
        )


class Cascade(NamedTuple):
    """One call of `cascade_attention`, for neighbouring sequences of one new token.

    start, stop: their packed rows. shared_table: (G, P) and shared_seqlens: (G,), of each group;
    cu_groups: (G + 1,), from 0; page_table: (S, P) and seqlens_k: (S,), what is behind the shared
    pages: integers on the device. max_shared, max_seqlen_k: bounds, known to the host.
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
            self.shared_table,
            self.shared_seqlens,
            self.cu_groups,
            self.page_table,
            self.seqlens_k,
            max_shared=self.max_shared,
            max_seqlen_k=self.max_seqlen_k,
        )


class DeviceAttention:
    """Writes new keys and values into pages, then attends over all keys of each sequence.

    pages: (layers, 2, num_pages, page_size, K, D), written in place. slot_mapping: (N,) int64 on
    the device, negative for rows of padding. calls: cover the rows in order.
    rows: (M,) int64 on the device, the rows that get an output; None for all.
    """

    rows: Tensor | None = None

    def __init__(
        self, pages: Tensor, slot_mapping: Tensor, calls: Sequence[Attend | Cascade]
    ) -> None:
        self._pages = pages
        self._slots = slot_mapping
        self._calls = calls

    def of_rows(self, rows: Tensor) -> DeviceAttention:
        """The same, with an output for `rows` only."""
        chosen = copy(self)
        chosen.rows = rows
        return chosen

    def __call__(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """qkv: (N, H + 2 K, D), taken over; cos, sin: (N, D/2) -> (N, H * D), or (M, H * D) for
        `rows`."""
        keys, values = self._pages[layer]
        num_heads = qkv.shape[1] - 2 * keys.shape[2]
        q = rotary_kv(qkv, cos, sin, keys, values, self._slots, num_heads=num_heads)
        if self.rows is not None and len(self.rows) == 0:
            return q.new_empty(0, num_heads * q.shape[2])
        outputs = [call(q, keys, values) for call in self._calls]
        out = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)
        # Of the last layer, whose attention is a small part of a pass: all rows, then a choice.
        return out if self.rows is None else out.index_select(0, self.rows)


def with_tensors(call: Attend | Cascade, tensors: Iterator[Tensor]) -> Attend | Cascade:
    """A call with its tensors replaced by the next of those given."""
    fields: list[Any] = [next(tensors) if isinstance(x, Tensor) else x for x in call]
    return Attend(*fields) if isinstance(call, Attend) else Cascade(*fields)


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integers on the CPU as int64 on the device, in one transfer that nobody waits for."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.numel() // _INTS_PER_PART) * _INTS_PER_PART)
    packed = torch.zeros(starts[-1], dtype=torch.int64, pin_memory=device.type == "cuda")
    places = [slice(a, a + t.numel()) for a, t in zip(starts, tensors, strict=False)]
    for place, tensor in zip(places, tensors, strict=True):
        packed[place] = tensor.flatten()
    moved = packed.to(device, non_blocking=True)
    return [moved[p].view(t.shape) for p, t in zip(places, tensors, strict=True)]
