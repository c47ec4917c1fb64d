"""Causal attention over packed sequences, with and without a paged KV cache.

A plan is made once for a forward pass and serves every layer.

Shape letters: N packed new tokens, B sequences, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.types import require

# The operator behind scaled_dot_product_attention on a CPU: (output, log-sum-exp of the scores).
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
QUERY_BLOCK = 1024  # query rows that share one mask: bounds the mask, skips keys of the future


@dataclass(slots=True)
class PagedKV:
    """Where this batch's keys and values go and where all keys of each sequence are.

    pages: (layers, 2, num_pages, page_size, K, D), keys at [:, 0], values at [:, 1]; written in
        place. page_table: (B, max_pages) int64, pages of each sequence in order, on the CPU or
        the device. slot_mapping: (N,) int64, page * page_size + offset of every new token.
    seqlens_k: keys of each sequence, the new ones included.
    """

    pages: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    seqlens_k: Sequence[int]


class PackedAttention:
    """No cache: every sequence attends to itself. Differentiable; the training path.

    Neighbouring sequences of equal length share one attention call.
    """

    rows: Tensor | None = None  # all rows get an output

    def __init__(self, seqlens: Sequence[int]) -> None:
        self.runs: list[tuple[int, int, int]] = []  # start, sequences, length
        start = 0
        for length in seqlens:
            if self.runs and self.runs[-1][2] == length:
                first, num, _ = self.runs.pop()
                self.runs.append((first, num + 1, length))
            elif length:
                self.runs.append((start, 1, length))
            start += length

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (N, H, D), k, v: (N, K, D) -> (N, H * D)."""
        outputs = []
        for start, num, length in self.runs:
            query, key, value = (
                x[start : start + num * length].view(num, length, *x.shape[1:]).transpose(1, 2)
                for x in (q, k, v)
            )
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            outputs.append(out.transpose(1, 2).reshape(num * length, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@dataclass(slots=True)
class _SequencePlan:
    """One sequence of a paged batch.

    start, num_new: its rows in the packed batch. num_keys: all keys. slots: its keys' place in
    the flattened pool, a slice when its pages are neighbours (no copy), else (num_keys,) int64.
    blocks: (first query, last + 1, keys, mask) of a prefill that continues a cached prefix, or
        splits: that prefill is done as cached keys, then new ones.
    """

    start: int
    num_new: int
    num_keys: int
    slots: slice | Tensor
    blocks: list[tuple[int, int, int, Tensor]]
    splits: bool = False


class PagedAttention:
    """Writes new keys and values into pages, then attends over all keys of each sequence.

    Query i of n new ones sees the first num_keys - n + i + 1 keys (bottom-right aligned).
    rows: (M,) int64, the rows that get an output; None for all.
    """

    rows: Tensor | None = None

    def __init__(self, kv: PagedKV, seqlens: Sequence[int], dtype: torch.dtype) -> None:
        page_size, num_seqs = kv.pages.shape[3], len(seqlens)
        lengths = len(kv.seqlens_k), kv.page_table.shape[0]
        require("PagedKV", "seqlens_k, page_table", lengths, lengths == (num_seqs,) * 2, "B long")
        # (layers, 2, slots, K, D)
        self.pool = kv.pages.flatten(2, 3)
        self.write: slice | Tensor = _as_slice(kv.slot_mapping)
        table = kv.page_table.cpu()
        self.sequences = []
        start = 0
        masks: dict[tuple[int, int], Tensor] = {}
        for index, (num_new, num_keys) in enumerate(zip(seqlens, kv.seqlens_k, strict=True)):
            require("PagedKV", "seqlens_k", num_keys, num_keys >= num_new, f">= {num_new} new")
            pages = table[index, : -(-num_keys // page_size)]
            first = _as_slice(pages)
            slots: slice | Tensor
            if isinstance(first, slice):
                slots = slice(first.start * page_size, first.start * page_size + num_keys)
            else:
                slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
                slots = slots[:num_keys].to(kv.pages.device)
            blocks = []
            continues = 1 < num_new < num_keys
            # The operator that also gives log-sum-exps is a CPU's; halves would round once more.
            splits = continues and kv.pages.device.type == "cpu" and dtype == torch.float32
            if continues and not splits:
                past = num_keys - num_new
                for a in range(0, num_new, QUERY_BLOCK):
                    b = min(a + QUERY_BLOCK, num_new)
                    shape = (b - a, past + b)
                    if shape not in masks:
                        masks[shape] = _causal_mask(*shape, dtype, kv.pages.device)
                    blocks.append((a, b, past + b, masks[shape]))
            self.sequences.append(_SequencePlan(start, num_new, num_keys, slots, blocks, splits))
            start += num_new

    def of_last_rows(self) -> PagedAttention:
        """The same, with an output for the last new token of each sequence only."""
        last = copy(self)
        last.sequences = [
            _SequencePlan(seq.start + seq.num_new - 1, 1, seq.num_keys, seq.slots, [])
            for seq in self.sequences
            if seq.num_new
        ]
        last.rows = torch.tensor([seq.start for seq in last.sequences], device=self.pool.device)
        return last

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (N, H, D), k, v: (N, K, D) -> (N, H * D), or (M, H * D) for `rows`."""
        keys, values = self.pool[layer]
        if isinstance(self.write, slice):
            keys[self.write], values[self.write] = k, v
        else:
            keys.index_copy_(0, self.write, k.to(keys.dtype))
            values.index_copy_(0, self.write, v.to(values.dtype))
        outputs = []
        for seq in self.sequences:
            if seq.num_new == 0:
                continue
            query = q[seq.start : seq.start + seq.num_new]
            if isinstance(seq.slots, slice):
                key, value = keys[seq.slots], values[seq.slots]
            else:
                key, value = keys.index_select(0, seq.slots), values.index_select(0, seq.slots)
            outputs.append(_attend(seq, query, key.to(q.dtype), value.to(q.dtype)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(seq: _SequencePlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: (n, H, D), k, v: (num_keys, K, D) -> (n, H * D)."""
    key, value = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, K, keys, D)
    if seq.num_new == 1:
        # The query heads of a group become query rows: keys are read once a group, which is
        # 3x faster than enable_gqa on a CPU (2,700 keys, 8 heads over 2: 0.29 against 0.90 ms).
        groups = q.view(1, k.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(groups, key, value).reshape(1, -1)
    query = q.transpose(0, 1)[None]
    if seq.splits:
        out = _attend_past_then_new(seq, query, key, value)
    elif not seq.blocks:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    else:
        out = torch.cat(
            [
                F.scaled_dot_product_attention(
                    query[:, :, a:b], key[:, :, :n], value[:, :, :n], mask, enable_gqa=True
                )
                for a, b, n, mask in seq.blocks
            ],
            dim=2,
        )
    return out[0].transpose(0, 1).reshape(seq.num_new, -1)


def _attend_past_then_new(seq: _SequencePlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the cached keys and to the new ones, merged by their log-sum-exps.

    q: (1, H, n, D), k, v: (1, K, keys, D) -> (1, H, n, D). Neither part needs a mask, and a group's
    queries share the cached keys: 40 against 49 ms for 669 new of 2,846 keys (8 heads over 2,
    2 AVX2 cores).
    """
    past, groups = seq.num_keys - seq.num_new, q.shape[1] // k.shape[1]
    rows = q.reshape(1, k.shape[1], groups * seq.num_new, -1)
    old, old_lse = _FLASH(rows, k[:, :, :past], v[:, :, :past])
    new_keys, new_values = (x[:, :, past:].repeat_interleave(groups, 1) for x in (k, v))
    new, new_lse = _FLASH(q, new_keys, new_values, is_causal=True)
    share = torch.sigmoid(old_lse.reshape(new_lse.shape) - new_lse)[..., None]
    return torch.lerp(new, old.reshape(new.shape), share)


def _as_slice(indices: Tensor) -> slice | Tensor:
    """The same places as a slice where they are consecutive."""
    if indices.numel() == 0:
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == indices.numel() and bool((indices.diff() == 1).all()):
        return slice(first, last + 1)
    return indices


def _causal_mask(
    num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(queries, keys): 0 where query i may see key j, i.e. j <= i + keys - queries, else -inf."""
    mask = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(num_keys - num_queries + 1)
