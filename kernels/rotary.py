"""Rotary position embedding in place (vtts_rt/ops/rotary.py): a program turns some heads of a row.

Legend: N rows, H heads, D head dim. Arithmetic in float32, rounded once when stored.
"""

import torch
import triton
import triton.language as tl

# Heads of one program and its warps: 8 heads x 64 pairs give each of 64 lanes 8 neighbours, 16
# bytes of bfloat16, and rows of any number of heads leave at most 7 idle.
HEADS = 8
NUM_WARPS = 2


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    row_stride,
    head_stride,
    num_heads,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x: (N, H, D), D adjacent, turned in place; cos, sin: contiguous (N, D/2).

    HALF: D/2, known at compile time: the second halves of a tower's heads start 40 values after
    the first, which is aligned for loads of 16 bytes but no multiple of 16.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + row * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + row * HALF + column, mask=column < HALF, other=0.0)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    inside = (head < num_heads)[:, None] & (column < HALF)[None, :]
    place = x_ptr + row * row_stride + head.to(tl.int64)[:, None] * head_stride + column[None, :]
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (low * cos - high * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (high * cos + low * sin).to(x_ptr.dtype.element_ty), mask=inside)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: (N, H, D), D adjacent, rows and heads that do not overlap; cos, sin: contiguous
    (N, D/2). Turns x in place and returns it."""
    num_rows, num_heads, dim = x.shape
    if x.numel() > 0:
        sizes = {"HALF": dim // 2, "HEADS": HEADS, "BLOCK": triton.next_power_of_2(dim // 2)}
        rotary_kernel[(num_rows, triton.cdiv(num_heads, HEADS))](
            x, cos, sin, *x.stride()[:2], num_heads, **sizes, num_warps=NUM_WARPS
        )
    return x
