"""What the native float32 kernels have in common."""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from vtts_rt.config import backend_override

# Rows up to which a step counts as decoding (tokens and drafts of a few sequences): the weights'
# bytes are the cost then, and beyond arithmetic is.
MAX_ROWS = 16  # csrc/core/linear.h, kFewRows
MAX_HEAD_DIM = 256  # of attention; csrc/core/paged_attention.h, kMaxHeadDim


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
def tiles_refusal() -> str | None:
    """Why torch multiplies and attends more than MAX_ROWS rows of float32 by default, or None where
    the native tiles were measured to be faster."""
    if (reason := supports("cpu")) is not None:
        return reason
    from vtts_rt import _C

    if _C.cpu_is_intel():
        return "an Intel processor, where MKL runs its best code"
    if not _C.isa_supported("avx512"):
        return "no AVX-512, where tiles were not measured"
    return None


def most_rows(op: str) -> int:
    """Rows up to which the native kernel of `op` runs by default: MAX_ROWS, or any number. Who asks
    for a backend by VTTS_RT_BACKEND gets it for any number."""
    asked = backend_override(op) is not None
    return sys.maxsize if asked or tiles_refusal() is None else MAX_ROWS


def best_isa() -> str:
    """The instruction set that native kernels take here, or why there are none."""
    if (reason := supports("cpu")) is not None:
        return f"none ({reason})"
    from vtts_rt import _C

    found = next(isa for isa in ("neon", "avx512", "avx2", "scalar") if _C.isa_supported(isa))
    return f"{found} (the best of this processor)"


@lru_cache(maxsize=1)
def has_vectors() -> bool:
    """Whether the native kernels have vector instructions here; without, torch's are faster for
    more than MAX_ROWS rows."""
    from vtts_rt import _C

    return bool(_C.isa_supported("avx2") or _C.isa_supported("neon"))


def refusal(*tensors: Tensor) -> str | None:
    """Why tensors of any layout cannot be given to a native float32 kernel, or None."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return "a tensor that is not float32 on the CPU"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a tensor that needs a gradient"
    return None


# The extension has to be there before a process forks, to know in the child that it did.
supports("cpu")
