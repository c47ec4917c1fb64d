"""paged_attention: the new tokens of each sequence attend to all its keys, which lie in pages.

    out[i, h] = softmax_j(scale * q[i, h] . key_j[h // (H / K)]) value_j[h // (H / K)]

where row i of a sequence with n rows and m keys sees the keys j <= m - n + i (bottom-right causal).
Key j lies in page page_table[s, j // page_size], slot j % page_size.

Torch's operators (paged_sdpa.py) take one sequence after the other. The native kernel computes in
float32, whatever is stored, and takes keys in blocks of 256: a row's values are the same to the bit
however a prompt is cut into chunks, whatever other rows and sequences stand beside it and however
many threads run. One core (AMD EPYC, AVX2) takes 68 ms for 2,146 tokens of 8 heads over 2 x 64
where torch's operators take 103, 69 instead of 91 for 540 tokens that continue 4,019, and 0.28
instead of 0.61 for one with 3,000 keys; in bfloat16 68 (105), 68 (112) and 0.24 (0.54).

The Triton kernels (kernels/paged_attention.py) take any page size, never ask the device for a
number and split the keys of few rows among programs; a row's last bits then depend on how many
sequences stand beside it and on the longest one.

Legend: N rows of all sequences, S sequences, P most pages of one, H query heads, K key/value heads,
D head dim.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import (
    Backend,
    Choice,
    anything,
    devices,
    register,
    triton_supports,
)
from vtts_rt.ops.paged_sdpa import paged_sdpa
from vtts_rt.ops.pages import check_indices, check_pool, check_sequences, pages_refused


def paged_attention_ref(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """The equation, sequence by sequence, in q's dtype. Arguments, result as `paged_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    page_size, groups = keys.shape[1], q.shape[1] // keys.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = cu_seqlens_q.tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        num_keys = int(seqlens_k[s])
        pages = page_table[s, : -(-num_keys // page_size)].to(keys.device)
        key, value = (
            pool[pages].flatten(0, 1)[:num_keys].to(q.dtype).repeat_interleave(groups, dim=1)
            for pool in (keys, values)
        )
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], key) * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        future = future.triu(num_keys - (stop - start) + 1)
        scores = scores.masked_fill(future, -torch.inf)
        out[start:stop] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)
    return out


class Call(NamedTuple):
    """The arguments of `paged_attention` as backends get them."""

    q: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor
    scale: float
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    @property
    def most_rows(self) -> int:
        if self.max_seqlen_q is not None:
            return self.max_seqlen_q
        return int(self.cu_seqlens_q.diff().max()) if len(self.cu_seqlens_q) > 1 else 0


def _native(call: Call) -> Tensor:
    from vtts_rt import _C

    q, keys, values = call[:3]
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    page_table, cu_seqlens_q, seqlens_k = (x.to(torch.int64).contiguous() for x in call[3:6])
    out = q.new_empty(q.shape)
    _C.paged_attention(
        *(q.data_ptr(), q.stride(0), keys.data_ptr(), values.data_ptr()),
        *(page_table.data_ptr(), page_table.shape[1]),
        *(cu_seqlens_q.data_ptr(), seqlens_k.data_ptr(), out.data_ptr()),
        *(q.shape[0], page_table.shape[0], tuple(keys.shape), q.shape[1]),
        call.scale,
        *(torch.get_num_threads(), "auto", native.STORAGE[q.dtype]),
    )
    return out


def _native_refuses(call: Call) -> str | None:
    q, keys, values = call[:3]
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "pages that are not contiguous"
    if q.shape[-1] % 8 or q.shape[-1] > native.MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]}, not a multiple of 8 up to {native.MAX_HEAD_DIM}"
    return native.refusal(q, keys, values, dtypes=native.STORAGE)


def _reference(call: Call) -> Tensor:
    check_sequences(call.q, call.keys, *call[3:6])
    return paged_attention_ref(*call[:6], scale=call.scale)


def _torch(call: Call) -> Tensor:
    sequences = check_sequences(call.q, call.keys, *call[3:6])
    return paged_sdpa(*call[:3], sequences, call.scale)


def _triton(call: Call) -> Tensor:
    from vtts_rt.kernels import paged_attention as kernel

    if call.seqlens_k.numel() == 0:
        return call.q.new_empty(call.q.shape)
    most_keys = call.max_seqlen_k
    most_keys = int(call.seqlens_k.max()) if most_keys is None else most_keys
    q = native.adjacent(call.q)
    return kernel.paged_attention(q, *call[1:7], call.most_rows, most_keys)  # type: ignore[no-any-return]


_OP = register(
    "paged_attention",
    Backend("triton", triton_supports, _triton, lambda call: pages_refused(*call[:3])),
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("torch", anything, _torch),
    Backend("reference", anything, _reference),
)


def by_use() -> list[Choice]:
    """What a language model's attention runs, by its dtype."""
    rows = []
    for device, dtype in product(devices(), native.STORAGE):
        q = torch.empty(1, 1, 128, dtype=dtype, device=device)
        call = Call(q, q[None], q[None], q, q, q, 1.0)
        rows.append(_OP.explain(f"attention in {native.STORAGE[dtype]}", device, call))
    return rows


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of packed rows to paged keys; see the file's head.

    q: (N, H, D), H a multiple of K; keys, values: (num_pages, page_size, K, D), all of one float
    dtype and device. page_table: (S, P); cu_seqlens_q: (S + 1,), from 0 to N, ascending;
    seqlens_k: (S,), keys of each sequence, its new rows included: int64 or int32 on q's device,
    neighbours adjacent.
    scale: of the scores, None for D ** -0.5.
    max_seqlen_q, max_seqlen_k: upper bounds of a sequence's rows and keys, for the Triton kernels;
        None: looked up, for which a CUDA device is waited for. What a captured CUDA graph was
        given holds for every replay.
    backend: "auto", "triton" (CUDA tensors of up to 32 bits, D <= 256, no gradient wanted),
        "cpu" (native: float32 or bfloat16 on the CPU, D a multiple of 8 up to 256, pages
        contiguous, no gradient wanted), "torch" or "reference". "auto" takes the first that can.

    Returns (N, H, D) in q's dtype.
    Raises ValueError on shapes that do not match and on tensors that a backend asked for by name
    does not take; RuntimeError on an unusable backend. "cpu", "torch" and "reference" also raise
    ValueError on a sequence with fewer keys than rows and on pages outside the pool. "triton" does
    not look: rows that see no key get zeros, rows from cu_seqlens_q[-1] on are left
    unwritten, and wrong pages read any memory.
    """
    num_sequences = page_table.shape[0]
    check_pool("paged_attention", q, keys, values)
    check_indices(
        "paged_attention",
        q.device,
        page_table=(page_table, (num_sequences, page_table.shape[-1])),
        cu_seqlens_q=(cu_seqlens_q, (num_sequences + 1,)),
        seqlens_k=(seqlens_k, (num_sequences,)),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q, keys, values, page_table, cu_seqlens_q, seqlens_k)
    out: Tensor = _OP(q.device.type, backend, Call(*tensors, scale, max_seqlen_q, max_seqlen_k))
    return out
