"""What the native float32 kernels have in common."""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

# Rows up to which a step counts as decoding (tokens and drafts of a few sequences): the weights'
# bytes are the cost then, and beyond arithmetic is.
MAX_ROWS = 16


def supports(device: str) -> str | None:
    """`Backend.supports` of the native kernels: None, or why not."""
    if device != "cpu":
        return f"tensors are on {device}"
    try:
        from vtts_rt import _C  # noqa: F401
    except ImportError as error:
        return f"vtts_rt._C is not built ({error}); see `vtts-rt env`"
    return None


@lru_cache(maxsize=1)
def most_rows() -> int:
    """Rows up to which the native kernels run by default: MAX_ROWS, or any number where the tiles
    of many rows beat torch, which is with AVX-512 on a processor that is not Intel's (MKL runs AVX2
    code there). Not measured elsewhere."""
    if supports("cpu") is not None:
        return MAX_ROWS
    from vtts_rt import _C

    beaten = _C.isa_supported("avx512") and not _C.cpu_is_intel()
    return sys.maxsize if beaten else MAX_ROWS


def refusal(*tensors: Tensor) -> str | None:
    """Why tensors of any layout cannot be given to a native float32 kernel, or None."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return "a tensor that is not float32 on the CPU"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a tensor that needs a gradient"
    return None
