"""merge_state: one softmax over two sets of keys, from an attention result over each.

    lse = log(exp(lse_a) + exp(lse_b));  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

Legend: N rows, H query heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops.dispatch import Backend, register, triton_supports
from vtts_rt.types import require


def merge_state_ref(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The equation in lse's dtype. A set without keys (-inf) counts for nothing, and two of them
    give zeros and -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros_like(out_a, dtype=lse.dtype)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.where(part_lse == -torch.inf, 0.0, (part_lse - lse).exp())
        # What stands beside a weight of zero was never computed and may be NaN.
        out += torch.where(weight[..., None] > 0, weight[..., None] * part.to(lse.dtype), 0.0)
    return out, lse


def _torch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = merge_state_ref(out_a, lse_a, out_b, lse_b)
    return out.to(out_a.dtype), lse


def _triton(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    from vtts_rt.kernels import merge_state as kernel

    states = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    out, lse = kernel.merge_state(*states)
    return out, lse


_OP = register(
    "merge_state",
    Backend("triton", triton_supports, _triton),
    Backend("reference", lambda device: None, _torch),
)


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge two partial attention results of the same queries.

    out_a, out_b: (N, H, D) of one float dtype; lse_a, lse_b: (N, H) float32, natural log-sum-exps
    of the scores, -inf where a part has no keys: its output is not looked at then. All on one
    device.
    backend: "auto", "triton" (CUDA tensors) or "reference" (eager torch, any device).

    Returns (out, lse): (N, H, D) of out_a's dtype, zeros where both parts have no keys, and (N, H)
    float32.
    Raises ValueError on shapes or dtypes that do not match, RuntimeError on an unusable backend.
    """
    shape, device = out_a.shape, out_a.device
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    require("merge_state", "out_a", tuple(shape), out_a.dim() == 3, "(N, H, D)")
    require("merge_state", "dtype", out_a.dtype, out_a.dtype in dtypes, "a float of up to 32 bits")
    for name, tensor, size, dtype in (
        ("out_b", out_b, shape, out_a.dtype),
        ("lse_a", lse_a, shape[:2], torch.float32),
        ("lse_b", lse_b, shape[:2], torch.float32),
    ):
        if (tensor.shape, tensor.dtype, tensor.device) != (size, dtype, device):
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            require("merge_state", name, got, False, f"{tuple(size)} {dtype} on {device}")
    out, lse = _OP.resolve(device.type, backend).run(out_a, lse_a, out_b, lse_b)
    return out, lse
