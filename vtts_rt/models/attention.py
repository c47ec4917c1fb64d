"""Causal attention over packed sequences, with and without a paged KV cache.

A plan is made once for a forward pass and serves every layer.

Shape letters: N packed new tokens, B sequences, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops.native import most_rows
from vtts_rt.ops.paged_attention import paged_attention, runs_natively
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


class _Run(NamedTuple):
    """Neighbouring rows of one sequence that get an output.

    sequence: its index. start, num_new: rows in the batch. place: first row in the output.
    num_keys: keys that the last of the rows sees.
    """

    sequence: int
    start: int
    num_new: int
    place: int
    num_keys: int


@dataclass(slots=True)
class _TorchRun:
    """How torch's operators do one run.

    slots: its keys' place in the flattened pool, a slice when its pages are neighbours (no copy),
    else (num_keys,) int64. blocks: (first query, last + 1, keys, mask) of a prefill that continues
    a cached prefix, or splits: that prefill is done as cached keys, then new ones.
    """

    run: _Run
    slots: slice | Tensor
    blocks: list[tuple[int, int, int, Tensor]]
    splits: bool


@dataclass(slots=True)
class _NativeRuns:
    """The runs that the native kernel does in one call.

    rows, places: (R,) int64, their rows in the batch and in the output; None where they are all.
    The rest are arguments of `paged_attention`.
    """

    rows: Tensor | None
    places: Tensor | None
    page_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor


class PagedAttention:
    """Writes new keys and values into pages, then attends over all keys of each sequence.

    Query i of n new ones sees the first num_keys - n + i + 1 keys (bottom-right aligned).
    rows: (M,) int64, the rows that get an output; None for all.
    """

    rows: Tensor | None = None

    def __init__(self, kv: PagedKV, seqlens: Sequence[int], dtype: torch.dtype) -> None:
        lengths = len(kv.seqlens_k), kv.page_table.shape[0]
        fits = lengths == (len(seqlens),) * 2
        require("PagedKV", "seqlens_k, page_table", lengths, fits, "B long")
        self.pages, self.dtype = kv.pages, dtype
        self.write = _as_slice(kv.slot_mapping)
        self.table = kv.page_table.cpu()
        self.masks: dict[tuple[int, int], Tensor] = {}
        runs = []
        start = 0
        for index, (num_new, num_keys) in enumerate(zip(seqlens, kv.seqlens_k, strict=True)):
            require("PagedKV", "seqlens_k", num_keys, num_keys >= num_new, f">= {num_new} new")
            if num_new:
                runs.append(_Run(index, start, num_new, start, num_keys))
            start += num_new
        self.num_rows = start
        self._plan(runs)

    def of_rows(self, rows: Tensor) -> PagedAttention:
        """The same, with an output for `rows` only: (M,) int64, ascending, on the CPU."""
        wanted, taken, runs = rows.tolist(), 0, []
        for index, start, num_new, _, num_keys in self.runs:
            while taken < len(wanted) and wanted[taken] < start + num_new:
                first, count = wanted[taken], 1
                left = start + num_new - first
                while count < left and wanted[taken + count : taken + count + 1] == [first + count]:
                    count += 1
                runs.append(_Run(index, first, count, taken, num_keys - left + count))
                taken += count
        chosen = copy(self)
        chosen.rows = rows.to(self.pages.device)
        chosen._plan(runs)
        return chosen

    def _plan(self, runs: list[_Run]) -> None:
        self.runs = runs
        native = runs_natively(self.dtype, self.pages.device, self.pages.shape[-1])
        most = most_rows("paged_attention")
        ours = [run for run in runs if native and run.num_new <= most]
        self.others = [self._other(run) for run in runs if not native or run.num_new > most]
        self.ours: _NativeRuns | None = None
        if ours:
            sizes = [run.num_new for run in ours]
            rows, places = (
                torch.cat([torch.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)])
                for starts in ([run.start for run in ours], [run.place for run in ours])
            )
            self.ours = _NativeRuns(
                None if len(rows) == self.num_rows else rows,
                None if not self.others else places,
                self.table[[run.sequence for run in ours]],
                torch.tensor([0, *sizes]).cumsum(0),
                torch.tensor([run.num_keys for run in ours]),
            )

    def _other(self, run: _Run) -> _TorchRun:
        page_size, num_keys = self.pages.shape[3], run.num_keys
        pages = self.table[run.sequence, : -(-num_keys // page_size)]
        first = _as_slice(pages)
        slots: slice | Tensor
        if isinstance(first, slice):
            slots = slice(first.start * page_size, first.start * page_size + num_keys)
        else:
            slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
            slots = slots[:num_keys].to(self.pages.device)
        blocks = []
        continues = 1 < run.num_new < num_keys
        # The operator that also gives log-sum-exps is a CPU's; halves would round once more.
        splits = continues and self.pages.device.type == "cpu" and self.dtype == torch.float32
        if continues and not splits:
            past = num_keys - run.num_new
            for a in range(0, run.num_new, QUERY_BLOCK):
                b = min(a + QUERY_BLOCK, run.num_new)
                shape = (b - a, past + b)
                if shape not in self.masks:
                    self.masks[shape] = _causal_mask(*shape, self.dtype, self.pages.device)
                blocks.append((a, b, past + b, self.masks[shape]))
        return _TorchRun(run, slots, blocks, splits)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (N, H, D), k, v: (N, K, D) -> (N, H * D), or (M, H * D) for `rows`."""
        paged_keys, paged_values = self.pages[layer]
        keys, values = paged_keys.flatten(0, 1), paged_values.flatten(0, 1)  # (slots, K, D)
        if isinstance(self.write, slice):
            keys[self.write], values[self.write] = k, v
        else:
            keys.index_copy_(0, self.write, k.to(keys.dtype))
            values.index_copy_(0, self.write, v.to(values.dtype))
        outputs = []
        for other in self.others:
            query = q[other.run.start : other.run.start + other.run.num_new]
            if isinstance(other.slots, slice):
                key, value = keys[other.slots], values[other.slots]
            else:
                key, value = (x.index_select(0, other.slots) for x in (keys, values))
            outputs.append(_attend(other, query, key.to(q.dtype), value.to(q.dtype)))
        if self.ours is None:
            if not outputs:
                return q.new_empty(0, q.shape[1] * q.shape[2])
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        ours = self.ours
        out = paged_attention(
            q if ours.rows is None else q[ours.rows],
            paged_keys,
            paged_values,
            ours.page_table,
            ours.cu_seqlens_q,
            ours.seqlens_k,
        ).flatten(1)
        if ours.places is None:
            return out
        total = self.num_rows if self.rows is None else len(self.rows)
        mixed = out.new_empty(total, out.shape[1])
        mixed[ours.places] = out
        for other, part in zip(self.others, outputs, strict=True):
            mixed[other.run.place : other.run.place + other.run.num_new] = part
        return mixed


def _attend(other: _TorchRun, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: (n, H, D), k, v: (num_keys, K, D) -> (n, H * D)."""
    key, value = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, K, keys, D)
    if other.run.num_new == 1:
        # The query heads of a group become query rows: keys are read once a group, which is
        # 3x faster than enable_gqa on a CPU (2,700 keys, 8 heads over 2: 0.29 against 0.90 ms).
        groups = q.view(1, k.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(groups, key, value).reshape(1, -1)
    query = q.transpose(0, 1)[None]
    if other.splits:
        out = _attend_past_then_new(other.run, query, key, value)
    elif not other.blocks:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    else:
        out = torch.cat(
            [
                F.scaled_dot_product_attention(
                    query[:, :, a:b], key[:, :, :n], value[:, :, :n], mask, enable_gqa=True
                )
                for a, b, n, mask in other.blocks
            ],
            dim=2,
        )
    return out[0].transpose(0, 1).reshape(other.run.num_new, -1)


def _attend_past_then_new(run: _Run, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the cached keys and to the new ones, merged by their log-sum-exps.

    q: (1, H, n, D), k, v: (1, K, keys, D) -> (1, H, n, D). Neither part needs a mask, and a group's
    queries share the cached keys: 40 against 49 ms for 669 new of 2,846 keys (8 heads over 2,
    2 AVX2 cores).
    """
    past, groups = run.num_keys - run.num_new, q.shape[1] // k.shape[1]
    rows = q.reshape(1, k.shape[1], groups * run.num_new, -1)
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
