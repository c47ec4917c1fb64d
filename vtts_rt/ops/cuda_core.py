"""Calls of the CUDA kernels in vtts_rt._C, where it was built with them (VTTS_RT_BUILD=cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.patch_jobs import Batch, mean_and_std, memory

_Item = tuple[object, ...]


def supports(device: str) -> str | None:
    """`Backend.supports` of the CUDA kernels: None, or why not."""
    if device != "cuda":
        return f"tensors are on {device}"
    if (reason := native.supports("cpu")) is not None:
        return reason
    from vtts_rt import _C

    return None if _C.HAS_CUDA else "vtts_rt._C is built without CUDA; see `vtts-rt env`"


def patchify(batch: Batch, places: Tensor | None, out: Tensor) -> None:
    """Rows of a batch on a CUDA device; out: contiguous (P, row size) there, P > 0."""
    from vtts_rt import _C

    mean, std = mean_and_std(batch.geometry, torch.device("cpu"))
    work = _Workspace(out.device)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _C.patchify_cuda(
            _items(batch),
            batch.geometry.patch_px,
            tuple(mean.tolist()),
            tuple(std.tolist()),
            *work.shared(places),
            work.take,
            out.data_ptr(),
            _name(out.dtype),
            torch.cuda.current_stream(out.device).cuda_stream,
        )


def patch_embed(batch: Batch, places: Tensor | None, folded: Tensor, bias: Tensor) -> Tensor:
    """Rows of a batch times a folded weight (O, K), O a multiple of 8; bias: (O,) float32."""
    from vtts_rt import _C

    out = folded.new_empty(batch.num_rows, len(folded))
    work = _Workspace(out.device)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _C.patch_embed_cuda(
            _items(batch),
            batch.geometry.patch_px,
            folded.data_ptr(),
            bias.data_ptr(),
            len(folded),
            *work.shared(places),
            work.take,
            out.data_ptr(),
            _name(out.dtype),
            torch.cuda.current_stream(out.device).cuda_stream,
        )
    return out


class _Workspace:
    """Device memory that a call takes and that lives until the call has been enqueued: the
    allocator hands it out again only to what comes later on the stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: list[Tensor] = []

    def take(self, num_bytes: int) -> int:
        self._held.append(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
        return self._held[-1].data_ptr()

    def shared(self, places: Tensor | None) -> tuple[int]:
        """The address of places as int32, 0 for none."""
        if places is None:
            return (0,)
        self._held.append(places.int())
        return (self._held[-1].data_ptr(),)


def _items(batch: Batch) -> list[_Item]:
    return [
        (
            *((*memory(frame), *frame.shape[:2]) for frame in pair),
            tuple(job.box),
            tuple(job.resized_hw),
            job.resize,
        )
        for job, pair in zip(batch.jobs, batch.frames, strict=True)
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
