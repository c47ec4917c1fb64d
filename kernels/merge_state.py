"""One softmax over sets of keys, from an attention result over each: over two, which the op takes,
and over many of one buffer, the splits of paged_attention and cascade_attention.

Legend: N rows, H query heads, D head dim.
"""

import torch
import triton
import triton.language as tl

BLOCK_PLACES = 16  # rows x heads of a program: 2,048 values at D 128, 16 a thread of 4 warps


@triton.jit
def merge_state_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_places,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All contiguous; a place is a row's head. out: (num_places, D), lse: (num_places,)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < num_places
    lse_a = tl.load(lse_a_ptr + place, mask=exists, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + place, mask=exists, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp(lse_a - top)
    b = tl.exp(lse_b - top)
    total = a + b
    feature = tl.arange(0, BLOCK_D)
    where = place[:, None] * HEAD_DIM + feature[None, :]
    inside = (feature < HEAD_DIM)[None, :]
    # What stands beside a weight of zero was never computed and may be NaN.
    out_a = tl.load(out_a_ptr + where, mask=inside & (a > 0.0)[:, None], other=0.0)
    out_b = tl.load(out_b_ptr + where, mask=inside & (b > 0.0)[:, None], other=0.0)
    merged = out_a.to(tl.float32) * a[:, None] + out_b.to(tl.float32) * b[:, None]
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + where, merged.to(out_ptr.dtype.element_ty), mask=inside & exists[:, None])
    tl.store(lse_ptr + place, top + tl.log(total), mask=exists)


@triton.jit(do_not_specialize=["num_parts", "num_places"])
def merge_parts_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    num_places,
    HEAD_DIM: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts: (num_parts, num_places, D), part_lse: (num_parts, num_places) float32, a place being a
    row's head; out: (num_places, D), lse: (num_places,). One program a place."""
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
    if HAS_LSE:
        tl.store(lse_ptr + place, top + tl.log(total))


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_a, out_b: contiguous (N, H, D) of one dtype; lse_a, lse_b: contiguous (N, H) float32."""
    num_rows, num_heads, head_dim = out_a.shape
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    if out.numel() > 0:
        num_places = num_rows * num_heads
        merge_state_kernel[(triton.cdiv(num_places, BLOCK_PLACES),)](
            out_a,
            lse_a,
            out_b,
            lse_b,
            out,
            lse,
            num_places,
            HEAD_DIM=head_dim,
            BLOCK=BLOCK_PLACES,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=4,
        )
    return out, lse


def merge_parts(
    parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """parts: (P, N, H, D), part_lse: (P, N, H) float32 -> out: (N, H, D), lse: (N, H) float32."""
    num_parts, num_rows, num_heads, head_dim = parts.shape
    if num_rows == 0:
        return
    num_parts_block, block_d = (triton.next_power_of_2(n) for n in (num_parts, head_dim))
    merge_parts_kernel[(num_rows * num_heads,)](
        parts,
        part_lse,
        out,
        out if lse is None else lse,
        num_parts,
        num_rows * num_heads,
        HEAD_DIM=head_dim,
        HAS_LSE=lse is not None,
        PARTS=num_parts_block,
        BLOCK_D=block_d,
        num_warps=num_warps(num_parts_block * block_d),
    )


def num_warps(num_values: int) -> int:
    """Of merge_parts_kernel: 32 lanes with at most 64 values each, 4 to 16 warps."""
    return min(16, max(4, num_values // 2048))


def variants() -> list[dict]:
    """What is compiled ahead of time: heads of Qwen2.5-VL."""
    found = [
        {
            "name": "bf16, D 128, two states",
            "kernel": merge_state_kernel,
            "signature": {
                **dict.fromkeys(("out_a_ptr", "out_b_ptr", "out_ptr"), "*bf16"),
                **dict.fromkeys(("lse_a_ptr", "lse_b_ptr", "lse_ptr"), "*fp32"),
                "num_places": "i32",
            },
            "constexprs": {"HEAD_DIM": 128, "BLOCK": BLOCK_PLACES, "BLOCK_D": 128},
            "num_warps": 4,
            "unaligned": ("num_places",),
        }
    ]
    for parts in (4, 64, 128):
        names = ("parts_ptr", "part_lse_ptr", "lse_ptr")
        found.append(
            {
                "name": f"bf16, D 128, {parts} parts",
                "kernel": merge_parts_kernel,
                "signature": {
                    **dict.fromkeys(names, "*fp32"),
                    "out_ptr": "*bf16",
                    "num_parts": "i32",
                    "num_places": "i32",
                },
                "constexprs": {"HEAD_DIM": 128, "HAS_LSE": False, "PARTS": parts, "BLOCK_D": 128},
                "num_warps": num_warps(parts * 128),
                "unaligned": ("num_parts", "num_places"),
            }
        )
    return found
