"""One softmax over several sets of keys from an attention result over each: the splits of
paged_attention and cascade_attention.

Legend: N rows, H query heads, D head dim.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_parts", "num_places"])
def merge_parts_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    num_parts,
    num_places,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts: (num_parts, num_places, D), part_lse: (num_parts, num_places) float32, a place being a
    row's head; out: (num_places, D). One program a place."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    feature = tl.arange(0, BLOCK_D)
    source = part * num_places + place
    lse = tl.load(part_lse_ptr + source, mask=part < num_parts, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(lse - top)
    total = tl.sum(weight, 0)
    # Parts without keys were not written.
    wanted = (lse > float("-inf"))[:, None] & (feature < HEAD_DIM)[None, :]
    where = parts_ptr + source[:, None] * HEAD_DIM + feature[None, :]
    values = tl.load(where, mask=wanted, other=0.0)
    out = tl.sum(values * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    target = out_ptr + place * HEAD_DIM + feature
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=feature < HEAD_DIM)


def merge_parts(parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor) -> None:
    """parts: (P, N, H, D), part_lse: (P, N, H) float32 -> out: (N, H, D)."""
    num_parts, num_rows, num_heads, head_dim = parts.shape
    if num_rows == 0:
        return
    most, block_d = (triton.next_power_of_2(n) for n in (num_parts, head_dim))
    sizes = {"HEAD_DIM": head_dim, "PARTS": most, "BLOCK_D": block_d}
    num_places = num_rows * num_heads
    merge_parts_kernel[(num_places,)](
        parts, part_lse, out, num_parts, num_places, **sizes, num_warps=num_warps(most * block_d)
    )


def num_warps(num_values: int) -> int:
    """Of merge_parts_kernel: 32 lanes with at most 64 values each, 4 to 16 warps."""
    return min(16, max(4, num_values // 2048))
