"""Attention to keys in pages: one kernel for prefill, for decoding and for shared prefixes.

The query heads of one key/value head times the rows of a sequence are the rows of a tile, so that a
key is read once for all of them: 16 rows where one token decodes, 128 in a prefill. Where tiles are
fewer than the GPU has room for, a sequence's keys are split among programs, each of which leaves a
partial result; `merge_parts` makes one of those. Grids and splits follow from numbers that the host
knows; a program whose sequence has nothing for it returns at once, so that a captured CUDA graph
stays right for shorter sequences.

Legend: N rows, S sequences, P most pages of one, H query heads, K key/value heads, D head dim.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vtts_rt.kernels.merge_parts import merge_parts

LOG2_E = 1.4426950408889634
MAX_SPLITS = 64  # a program of `merge_parts` holds a head's D values of all parts


@triton.jit(do_not_specialize=["num_tiles", "num_splits", "num_rows"])
def paged_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    bounds_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    q_row_stride,
    q_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    table_stride,
    scale,
    num_tiles,
    num_splits,
    num_rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q: strides in elements, D adjacent. table, bounds (cu_seqlens_q), lengths (seqlens_k): int32
    or int64; without bounds each sequence has one row. keys, values: laid out alike, D adjacent.
    scale: of the scores, times log2(e). num_tiles: most of a sequence; grid: (S * KV_HEADS *
    num_tiles, num_splits). out: contiguous (num_splits, N, H, D). A PARTIAL result has lse too:
    (num_splits, N, H), natural; what has no keys gets lse -inf, and out where the program had none
    is left as it is."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    # Last tiles first: they see the most keys, and short work evens out what is left at the end.
    tile = num_tiles - 1 - pid % num_tiles
    kv_head = (pid // num_tiles) % KV_HEADS
    sequence = pid // num_tiles // KV_HEADS
    start = sequence.to(tl.int64)
    count = 1
    if HAS_BOUNDS:
        start = tl.load(bounds_ptr + sequence).to(tl.int64)
        count = (tl.load(bounds_ptr + sequence + 1) - start).to(tl.int32)
    if tile * BLOCK_M >= count * GROUP:
        return
    num_keys = tl.load(lengths_ptr + sequence).to(tl.int32)
    # Rows count from the tile's first: offsets from there fit 32 bits, which spares registers.
    first_row = tile * BLOCK_M // GROUP
    member = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = member // GROUP - first_row
    head = member % GROUP
    used = row < count - first_row
    # What a row sees ends at `limit`; what all rows of the tile see at `common`, what any at `end`.
    if CAUSAL:
        common = num_keys - count + first_row + 1
        limit = common + row
        last_row = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, count - 1)
        end = common + last_row - first_row
    else:
        common = num_keys
        limit = tl.full((BLOCK_M,), 0, tl.int32) + num_keys
        end = num_keys
    share = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), num_splits) * BLOCK_N
    begin = split * share
    end = tl.minimum(end, begin + share)
    first_place = (split * num_rows + start + first_row) * (KV_HEADS * GROUP) + kv_head * GROUP
    place = row * (KV_HEADS * GROUP) + head
    out_ptr += first_place * HEAD_DIM
    lse_ptr += first_place
    if PARTIAL and begin >= end:
        tl.store(lse_ptr + place, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=used)
        return

    feature = tl.arange(0, BLOCK_D)
    wanted = used[:, None] & (feature < HEAD_DIM)[None, :]
    q_ptr += (start + first_row) * q_row_stride + kv_head.to(tl.int64) * GROUP * q_head_stride
    from_row = row * q_row_stride + head * q_head_stride
    q = tl.load(q_ptr + from_row[:, None] + feature[None, :], mask=wanted, other=0.0)
    FACTOR: tl.constexpr = tl.float32 if WIDE else q.dtype
    q = q.to(FACTOR)
    keys_ptr += kv_head.to(tl.int64) * head_stride
    values_ptr += kv_head.to(tl.int64) * head_stride
    table_ptr += sequence.to(tl.int64) * table_stride
    # Online softmax. top: largest score so far, in units of log(2); total, acc: sums of weights and
    # of weighted values.
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # First the whole blocks that every row sees, which need no mask.
    masked_from = begin + tl.maximum(tl.minimum(common, end) - begin, 0) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        for first in range(
            masked_from if MASKED else begin, end if MASKED else masked_from, BLOCK_N
        ):
            j = first + tl.arange(0, BLOCK_N)
            exists = j < end
            page = tl.load(table_ptr + j // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
            slot = page * page_stride + (j % PAGE_SIZE) * slot_stride
            where = slot[:, None] + feature[None, :]
            inside = exists[:, None] & (feature < HEAD_DIM)[None, :]
            key = tl.load(keys_ptr + where, mask=inside, other=0.0)
            value = tl.load(values_ptr + where, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(key.to(FACTOR)), input_precision="ieee") * scale
            if MASKED:
                scores = tl.where(j[None, :] < limit[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = new_top
            if MASKED:  # a row that sees no key yet: -inf - -inf is no number
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            rounded = weights.to(value.dtype).to(FACTOR)
            acc *= shrink[:, None]
            acc = tl.dot(rounded, value.to(FACTOR), acc, input_precision="ieee")
            top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out_ptr + place[:, None] * HEAD_DIM + feature[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=wanted)
    if PARTIAL:
        lse = (top + tl.log2(total)) * 0.6931471805599453  # -inf + -inf without a key
        tl.store(lse_ptr + place, lse, mask=used)


# -- what the host decides ----------------------------------------------------------------------


class Tiles(NamedTuple):
    """block_m: rows x heads of a tile; block_n: keys of a step; the rest as triton's options."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(num_members: int, head_dim: int, itemsize: int) -> Tiles:
    """Tile sizes for at most `num_members` rows x heads of a sequence.

    For bfloat16 and D 128 a block of keys and values takes 32 KB. 128 members do 128 flops a byte
    of them, enough for L2 and tensor cores to keep step on an H100: 64 accumulators a thread of 8
    warps, three blocks in flight beside 32 KB of queries, 132 KB of its 227. Fewer members wait for
    memory only: 72 KB (three programs an SM) up to 32 members, 83 KB (two) for 64. 5 stages are two
    blocks ahead, since the page is looked up before. sm_80 needs at most 99 of its 163 KB.
    float32 is multiplied without tensor cores: small tiles, or accumulators leave the registers.
    """
    block_m = min(128, max(16, triton.next_power_of_2(num_members)))
    if itemsize == 4:
        return Tiles(16, 32, 8, 2)
    if head_dim > 128:
        return Tiles(min(block_m, 64), 32, 8 if block_m > 32 else 4, 3)
    if block_m == 128:
        return Tiles(128, 64, 8, 5)
    return Tiles(block_m, 64, 4, 3 if block_m == 64 else 5)


def num_splits(num_programs: int, max_seqlen_k: int, num_sms: int, block_n: int) -> int:
    """Among how many programs a sequence's keys are split, when `num_programs` tiles have work.

    Two programs an SM keep enough loads in flight; less than two blocks of keys are not worth a
    partial result.
    """
    wanted = 2 * num_sms // max(num_programs, 1)
    return max(1, min(wanted, max_seqlen_k // (2 * block_n), MAX_SPLITS))


@lru_cache
def _num_sms(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter: any number, so that splitting can be tested
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


class Plan(NamedTuple):
    """One launch of the kernel: see `tiles` and `num_splits`; num_tiles of each sequence."""

    tiles: Tiles
    num_tiles: int
    num_splits: int


def plan(
    q: torch.Tensor, keys: torch.Tensor, num_sequences: int, max_seqlen_q: int, max_seqlen_k: int
) -> Plan:
    """From shapes and bounds alone."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    found = tiles(max_seqlen_q * group, head_dim, q.element_size())
    num_tiles = triton.cdiv(max_seqlen_q * group, found.block_m)
    # Each sequence's last tile may be partly filled.
    working = min(num_tiles * num_sequences, num_rows * group // found.block_m + num_sequences)
    sms = _num_sms(q.device)
    splits = num_splits(working * num_kv_heads, max_seqlen_k, sms, found.block_n)
    return Plan(found, num_tiles, splits)


def launch(
    plan: Plan,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    *,
    causal: bool,
) -> None:
    """cu_seqlens_q: None for one row a sequence. out: contiguous (plan.num_splits, N, H, D); lse:
    the same without D, float32, of a partial result. Without lse out is the whole result,
    (N, H, D), of one split. Features of q, keys and values adjacent."""
    num_rows, num_heads, head_dim = q.shape
    page_size, num_kv_heads = keys.shape[1:3]
    grid = (page_table.shape[0] * num_kv_heads * plan.num_tiles, plan.num_splits)
    if 0 in grid or num_rows == 0:
        return
    bounds = seqlens_k if cu_seqlens_q is None else cu_seqlens_q
    paged_attention_kernel[grid](
        *(q, keys, values, page_table, bounds, seqlens_k, out, out if lse is None else lse),
        *(*q.stride()[:2], *keys.stride()[:3], page_table.stride(0)),
        scale * LOG2_E,
        *(plan.num_tiles, plan.num_splits, num_rows),
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        HAS_BOUNDS=cu_seqlens_q is not None,
        CAUSAL=causal,
        PARTIAL=lse is not None,
        WIDE=triton.knobs.runtime.interpret,  # it would multiply the bits of bfloat16
        BLOCK_M=plan.tiles.block_m,
        BLOCK_N=plan.tiles.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=plan.tiles.num_warps,
        num_stages=plan.tiles.num_stages,
    )


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Bottom-right causal. Returns (N, H, D) in q's dtype."""
    chosen = plan(q, keys, page_table.shape[0], max_seqlen_q, max_seqlen_k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    inputs = (q, keys, values, page_table, cu_seqlens_q, seqlens_k)
    if chosen.num_splits == 1:
        launch(chosen, *inputs, out, None, scale, causal=True)
        return out
    parts = torch.empty((chosen.num_splits, *q.shape), dtype=torch.float32, device=q.device)
    lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    launch(chosen, *inputs, parts, lse, scale, causal=True)
    merge_parts(parts, lse, out)
    return out
