"""paged_attention: the new tokens of each sequence attend to all its keys, which lie in pages.

    out[i, h] = softmax_j(scale * q[i, h] . key_j[h // (H / K)]) value_j[h // (H / K)]

where row i of a sequence with n rows and m keys sees the keys j <= m - n + i (bottom-right causal).
Key j lies in page page_table[s, j // page_size], slot j % page_size.

The native kernel reads each key of a sequence of few new tokens once for the query heads and rows
that share it, without copying pages together first. For more than MAX_ROWS it packs keys and values
and multiplies tiles: 2,146 tokens of 8 heads over 2 take 29 ms where torch's operators take 39, and
540 tokens that continue 4,019 take 28 instead of 33 (two cores with AVX-512). A row's values are
the same to the bit whatever other rows and sequences stand beside it and however many threads run,
among sequences of few new tokens and among those of many.

Legend: N rows of all sequences, S sequences, P most pages of one, H query heads, K key/value heads,
D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, register
from vtts_rt.ops.native import MAX_HEAD_DIM
from vtts_rt.types import require


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
    """The equation, sequence by sequence, in q's dtype. Arguments as `paged_attention`."""
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
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hij,jhd->ihd", weights, value)
    return out


def _native(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    scale: float,
) -> Tensor:
    from vtts_rt import _C

    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    out = q.new_empty(q.shape)
    _C.paged_attention(
        q.data_ptr(),
        q.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        page_table.data_ptr(),
        page_table.shape[1],
        cu_seqlens_q.data_ptr(),
        seqlens_k.data_ptr(),
        out.data_ptr(),
        q.shape[0],
        page_table.shape[0],
        tuple(keys.shape),
        q.shape[1],
        scale,
        torch.get_num_threads(),
    )
    return out


def _torch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    scale: float,
) -> Tensor:
    bounds, lengths = cu_seqlens_q.tolist(), cu_seqlens_q.diff()
    ends = bounds[0], bounds[-1]
    num_rows, page_size = q.shape[0], keys.shape[1]
    what = "paged_attention"
    ascends = ends == (0, num_rows) and bool((lengths >= 0).all())
    require(what, "cu_seqlens_q", bounds, ascends, f"ascending from 0 to {num_rows}")
    enough = bool((seqlens_k >= lengths).all())
    require(what, "seqlens_k", seqlens_k.tolist(), enough, ">= the sequence's rows")
    for pages, num_keys in zip(page_table, seqlens_k.tolist(), strict=True):
        used = pages[: -(-num_keys // page_size)]
        covered = num_keys <= pages.numel() * page_size
        require(what, "seqlens_k", num_keys, covered, "covered by page_table")
        inside = bool(((used >= 0) & (used < keys.shape[0])).all())
        require(what, "page_table", used.tolist(), inside, "pages of the pool")
    return paged_attention_ref(q, keys, values, page_table, cu_seqlens_q, seqlens_k, scale=scale)


def _refusal(q: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why the native kernel cannot take these tensors, or None."""
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "pages that are not contiguous"
    if q.shape[-1] % 8 or q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]}, not a multiple of 8 up to {MAX_HEAD_DIM}"
    return native.refusal(q, keys, values)


_OP = register(
    "paged_attention",
    Backend("cpu", native.supports, _native),
    Backend("reference", lambda device: None, _torch),
)


def runs_natively(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether "auto" takes the native kernel for contiguous pages of such tensors."""
    usable = dtype is torch.float32 and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
    return usable and _OP.resolve(device.type).run is _native


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of packed rows to paged keys; see the file's head.

    q: (N, H, D), H a multiple of K; keys, values: (num_pages, page_size, K, D), all of one float
    dtype and device. page_table: (S, P); cu_seqlens_q: (S + 1,), from 0 to N, ascending;
    seqlens_k: (S,), keys of each sequence, its new rows included: contiguous int64 on the CPU.
    scale: of the scores, None for D ** -0.5.
    backend: "auto", "cpu" (native: float32 on the CPU, D a multiple of 8 up to 256, pages
        contiguous, no gradient wanted) or "reference". "auto" takes the native one where it can.

    Returns (N, H, D) in q's dtype.
    Raises ValueError on shapes that do not match, a sequence with fewer keys than rows, pages
    outside the pool, and on tensors that a backend asked for by name does not take; RuntimeError
    on an unusable backend.
    """
    _check(q, keys, values, page_table, cu_seqlens_q, seqlens_k)
    chosen = _OP.resolve(q.device.type, backend)
    run = chosen.run
    if run is _native and (refusal := _refusal(q, keys, values)) is not None:
        rule = f"what backend {backend!r} takes"
        require("paged_attention", "q, keys, values", refusal, backend == "auto", rule)
        run = _torch
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = run(q, keys, values, page_table, cu_seqlens_q, seqlens_k, scale)
    return out


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
) -> None:
    def fail(argument: str, tensor: Tensor, rule: str) -> None:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        require("paged_attention", argument, got, False, rule)

    if keys.dim() != 4 or 0 in keys.shape[1:3]:
        fail("keys", keys, "(num_pages, page_size, K, D) with page_size, K >= 1")
    if values.shape != keys.shape or values.dtype != keys.dtype:
        fail("values", values, f"like keys, {tuple(keys.shape)} {keys.dtype}")
    if q.dim() != 3 or q.shape[2] != keys.shape[3] or q.shape[1] % keys.shape[2]:
        fail("q", q, f"(N, a multiple of {keys.shape[2]}, {keys.shape[3]})")
    num_sequences = page_table.shape[0]
    for argument, tensor, shape in (
        ("page_table", page_table, (num_sequences, page_table.shape[-1])),
        ("cu_seqlens_q", cu_seqlens_q, (num_sequences + 1,)),
        ("seqlens_k", seqlens_k, (num_sequences,)),
    ):
        fits = tuple(tensor.shape) == shape and tensor.dtype is torch.int64 and tensor.is_cpu
        if not fits or not tensor.is_contiguous():
            fail(argument, tensor, f"contiguous {shape} torch.int64 on the CPU")
