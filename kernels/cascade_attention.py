"""Decoding rows whose sequences share leading pages of keys: one reading of those a group.

The kernel of paged_attention runs twice, over the shared keys with a group's rows x heads as the
tile, and over each row's own keys; both leave partial results side by side, of which one launch of
`merge_parts` makes one.

Legend: N rows, S groups, H query heads, D head dim.
"""

import torch

from vtts_rt.kernels.merge_parts import merge_parts
from vtts_rt.kernels.paged_attention import launch, plan


def cascade_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    shared_table: torch.Tensor,
    shared_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    page_table: torch.Tensor,
    seqlens_k: torch.Tensor,
    max_shared: int,
    max_seqlen_k: int,
    scale: float,
) -> torch.Tensor:
    """Returns (N, H, D) in q's dtype. Features of q, keys and values adjacent."""
    num_rows = q.shape[0]
    # Groups that share enough have at least 4 rows (find_groups); the others are no work to split.
    num_groups = min(shared_table.shape[0], max(1, num_rows // 4))
    shared = plan(q, keys, num_groups, num_rows, max_shared)
    own = plan(q, keys, num_rows, 1, max_seqlen_k)
    num_parts = shared.num_splits + own.num_splits
    parts = torch.empty((num_parts, *q.shape), dtype=torch.float32, device=q.device)
    lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    for chosen, begin, table, bounds, lengths in (
        (shared, 0, shared_table, cu_groups, shared_seqlens),
        (own, shared.num_splits, page_table, None, seqlens_k),
    ):
        # A row's own keys are all in its past: none needs the causal mask.
        results = (parts[begin:], lse[begin:])
        launch(chosen, q, keys, values, table, bounds, lengths, *results, scale, causal=False)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    merge_parts(parts, lse, out)
    return out
