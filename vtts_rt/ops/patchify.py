"""patchify: uint8 frames -> crop -> antialiased bicubic resize -> normalise -> ViT patch rows.

    rows[r, ((c*2 + f)*p + y)*p + x] = (resize(frame_f[box])[c, p*R + y, p*C + x] - m_c) / s_c
    r = ((bh * W'/2p + bw) * 2 + mh) * 2 + mw,   R = 2*bh + mh,   C = 2*bw + mw

p is the geometry's patch_px; m_c and s_c are 255 times its mean and std, in float32. Every job
names its resize kernel (vtts_rt.ops.bicubic): "fixed" is what transformers' Qwen2VLVideoProcessor
and Qwen3VLVideoProcessor give on a CPU, bit for bit, "float" what torchvision's v1 transforms and
with them the published code give, "pil" what PIL.Image.resize gives, bit for bit. Every backend has
all three, with the reference's bits.

Legend: H, W source frame; H', W' target (px, multiples of 2p); P patch rows, H'/p * W'/p a job;
T merged tokens, P / 4; K values of a row, 6 p^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vtts_rt.ops import cuda_core, native
from vtts_rt.ops.bicubic import resize
from vtts_rt.ops.dispatch import Backend, register, triton_supports
from vtts_rt.ops.patch_jobs import (
    Batch,
    PatchifyJob,
    checked,
    launch,
    mean_and_std,
    num_rows,
    too_many,
)
from vtts_rt.types import Geometry, require

__all__ = ["PatchBuffer", "PatchifyJob", "patchify", "patchify_ref"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def patchify_ref(
    jobs: Sequence[PatchifyJob],
    geometry: Geometry,
    *,
    dtype: torch.dtype = torch.float32,
    places: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The op in plain numpy and torch: same arguments, result and errors as `patchify`."""
    batch = checked("patchify", jobs, geometry, places)
    out = _output(batch, dtype, out)
    _reference(batch, places, 1, out)
    return out


def _reference(batch: Batch, places: Tensor | None, num_threads: int, out: Tensor) -> None:
    """`num_threads` is the native core's; numpy keeps its own."""
    geometry = batch.geometry
    mean, std = mean_and_std(geometry, torch.device("cpu"))
    m, p, token_px = geometry.merge, geometry.patch_px, geometry.token_px
    found = [torch.empty(0, geometry.row_size)]
    for job, pair in zip(batch.jobs, batch.frames, strict=True):
        x0, y0, x1, y1 = job.box
        height, width = job.resized_hw
        arrays = [frame.cpu().numpy() if isinstance(frame, Tensor) else frame for frame in pair]
        crops = [array[y0:y1, x0:x1] for array in arrays]
        if (y1 - y0, x1 - x0) != (height, width):
            crops = [resize(crop, height, width, job.resize) for crop in crops]
        pixels = torch.from_numpy(np.stack(crops)).float()  # (2, H', W', 3)
        pixels = (pixels - mean) / std
        blocks = pixels.reshape(2, height // token_px, m, p, width // token_px, m, p, 3)
        found.append(blocks.permute(1, 4, 2, 5, 7, 0, 3, 6).reshape(-1, geometry.row_size))
    _place(torch.cat(found), places, out)


def _place(rows: Tensor, places: Tensor | None, out: Tensor) -> None:
    """Rows in processor order to their places, rounded."""
    if places is None:
        out.copy_(rows)
        return
    tokens = rows.to(out.device, out.dtype).view(len(places), -1)
    out.view(tokens.shape).index_copy_(0, places.long(), tokens)


def _native(batch: Batch, places: Tensor | None, num_threads: int, out: Tensor) -> None:
    from vtts_rt import _C

    as_they_are = places is None and out.dtype is torch.float32
    rows = out if as_they_are else torch.empty(out.shape)
    _C.patchify(
        batch.items(),
        rows.numpy(),
        batch.geometry.patch_px,
        *batch.mean_and_std(),
        num_threads=num_threads or torch.get_num_threads(),
    )
    if not as_they_are:
        _place(rows, places, out)


def _triton(batch: Batch, places: Tensor | None, num_threads: int, out: Tensor) -> None:
    launch(batch, places, out)


def _on_cpu(device: str) -> str | None:
    return None if device == "cpu" else f"frames are on {device}; `patchify_ref` copies"


# Refusals are asked for with the batch alone, before there is memory for its rows.
_OP = register(
    "patchify",
    Backend("triton", triton_supports, _triton, too_many),
    Backend("cuda", cuda_core.supports, cuda_core.patchify),
    Backend("cpu", native.supports, _native),
    Backend("reference", _on_cpu, _reference),
)


def patchify(
    jobs: Sequence[PatchifyJob],
    geometry: Geometry,
    *,
    dtype: torch.dtype = torch.float32,
    places: Tensor | None = None,
    backend: str = "auto",
    num_threads: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Patch rows of all jobs, one job after the other.

    geometry: of the tower that the rows are for.
    dtype: of the rows, float32, float16 or bfloat16; the latter are the float32 rows, rounded.
    places: (T,) int32 or int64 on the frames' device, contiguous, a permutation: the 4 rows of
        token t, counted over all jobs, go to rows 4 * places[t] on (`VisionPlan.restore` gives the
        order of windows). Not read on the host, nor checked, when it is on a GPU.
    backend: "auto", "triton" or "cuda" (CUDA frames), "cpu" (native, on the best
        instruction set there is) or "reference".
    num_threads: CPU threads; 0 takes torch.get_num_threads(). Never changes a value.
    out: contiguous (P, K) of `dtype` on the frames' device to write to.

    Returns (P, K) of `dtype` where the frames are, `out` where it was given; (0, K) without jobs.
    Nothing waits for a GPU.
    Raises ValueError on a box that is empty or outside a frame, a size that is not a positive
    multiple of a token's, an unknown resize kernel, a frame that is not (H, W, 3) uint8, frames of
    several devices, or wrong `places` or `out`, RuntimeError on an unusable backend.
    """
    batch = checked("patchify", jobs, geometry, places)
    require("patchify", "num_threads", num_threads, num_threads >= 0, ">= 0")
    chosen, _ = _OP.choose(batch.device.type, backend, batch)
    out = _output(batch, dtype, out)
    if jobs:
        chosen.run(batch, places, num_threads, out)
    return out


class PatchBuffer:
    """Memory for patch rows that its owner fills, uses up and fills again: `out=` of `patchify`.

    Memory fresh from the system is most of patchify's time: 32 frames of 1280x720 take 2.5 times
    as long without it. It grows to the largest number of rows asked for and never shrinks. For one
    thread: rows that it gave before are overwritten.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._rows = torch.empty(0, geometry.row_size)

    def rows_for(self, jobs: Sequence[PatchifyJob]) -> Tensor:
        """(P, K) float32 on the CPU, contiguous, not initialised; P, K as of `patchify`."""
        wanted = num_rows(jobs, self._geometry)
        if wanted > len(self._rows):
            self._rows = torch.empty(wanted, self._geometry.row_size)
        return self._rows[:wanted]


def _output(batch: Batch, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    require("patchify", "dtype", dtype, dtype in _DTYPES, "float32, float16 or bfloat16")
    shape = (batch.num_rows, batch.geometry.row_size)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=batch.device)
    there = out.device == batch.device or not batch.jobs
    usable = tuple(out.shape) == shape and out.dtype == dtype and there and out.is_contiguous()
    got = f"{tuple(out.shape)} {out.dtype} on {out.device}"
    require("patchify", "out", got, usable, f"contiguous {shape} {dtype} on {batch.device}")
    return out
