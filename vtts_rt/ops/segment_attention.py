"""segment_attention: attention inside segments of rows that stand together (a vision tower's).

    out[i, h] = softmax_j(q[i, h] . k[j, h] / sqrt(D)) v[j, h],   j over the rows of i's segment

torch's operator is called once for each run of equal segments. The native kernel computes in
float32, whatever is stored, a segment and a head a task, which threads take as they get free: a
row's values are the same to the bit whatever other segments there are. One core (AMD EPYC,
AVX2) takes 10.6 ms for two pairs of 480 rows and 6 heads whole and 2.0 by windows of 64 where torch
takes 12.8 and 2.4; in bfloat16 10.3 (13.7) and 1.8 (3.1).

Legend: P rows, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_refuses, triton_supports
from vtts_rt.ops.upload import stream_of, upload
from vtts_rt.types import require

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Run(NamedTuple):
    """`num` equal segments of `length` rows that start at row `start`."""

    start: int
    num: int
    length: int


def segment_attention_ref(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    """The equation, segment by segment, in q's dtype. Arguments as `segment_attention`."""
    outputs = []
    for run in runs:
        for i in range(run.num):
            start = run.start + i * run.length
            rows = slice(start, start + run.length)
            scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * q.shape[-1] ** -0.5
            outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[rows]).flatten(1))
    return torch.cat([q[:0].flatten(1), *outputs])


def _torch(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    outputs = []
    for run in runs:
        stop = run.start + run.num * run.length
        query, key, value = (
            x[run.start : stop].view(run.num, run.length, *x.shape[1:]).transpose(1, 2)
            for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(query, key, value)  # (num, H, length, D)
        outputs.append(out.transpose(1, 2).reshape(stop - run.start, q.shape[1] * q.shape[2]))
    return outputs[0] if len(outputs) == 1 else torch.cat([q[:0].flatten(1), *outputs])


def _native(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    from vtts_rt import _C

    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    starts = [start + i * length for start, num, length in runs for i in range(num)]
    _C.segment_attention(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0)),
        starts,
        [length for _, num, length in runs for _ in range(num)],
        out.data_ptr(),
        tuple(q.shape),
        q.shape[2] ** -0.5,
        *(torch.get_num_threads(), "auto", native.STORAGE[q.dtype]),
    )
    return out


@lru_cache(maxsize=64)
def _table(runs: tuple[Run, ...], num_queries: int, device: torch.device, stream: int) -> Tensor:
    """(blocks, 3) int32: first row of each block of at most `num_queries` rows, first row and end
    of its segment; long segments first, whose programs take longest. stream: of `stream_of`."""
    rows = [np.empty((0, 3), dtype=np.int32)]
    for run in sorted(runs, key=lambda run: -run.length):
        first = run.start + run.length * np.arange(run.num)[:, None]
        begin = first + np.arange(0, run.length, num_queries)
        both = (np.broadcast_to(edge, begin.shape) for edge in (first, first + run.length))
        rows.append(np.stack((begin, *both), axis=-1).reshape(-1, 3).astype(np.int32))
    return upload(np.concatenate(rows), device)


def _triton(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> Tensor:
    from vtts_rt.kernels import segment_attention as kernel

    q, k, v = map(native.adjacent, (q, k, v))
    longest = max((run.length for run in runs if run.num), default=0)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        num_queries = kernel.blocks(q.dtype, longest)["QUERIES"]
        table = _table(tuple(runs), num_queries, q.device, stream_of(q))
        return kernel.segment_attention(q, k, v, table, longest)  # type: ignore[no-any-return]


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> str | None:
    from vtts_rt.kernels.segment_attention import MAX_HEAD_DIM as most

    if not 1 <= q.shape[2] <= most:
        return f"head dim {q.shape[2]}, not 1 to {most}"
    if any(x.dtype not in _DTYPES or x.dtype != q.dtype for x in (q, k, v)):
        return "tensors that are not all float32, float16 or bfloat16"
    return triton_refuses(q, k, v)


def _native_refuses(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run]) -> str | None:
    for x in (q, k, v):
        if x.stride(2) != 1 or x.stride(1) != x.shape[2] or x.stride(0) != q.stride(0):
            return "heads that are not packed, or rows not equally far apart in q, k and v"
    if not 1 <= q.shape[2] <= native.MAX_HEAD_DIM:
        return f"head dim {q.shape[2]}, not 1 to {native.MAX_HEAD_DIM}"
    return native.refusal(q, k, v, dtypes=native.STORAGE)


_OP = register(
    "segment_attention",
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("torch", anything, _torch),
    Backend("triton", triton_supports, _triton, _triton_refuses),
)


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], *, backend: str = "auto"
) -> Tensor:
    """Bidirectional attention inside each segment.

    q, k, v: (P, H, D), one float dtype and device. runs: segments, one after the other from row 0
        to row P.
    backend: "auto", "cpu" (native: float32 or bfloat16 on the CPU, heads of a row packed, D up to
        256, no gradient wanted), "torch" or "triton" (float32, float16 or bfloat16 on CUDA, D up to
        128, no gradient wanted). "auto" takes the first that can: no card has timed the Triton
        kernel yet.

    Returns (P, H * D) in q's dtype.
    Raises ValueError on shapes or runs that do not match and on tensors that a backend asked for by
    name does not take, RuntimeError on an unusable backend.
    """
    shape = tuple(q.shape)
    require("segment_attention", "q", shape, q.dim() == 3, "(P, H, D)")
    for name, x in (("k", k), ("v", v)):
        require("segment_attention", name, tuple(x.shape), x.shape == q.shape, f"{shape}")
    end = 0
    for run in runs:
        fits = run.start == end and run.num >= 0 and run.length >= 0
        require("segment_attention", "runs", run, fits, f"from row {end} on")
        end += run.num * run.length
    require("segment_attention", "runs", end, end == shape[0], f"{shape[0]} rows in all")
    out: Tensor = _OP(q.device.type, backend, q, k, v, runs)
    return out
