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
from vtts_rt.ops.linear import native_refuses
from vtts_rt.ops.packed import Matrix

MAX_ROWS = 256  # csrc/core/decode_step.h, kMaxStepRows
_OPS = ("linear", "paged_attention", "rmsnorm", "rotary_kv", "swiglu")


class LayerWeights(NamedTuple):
    """One layer: (C,); ((H + 2 K) D, C), (H + 2 K) D; (D,), (D,); (C, H D); (C,); (2 I, C); (C, I).
    None: no such bias, heads that are not normalised."""

    input_norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Matrix
    post_norm: Tensor
    gate_up: Matrix
    down: Matrix


class StepWeights(NamedTuple):
    """All layers as the native call takes them: addresses, good as long as nothing is moved.

    sizes: C, I, H, K, D. weight_dtype, packed: of all matrices.
    """

    layers: list[tuple[int, ...]]
    final_norm: int
    sizes: tuple[int, int, int, int, int]
    weight_dtype: str
    packed: bool


def usable(x: Tensor, head_dim: int) -> bool:
    """Whether a step of rows x (N, C) can be one call here: few of them, float32 or bfloat16 on the
    CPU, and every op would run its native kernel."""
    few = x.is_cpu and x.dtype in native.STORAGE and x.shape[0] <= MAX_ROWS
    fits = few and head_dim % 8 == 0 and head_dim <= native.MAX_HEAD_DIM
    ours = native.supports("cpu") is None and not interpreted()
    return fits and ours and not any(map(backend_override, _OPS))


def step_weights(
    layers: Sequence[LayerWeights],
    final_norm: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> StepWeights | None:
    """What `decode_step` takes of layers and the norm behind them, (C,). None where addresses and
    these sizes do not say all: other shapes, types and layouts than native kernels take."""
    sizes = len(final_norm), layers[0].down.shape[1], num_heads, num_kv_heads, head_dim
    channels, hidden, inner = sizes[0], sizes[1], num_heads * head_dim
    width = inner + 2 * num_kv_heads * head_dim
    shapes: tuple[tuple[int, ...], ...] = (
        *((channels,), (width, channels), (width,), (head_dim,), (head_dim,)),
        *((channels, inner), (channels,), (2 * hidden, channels), (channels, hidden)),
    )
    matrices = [m for layer in layers for m in layer if isinstance(m, Matrix)]
    vectors = [final_norm, *(v for layer in layers for v in layer if isinstance(v, Tensor))]
    kinds = {(m.weight_dtype, m.packed) for m in matrices}
    usual = (
        all(
            part is None or part.shape == s
            for layer in layers
            for part, s in zip(layer, shapes, strict=True)
        )
        and len(kinds) == 1
        and matrices[0].tensor.dtype in (final_norm.dtype, torch.int8)
        and native.refusal(*vectors, dtypes=native.STORAGE) is None
        and all(vector.is_contiguous() for vector in vectors)
        and not any(native_refuses(final_norm[None], matrix, None) for matrix in matrices)
    )
    if not usual:
        return None

    def numbers(part: Matrix | Tensor | None) -> tuple[int, ...]:
        if isinstance(part, Matrix):
            return part.address, native.address(part.scale)
        return (native.address(part),)

    rows = []
    for layer in layers:
        in_norm, qkv, bias, q_norm, k_norm, output, post_norm, gate_up, down = map(numbers, layer)
        rows.append(
            (*in_norm, *qkv, *bias, *q_norm, *k_norm, *output, 0, *post_norm, *gate_up, 0, *down, 0)
        )
    return StepWeights(rows, final_norm.data_ptr(), sizes, *kinds.pop())


def decode_step(
    x: Tensor,
    weights: StepWeights,
    *,
    pages: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    eps: float,
) -> Tensor:
    """Hidden states after the final norm; the pages are written in place.

    x: (N, C) contiguous, float32 or bfloat16 on the CPU, N at most MAX_ROWS. pages: (layers, 2,
    num_pages, page_size, K, D), contiguous, of x's dtype. cos, sin: (N, D/2) contiguous float32.
    slots: (N,) int64, page * page_size + offset of each row. page_table, cu_seqlens_q, seqlens_k:
    as for `paged_attention`.
    Returns (N, C). Raises ValueError on pages or slots outside the pool.
    """
    from vtts_rt import _C

    layers, final_norm, sizes, weight_dtype, packed = weights
    out = torch.empty_like(x)
    _C.decode_step(
        *(layers, final_norm, sizes, eps, sizes[-1] ** -0.5, x.data_ptr(), x.shape[0]),
        *(cos.data_ptr(), sin.data_ptr(), slots.data_ptr()),
        *(page_table.data_ptr(), page_table.shape[1], cu_seqlens_q.data_ptr()),
        *(seqlens_k.data_ptr(), page_table.shape[0], pages.data_ptr(), tuple(pages.shape[2:4])),
        *(out.data_ptr(), native.STORAGE[x.dtype], weight_dtype, packed),
        *(torch.get_num_threads(), "auto"),
    )
    return out
