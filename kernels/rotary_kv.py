"""Rotary position embedding of queries and keys, and keys and values into their pages: a program
does some heads of one row.

Legend: N rows, H query heads, K key/value heads, D head dim. Arithmetic in float32, rounded once
when stored.
"""

import torch
import triton
import triton.language as tl

# Heads of one program and its warps: 8 heads x 64 pairs give each of 64 lanes 8 neighbours, 16
# bytes of bfloat16; 3B's 20 heads and 7B's 36 of a row take 3 and 5 programs.
HEADS = 8
NUM_WARPS = 2


@triton.jit
def rotary_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    slot_ptr,
    qkv_stride,
    num_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """qkv: (N, H + 2 K, D), rows qkv_stride apart; cos, sin: (N, D/2); q: (N, H, D); keys, values:
    (slots, K, D); slot: (N,), negative for a row whose key and value go nowhere. HALF: D/2."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + row * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * HALF + column, mask=column < HALF, other=0.0)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    slot = tl.load(slot_ptr + row).to(tl.int64)
    num_written = tl.where(slot >= 0, num_kv_heads, 0)

    in_half = (column < HALF)[None, :]
    inside = (head < num_heads + 2 * num_kv_heads)[:, None] & in_half
    place = qkv_ptr + row * qkv_stride + head[:, None] * (2 * HALF) + column[None, :]
    low = tl.load(place, mask=inside, other=0.0)
    high = tl.load(place + HALF, mask=inside, other=0.0)
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    turned_low = wide_low * cos - wide_high * sin
    turned_high = wide_high * cos + wide_low * sin

    is_query = (head < num_heads)[:, None] & in_half
    q = q_ptr + (row * num_heads + head)[:, None] * (2 * HALF) + column[None, :]
    tl.store(q, turned_low.to(q_ptr.dtype.element_ty), mask=is_query)
    tl.store(q + HALF, turned_high.to(q_ptr.dtype.element_ty), mask=is_query)

    kv_head = head - num_heads
    is_key = ((kv_head >= 0) & (kv_head < num_written))[:, None] & in_half
    key = keys_ptr + (slot * num_kv_heads + kv_head)[:, None] * (2 * HALF) + column[None, :]
    tl.store(key, turned_low.to(keys_ptr.dtype.element_ty), mask=is_key)
    tl.store(key + HALF, turned_high.to(keys_ptr.dtype.element_ty), mask=is_key)

    kv_head -= num_kv_heads
    is_value = ((kv_head >= 0) & (kv_head < num_written))[:, None] & in_half
    value = values_ptr + (slot * num_kv_heads + kv_head)[:, None] * (2 * HALF) + column[None, :]
    tl.store(value, low.to(values_ptr.dtype.element_ty), mask=is_value)
    tl.store(value + HALF, high.to(values_ptr.dtype.element_ty), mask=is_value)


def rotary_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """qkv: (N, H + 2 K, D), a row's values adjacent; cos, sin: contiguous (N, D/2); keys, values:
    contiguous (pages, page_size, K, D), written in place; slot_mapping: contiguous (N,).
    Returns q (N, H, D)."""
    num_rows, all_heads, dim = qkv.shape
    q = torch.empty((num_rows, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    if num_rows > 0:
        sizes = {"HALF": dim // 2, "HEADS": HEADS, "BLOCK": triton.next_power_of_2(dim // 2)}
        rotary_kv_kernel[(num_rows, triton.cdiv(all_heads, HEADS))](
            *(qkv, cos, sin, q, keys, values, slot_mapping),
            *(qkv.stride(0), num_heads, keys.shape[2]),
            **sizes,
            num_warps=NUM_WARPS,
        )
    return q
