"""decode_step: all layers of a language model for a few rows in one native call.

What lies between kernels, some ten calls a layer, took 0.87 of the 1.02 ms of a step of `tiny`
and a tenth of the 118 M model's; in one call 0.24 of 0.35 ms, and a hundredth. The same kernels
run in the same order: the bits are those of calling them one by one.

Legend: N rows, C channels, H query heads, K key/value heads, D head dim, I hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtts_rt.config import backend_override
from vtts_rt.ops import native
from vtts_rt.ops.dispatch import interpreted

_OPS = ("linear", "paged_attention", "rmsnorm", "rotary", "swiglu")


class LayerWeights(NamedTuple):
    """One layer, all contiguous: (C,); ((H + 2 K) D, C), (H + 2 K) D; (D,), (D,); (C, H D); (C,);
    (2 I, C); (C, I). None: no such bias, heads that are not normalised."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


def usable(x: Tensor, head_dim: int) -> bool:
    """Whether a step of rows x (N, C) can be one call here: few of them, float32 on the CPU, and
    every op would run its native kernel."""
    few = x.is_cpu and x.dtype is torch.float32 and x.shape[0] <= native.MAX_ROWS
    fits = few and head_dim % 8 == 0 and head_dim <= native.MAX_HEAD_DIM
    ours = native.supports("cpu") is None and not interpreted()
    return fits and ours and not any(map(backend_override, _OPS))


def decode_step(
    x: Tensor,
    layers: Sequence[LayerWeights],
    final_norm: Tensor,
    *,
    pages: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Hidden states after the final norm; the pages are written in place.

    x: (N, C) contiguous float32 on the CPU, N at most MAX_ROWS; layers and final_norm (C,)
    likewise. pages: (layers, 2, num_pages, page_size, K, D), contiguous. cos, sin: (N, D/2).
    slots: (N,) int64, page * page_size + offset of each row. page_table, cu_seqlens_q, seqlens_k:
    as for `paged_attention`.
    Returns (N, C). Raises ValueError on pages or slots outside the pool.
    """
    from vtts_rt import _C

    num_pages, page_size, num_kv_heads, head_dim = pages.shape[2:]
    out = torch.empty_like(x)
    step, half = pages.stride(0) * 4, pages.stride(1) * 4  # bytes
    base = pages.data_ptr()
    _C.decode_step(
        [
            (*(0 if w is None else w.data_ptr() for w in layer), at, at + half)
            for layer, at in zip(layers, range(base, base + len(layers) * step, step), strict=True)
        ],
        final_norm.data_ptr(),
        (x.shape[1], layers[0].down.shape[1], num_heads, num_kv_heads, head_dim),
        eps,
        head_dim**-0.5,
        x.data_ptr(),
        x.shape[0],
        cos.data_ptr(),
        sin.data_ptr(),
        slots.data_ptr(),
        page_table.data_ptr(),
        page_table.shape[1],
        cu_seqlens_q.data_ptr(),
        seqlens_k.data_ptr(),
        page_table.shape[0],
        (num_pages, page_size),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
