"""RMSNorm with an optional residual add (vtts_rt/ops/rmsnorm.py), one program a row.

Legend: R rows, D features. Sums in float32 whatever the storage type.
"""

import torch
import triton
import triton.language as tl

MAX_FEATURES = 65536  # a row lives in one program's registers


@triton.jit
def rmsnorm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    num_features,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y, sum: contiguous (R, D). Row strides count elements; features are adjacent."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_features
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    h = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        # The sum is rounded to its storage type before it is normalised: what later layers see.
        total = (h + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * num_features + column, total, mask=inside)
        h = total.to(tl.float32)
    mean_square = tl.sum(h * h, axis=0) / num_features
    normed = h * (1.0 / tl.sqrt(mean_square + eps))
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    # Llama and Qwen round to the storage type before the weight is applied.
    y = (normed.to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    tl.store(y_ptr + row * num_features + column, y, mask=inside)


def num_warps(block: int) -> int:
    """32 lanes with at most 16 values each, 4 to 16 warps."""
    return min(16, max(4, block // 512))


def rmsnorm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual: (R, D), D adjacent, one dtype; weight: (D,). Returns (y, x + residual)."""
    num_rows, num_features = x.shape
    y = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    if num_rows > 0:
        block, added = triton.next_power_of_2(num_features), x if residual is None else residual
        rmsnorm_kernel[(num_rows,)](
            *(x, added, weight, y, total, x.stride(0), added.stride(0), num_features, eps),
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return y, total
