"""The gate of a gated MLP (vtts_rt/ops/swiglu.py): a program does a block of one row.

Legend: N rows, I hidden channels. Arithmetic in float32, rounded once when stored.
"""

import torch
import triton
import triton.language as tl

# 8 neighbours for each of 128 lanes: loads of 16 bytes of bfloat16, and 4 to 19 blocks a row.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def swiglu_kernel(x_ptr, out_ptr, NUM_HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """x: (N, 2 I) rows [gate; up], out: (N, I), both contiguous.

    NUM_HIDDEN: I, known at compile time: that of the vision tower (3420) is a multiple of 4 only,
    which is enough for loads of 8 bytes, but not said by an argument at run time.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < NUM_HIDDEN
    place = x_ptr + row * (2 * NUM_HIDDEN) + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + NUM_HIDDEN, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * NUM_HIDDEN + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x: contiguous (N, 2 I). Returns (N, I)."""
    num_rows, num_hidden = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_rows, num_hidden), dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        swiglu_kernel[(num_rows, triton.cdiv(num_hidden, BLOCK))](
            x, out, NUM_HIDDEN=num_hidden, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out
