"""Helpers of the native kernels."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

# How tensors may be stored: arithmetic is float32, whatever it is.
STORAGE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

MAX_HEAD_DIM = 256  # of attention; csrc/core/head_attention.h, kMaxHeadDim


def supports(device: str) -> str | None:
    """`Backend.supports` of the native kernels: None, or why not."""
    if device != "cpu":
        return f"tensors are on {device}"
    try:
        from vtts_rt import _C  # noqa: F401
    except ImportError as error:
        return f"vtts_rt._C is not built ({error}); see `vtts-rt env`"
    return None


def best_isa() -> str:
    """The instruction set that native kernels take here, or why there are none."""
    if (reason := supports("cpu")) is not None:
        return f"none ({reason})"
    from vtts_rt import _C

    isas = "neon", "amx", "avx512_bf16", "avx512", "avx2", "scalar"
    found = next(isa for isa in isas if _C.isa_supported(isa))
    return f"{found} (the best of this processor)"


def bfloat16_isa() -> str | None:
    """The instruction set that multiplies bfloat16 here, so that it is faster than float32; None
    where numbers are widened."""
    if supports("cpu") is not None:
        return None
    from vtts_rt import _C

    return next((isa for isa in ("amx", "avx512_bf16") if _C.isa_supported(isa)), None)


def refusal(
    *tensors: Tensor | None, dtypes: Collection[torch.dtype] = (torch.float32,)
) -> str | None:
    """Why tensors of any layout, of one type of `dtypes`, cannot be given to a native kernel, or
    None."""
    found = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.dtype in dtypes and tensor.is_cpu for tensor in found):
        return f"a tensor that is not {' or '.join(STORAGE[d] for d in dtypes)} on the CPU"
    if any(tensor.dtype is not found[0].dtype for tensor in found):
        return "tensors of different types"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in found):
        return "a tensor that needs a gradient"
    return None


def address(tensor: Tensor | None) -> int:
    """Where a tensor's values lie, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def prefer_huge_pages(tensor: Tensor) -> None:
    """Hint that memory which is about to be written whole, and read often, lies on huge pages."""
    if supports(tensor.device.type) is None:
        from vtts_rt import _C

        _C.prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)


def adjacent(tensor: Tensor) -> Tensor:
    """A tensor whose last stride is 1, copied only where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """(..., C) -> (R, C) with adjacent values, copied only where strides demand it."""
    return adjacent(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


# The extension has to be there before a process forks, to know in the child that it did.
supports("cpu")
