"""Attention over a token tree, as transformers' attention implementation "vtts_tree".

    out[q] = softmax_k(q . k * scaling) v[k],   k with k <= q < end[k]

On a CPU a run (nodes that the same nodes see) gives two calls of torch's flash kernel: causal on
itself, and all its descendants onto its keys. Results are merged by their log-sum-exp, and a call's
backward pass takes the merged output and log-sum-exp, which makes its probabilities those of the
whole softmax. Neither a mask nor joined keys exist. On a GPU FlexAttention gets `end` as its mask.

Legend: M nodes, H query heads, K key/value heads, R = H / K, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.types import require

NAME = "vtts_tree"
# FlexAttention skips blocks of this many queries and keys (its default).
BLOCK = 128


class _Call(NamedTuple):
    """Queries [first, stop) onto keys [key, key_stop)."""

    first: int
    stop: int
    key: int
    key_stop: int

    @property
    def causal(self) -> bool:
        return self.first == self.key


class TreeAttention:
    """The plan of one forward pass, handed to a model as its keyword `vtts_tree`.

    num_calls: how often a layer has used it.
    """

    def __init__(self, end: np.ndarray, device: torch.device) -> None:
        """end: (M,) int64, of `TokenTree`. device: of the model."""
        self.num_calls = 0
        self._num_tokens = len(end)
        self._calls = _calls(end)
        self._mask = None if device.type == "cpu" else interval_mask(end, device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q: (1, H, M, D); k, v: (1, K, M, D), one dtype -> (1, M, H, D)."""
        shape, num = tuple(q.shape), self._num_tokens
        require(NAME, "q", shape, shape[0] == 1 and shape[2] == num, f"one row of {num} tokens")
        self.num_calls += 1
        if self._mask is None:
            out: Tensor = _Merged.apply(q, k, v, self._calls, scaling)  # type: ignore[no-untyped-call]
            return out
        return flex(q, k, v, self._mask, scaling)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    vtts_tree: TreeAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call; without a tree its `sdpa`."""
    if vtts_tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    require(NAME, "dropout", dropout, not dropout, "0: branches would not see one trunk")
    require(NAME, "attention_mask", "a mask", attention_mask is None, "None beside a tree")
    window = kwargs.get("sliding_window")
    require(NAME, "sliding_window", window, window is None, "None: a tree has no windows")
    # Under autocast rotary leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return vtts_tree(query, key, value, scale), None


def register() -> None:
    """Make "vtts_tree" an attention implementation of transformers, with the masks of its sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


# -- flash kernels, call by call ----------------------------------------------------------------


def _calls(end: np.ndarray) -> list[_Call]:
    """Those onto their own run first: they write what the others are merged with."""
    edges = np.flatnonzero(np.diff(end, prepend=-1, append=-1)).tolist()
    runs = [(a, b, int(end[a])) for a, b in zip(edges, edges[1:], strict=False)]
    own = [_Call(a, b, a, b) for a, b, _ in runs]
    return own + [_Call(b, last, a, b) for a, b, last in runs if last > b]


def _grouped(x: Tensor, num_kv_heads: int, repeats: int) -> Tensor:
    """(1, H or K, M, D) -> (R, K, M, D) without a copy: head k * R + r is [r, k]."""
    if x.shape[1] == num_kv_heads:
        return x.expand(repeats, -1, -1, -1)
    return torch.unflatten(x[0], 0, (num_kv_heads, repeats)).transpose(0, 1)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: list[_Call], scale: float
    ) -> Tensor:
        num_kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
        groups = [_grouped(x, num_kv_heads, repeats) for x in (q, k, v)]
        out = q.new_empty((q.shape[2], q.shape[1], v.shape[3]), dtype=torch.float32)
        merged = _grouped(out.transpose(0, 1)[None], num_kv_heads, repeats)
        lse = q.new_empty(groups[0].shape[:3], dtype=torch.float32)
        for call in calls:
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_sliced(groups, call), 0.0, call.causal, scale=scale
            )
            before, rows = lse[:, :, call.first : call.stop], merged[:, :, call.first : call.stop]
            if call.causal:
                before.copy_(part_lse)
                rows.copy_(part)
            else:
                both = torch.logaddexp(before, part_lse)
                rows.mul_((before - both).exp_()[..., None])
                rows.addcmul_(part, (part_lse - both).exp_()[..., None])
                before.copy_(both)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        num_kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
        groups = [_grouped(x, num_kv_heads, repeats) for x in (q, k, v)]
        grad, out = (_grouped(x.transpose(1, 2), num_kv_heads, repeats) for x in (grad, out[None]))
        # Gradients stand as queries, keys and values do: tokens first.
        sums = [x.new_zeros(x.shape[2], *x.shape[1::2], dtype=torch.float32) for x in (q, k, v)]
        by_head = [x.transpose(0, 1)[None] for x in sums]
        of_q = _grouped(by_head[0], num_kv_heads, repeats)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for call in ctx.calls:
            rows = slice(call.first, call.stop)
            parts = backward(
                grad[:, :, rows],
                *_sliced(groups, call),
                out[:, :, rows],
                lse[:, :, rows],
                0.0,
                call.causal,
                scale=ctx.scale,
            )
            of_q[:, :, rows] += parts[0]
            for total, part in zip(by_head[1:], parts[1:], strict=True):
                total[0, :, call.key : call.key_stop] += part.sum(0, dtype=torch.float32)
        return (*(x.to(q.dtype) for x in by_head), None, None)


def _sliced(groups: list[Tensor], call: _Call) -> Iterator[Tensor]:
    q, k, v = groups
    yield q[:, :, call.first : call.stop]
    yield k[:, :, call.key : call.key_stop]
    yield v[:, :, call.key : call.key_stop]


# -- FlexAttention --------------------------------------------------------------------------------


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float) -> Tensor:
    """As `TreeAttention`, by FlexAttention with an `interval_mask`."""
    num_tokens = q.shape[2]
    more = mask.shape[-1] - num_tokens
    q, k, v = (F.pad(x, (0, 0, 0, more)) for x in (q, k, v))
    attend = _flex_attention(q.is_cpu)
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True)
    return out[:, :, :num_tokens].transpose(1, 2)


@cache
def _flex_attention(eager: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if eager else torch.compile(flex_attention)


def interval_mask(end: np.ndarray, device: torch.device) -> Any:
    """FlexAttention's BlockMask of k <= q < end[k], from the intervals alone.

    Rows are filled up to a multiple of 128, of 1/8 of the next smaller power of two where that is
    more, so that few lengths are compiled; what fills them sees itself.
    """
    from torch.nn.attention.flex_attention import BlockMask

    step = max(BLOCK, 1 << max(len(end).bit_length() - 4, 0))
    num_rows = -(-len(end) // step) * step
    whole = np.concatenate((end, np.arange(len(end), num_rows) + 1))
    block = np.arange(num_rows // BLOCK)
    by_block = whole.reshape(-1, BLOCK)
    below = block[:, None] > block  # the queries' block is behind the keys'
    full = below & ((block[:, None] + 1) * BLOCK <= by_block.min(1))
    some = below & (block[:, None] * BLOCK < by_block.max(1)) & ~full
    np.fill_diagonal(some, True)
    ends = torch.from_numpy(whole).to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    def table(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~chosen, axis=1, kind="stable")
        counts = torch.from_numpy(chosen.sum(1).astype(np.int32))
        indices = torch.from_numpy(order.astype(np.int32))
        return counts[None, None].to(device), indices[None, None].to(device)

    return BlockMask.from_kv_blocks(
        *table(some), *table(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(num_rows,) * 2
    )
