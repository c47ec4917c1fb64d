"""rotary_kv: rotary position embedding of queries and keys, keys and values into their pages.

    q[n, h]                  = turn(qkv[n, h], cos[n], sin[n])           h < H
    keys[slot_mapping[n]]    = turn(qkv[n, H + j], cos[n], sin[n])       j < K
    values[slot_mapping[n]]  = qkv[n, H + K + j]

with `turn` of `rotary`: the steps between the qkv product and attention, in one sweep.

Legend: N rows, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_supports
from vtts_rt.ops.rotary import rotary, rotary_ref
from vtts_rt.types import require


def rotary_kv_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equation in float64: the yardstick of the backends. Returns (q, keys, values) float64,
    copies of the pools."""
    num_kv_heads = keys.shape[2]
    turned = rotary_ref(qkv[:, :-num_kv_heads], cos, sin)
    keys, values = keys.double(), values.double()
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, keys.shape[1])
            keys[page, offset] = turned[row, num_heads:]
            values[page, offset] = qkv[row, -num_kv_heads:].double()
    return turned[:, :num_heads], keys, values


def _torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Tensor:
    num_kv_heads, slots = keys.shape[2], slot_mapping.long()
    turned = rotary(qkv[:, :-num_kv_heads], cos, sin, backend="torch")
    pools = ((keys, turned[:, num_heads:]), (values, qkv[:, -num_kv_heads:]))
    is_real = slots >= 0
    if len(slots):
        # Without asking the host how many rows are real: padding repeats the first real row or,
        # where there is none, writes what is in slot 0.
        every_row = torch.arange(len(slots), device=slots.device)
        rows = torch.where(is_real, every_row, is_real.int().argmax())
        slots = slots[rows].clamp(min=0)
        for pool, new in pools:
            slot_rows = pool.flatten(0, 1)
            new = torch.where(is_real.any(), new[rows].to(pool.dtype), slot_rows[slots])
            slot_rows.index_copy_(0, slots, new)
    return turned[:, :num_heads].contiguous()


def _triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, heads: int
) -> Tensor:
    from vtts_rt.kernels import rotary_kv as kernel

    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    return kernel.rotary_kv(qkv, cos, sin, keys, values, slots, heads)  # type: ignore[no-any-return]


def _native(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, heads: int
) -> Tensor:
    from vtts_rt import _C

    cos, sin, slots = (x.contiguous() for x in (cos.float(), sin.float(), slots.long()))
    _C.rotary_kv(
        *(qkv.data_ptr(), qkv.stride(0), qkv.shape[0], heads),
        *(cos.data_ptr(), sin.data_ptr(), slots.data_ptr()),
        *((keys.shape[0] * keys.shape[1], *keys.shape[2:]), keys.data_ptr(), values.data_ptr()),
        *(torch.get_num_threads(), "auto", native.STORAGE[qkv.dtype]),
    )
    return qkv[:, :heads]


def _native_refuses(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, heads: int
) -> str | None:
    num_rows, num_heads, dim = qkv.shape
    if num_rows > 1 and qkv.stride(0) < num_heads * dim:
        return "rows that overlap"
    return native.refusal(qkv, keys, values, dtypes=native.STORAGE)


_OP = register(
    "rotary_kv",
    Backend("triton", triton_supports, _triton),
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("torch", anything, _torch),
)


def rotary_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    backend: str = "auto",
) -> Tensor:
    """Turn queries and keys, write keys and values into a layer's pages. May overwrite qkv.

    qkv: (N, H + 2 K, D) [queries; keys; values], D even, any float dtype and row stride, a row's
        values adjacent. cos, sin: (N, D/2) of one float dtype, the angles of each row (M-RoPE's
        sections are in them). keys, values: (num_pages, page_size, K, D) of one float dtype,
        contiguous. slot_mapping: (N,) int64 or int32, page * page_size + offset, below num_pages *
        page_size ("cpu" alone checks it: elsewhere the host would wait); negative: a row of
        padding, written nowhere. Slots that are not negative differ. num_heads: H. All on one
        device.
    backend: "auto", "triton" (CUDA tensors; arithmetic in float32), "cpu" (native: float32 or
        bfloat16, the pages too, rows that do not overlap) or "torch" (arithmetic in the dtype of
        cos). No gradients are recorded.

    Returns q (N, H, D) in qkv's dtype, the heads of a row adjacent, padding rows turned like the
    others.
    Raises ValueError on shapes, dtypes or layouts that do not match and on tensors that a backend
    asked for by name does not take, RuntimeError on an unusable
    backend.
    """
    _check(qkv, cos, sin, keys, values, slot_mapping, num_heads)
    call = (qkv, cos, sin, keys, values, slot_mapping, num_heads)
    with torch.no_grad():
        q: Tensor = _OP(qkv.device.type, backend, *call)
    return q


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor, heads: int
) -> None:
    ask = partial(require, "rotary_kv")
    fits = keys.dim() == 4 and keys.is_contiguous() and keys.is_floating_point()
    ask("keys", tuple(keys.shape), fits, "(pages, page_size, K, D), contiguous floats")
    same = (values.shape, values.dtype) == (keys.shape, keys.dtype) and values.is_contiguous()
    ask("values", (*values.shape, values.dtype), same, f"{(*keys.shape, keys.dtype)}, contiguous")
    all_heads, dim = heads + 2 * keys.shape[2], keys.shape[3]
    fits = qkv.dim() == 3 and qkv.shape[1:] == (all_heads, dim) and qkv.is_floating_point()
    ask("qkv", tuple(qkv.shape), fits and dim % 2 == 0, f"floats (N, {all_heads}, {dim}), D even")
    packed = qkv.numel() == 0 or qkv.stride()[1:] == (dim, 1)
    ask("qkv's strides", qkv.stride(), packed, f"(any, {dim}, 1)")
    shape = (qkv.shape[0], dim // 2)
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.shape == shape and angles.is_floating_point() and angles.dtype is cos.dtype
        ask(name, (*angles.shape, angles.dtype), fits, f"{shape} of one float dtype")
    fits = slots.shape == shape[:1] and slots.dtype in (torch.int64, torch.int32)
    ask("slot_mapping", (*slots.shape, slots.dtype), fits, f"({shape[0]},) int64 or int32")
    devices = {str(x.device) for x in (qkv, cos, sin, keys, values, slots)}
    ask("devices", sorted(devices), len(devices) == 1, "one device")
