"""Backend "torch" of paged_attention: scaled_dot_product_attention, sequence by sequence.

Pages that are neighbours are read without a copy.

Legend: N rows of all sequences, n of one, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

# The operator behind scaled_dot_product_attention on a CPU: (output, log-sum-exp of the scores).
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
QUERY_BLOCK = 1024  # query rows that share one mask: bounds the mask, skips keys of the future


def paged_sdpa(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Iterable[tuple[int, int, list[int], int]],
    scale: float,
) -> Tensor:
    """q: (N, H, D), keys, values: (num_pages, page_size, K, D). sequences: (first row, row after
    the last, pages, keys) of each, in order. Returns (N, H, D) in q's dtype."""
    page_size = keys.shape[1]
    outputs = [q[:0]]
    for start, stop, pages, num_keys in sequences:
        if start == stop:
            continue
        if pages == list(range(pages[0], pages[0] + len(pages))):
            first = pages[0] * page_size
            key, value = (x.flatten(0, 1)[first : first + num_keys] for x in (keys, values))
        else:
            slots = torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)
            slots = slots.flatten()[:num_keys].to(keys.device)
            key, value = (x.flatten(0, 1).index_select(0, slots) for x in (keys, values))
        outputs.append(_attend(q[start:stop], key.to(q.dtype), value.to(q.dtype), scale))
    return outputs[1] if len(outputs) == 2 else torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q: (n, H, D), the last of the sequence, k, v: (num_keys, K, D) -> (n, H, D)."""
    num_new, num_keys = q.shape[0], k.shape[0]
    key, value = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, K, keys, D)
    if num_new == 1:
        # The query heads of a group become query rows: keys are read once a group, which is
        # 3x faster than enable_gqa on a CPU (2,700 keys, 8 heads over 2: 0.29 against 0.90 ms).
        groups = q.reshape(1, k.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(groups, key, value, scale=scale).reshape(q.shape)
    query = q.transpose(0, 1)[None]
    if num_new == num_keys:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    elif q.is_cpu and q.dtype == torch.float32:
        # The operator that also gives log-sum-exps is a CPU's; halves would round once more.
        out = _attend_past_then_new(query, key, value, num_keys - num_new, scale)
    else:
        blocks = []
        for a in range(0, num_new, QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, num_new)
            seen = num_keys - num_new + b
            own = query[:, :, a:b], key[:, :, :seen], value[:, :, :seen]
            mask = _causal_mask(b - a, seen, q.dtype, q.device)
            blocks.append(F.scaled_dot_product_attention(*own, mask, scale=scale, enable_gqa=True))
        out = torch.cat(blocks, dim=2)
    return out[0].transpose(0, 1)


def _attend_past_then_new(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Attention to the first `past` keys and to the new ones, merged by their log-sum-exps.

    q: (1, H, n, D), k, v: (1, K, keys, D) -> (1, H, n, D). Neither part needs a mask, and a group's
    queries share the cached keys: 40 against 49 ms for 669 new of 2,846 keys (8 heads over 2,
    2 AVX2 cores).
    """
    groups = q.shape[1] // k.shape[1]
    rows = q.reshape(1, k.shape[1], groups * q.shape[2], -1)
    old, old_lse = _FLASH(rows, k[:, :, :past], v[:, :, :past], scale=scale)
    new_keys, new_values = (x[:, :, past:].repeat_interleave(groups, 1) for x in (k, v))
    new, new_lse = _FLASH(q, new_keys, new_values, is_causal=True, scale=scale)
    share = torch.sigmoid(old_lse.reshape(new_lse.shape) - new_lse)[..., None]
    return torch.lerp(new, old.reshape(new.shape), share)


@lru_cache(maxsize=4)
def _causal_mask(
    num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(queries, keys): 0 where query i may see key j, i.e. j <= i + keys - queries, else -inf.

    Kept for the layers of a pass: the last chunk of a prompt has two blocks."""
    with torch.inference_mode(False):
        mask = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device)
        return mask.triu_(num_keys - num_queries + 1)
