"""Checks of the arguments of ops over paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops.dispatch import triton_refuses
from vtts_rt.ops.native import MAX_HEAD_DIM
from vtts_rt.types import require


def check_sequences(
    q: Tensor, keys: Tensor, page_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor
) -> list[tuple[int, int, list[int], int]]:
    """(first row, row after the last, pages, keys) of each sequence. ValueError for fewer keys than
    rows and for pages outside the pool; a CUDA device is waited for."""
    what, (num_pages, page_size) = "paged_attention", keys.shape[:2]
    bounds, num_rows = cu_seqlens_q.tolist(), q.shape[0]
    ascends = (bounds[0], bounds[-1]) == (0, num_rows) and bounds == sorted(bounds)
    require(what, "cu_seqlens_q", bounds, ascends, f"ascending from 0 to {num_rows}")
    found = []
    for start, stop, pages, num_keys in zip(
        bounds, bounds[1:], page_table.tolist(), seqlens_k.tolist(), strict=False
    ):
        require(what, "seqlens_k", num_keys, num_keys >= stop - start, ">= the sequence's rows")
        used = pages[: -(-num_keys // page_size)]
        covered = num_keys <= len(pages) * page_size
        require(what, "seqlens_k", num_keys, covered, "covered by page_table")
        inside = not used or 0 <= min(used) <= max(used) < num_pages
        require(what, "page_table", used, inside, "pages of the pool")
        found.append((start, stop, used, num_keys))
    return found


def check_pool(op: str, q: Tensor, keys: Tensor, values: Tensor) -> None:
    """ValueError unless the three go together; see `paged_attention`."""
    if keys.dim() != 4 or 0 in keys.shape[1:3]:
        _fail(op, "keys", keys, "(num_pages, page_size, K, D) with page_size, K >= 1")
    if (values.shape, values.dtype, values.device) != (keys.shape, keys.dtype, keys.device):
        rule = f"like keys, {tuple(keys.shape)} {keys.dtype} on {keys.device}"
        _fail(op, "values", values, rule)
    if q.dim() != 3 or q.shape[2] != keys.shape[3] or q.shape[1] % keys.shape[2]:
        _fail(op, "q", q, f"(N, a multiple of {keys.shape[2]}, {keys.shape[3]})")
    if q.device != keys.device:
        _fail(op, "q", q, f"on {keys.device}")


def check_indices(
    op: str, device: torch.device, **arguments: tuple[Tensor, tuple[int, ...]]
) -> None:
    """ValueError unless each tensor has its shape and holds indices a kernel can read."""
    for name, (tensor, shape) in arguments.items():
        fits = tuple(tensor.shape) == shape and tensor.dtype in (torch.int32, torch.int64)
        if not fits or tensor.device != device or (shape[-1] > 1 and tensor.stride(-1) != 1):
            _fail(op, name, tensor, f"{shape} int32 or int64 on {device}, neighbours adjacent")


def pages_refused(q: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or keys.dtype != q.dtype:
        return f"{q.dtype} queries and {keys.dtype} keys, not of one type of up to 32 bits"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} > {MAX_HEAD_DIM}"
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        return "keys and values that are not laid out alike with adjacent features"
    return triton_refuses(q, keys, values)


def _fail(op: str, argument: str, tensor: Tensor, rule: str) -> None:
    got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    require(op, argument, got, False, rule)
