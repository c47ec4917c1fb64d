"""Calls of the CUDA kernels in vtts_rt._C, where it was built with them (VTTS_RT_BUILD=cuda)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.patch_jobs import Batch, memory


def supports(device: str) -> str | None:
    """`Backend.supports` of the CUDA kernels: None, or why not."""
    if device != "cuda":
        return f"tensors are on {device}"
    if (reason := native.supports("cpu")) is not None:
        return reason
    from vtts_rt import _C

    return None if _C.HAS_CUDA else "vtts_rt._C is built without CUDA; see `vtts-rt env`"


def patchify(batch: Batch, places: Tensor | None, num_threads: int, out: Tensor) -> None:
    """Rows of a batch on a CUDA device; out: contiguous (P, row size) there, P > 0."""
    from vtts_rt import _C

    _call(_C.patchify_cuda, batch, places, out, *batch.mean_and_std())


def patch_embed(batch: Batch, places: Tensor | None, folded: Tensor, bias: Tensor) -> Tensor:
    """Rows of a batch times a folded weight (O, K), O a multiple of 8; bias: (O,) float32."""
    from vtts_rt import _C

    out = folded.new_empty(batch.num_rows, len(folded))
    operands = (folded.data_ptr(), bias.data_ptr(), len(folded))
    _call(_C.patch_embed_cuda, batch, places, out, *operands)
    return out


def _call(
    function: Callable[..., None],
    batch: Batch,
    places: Tensor | None,
    out: Tensor,
    *operands: object,
) -> None:
    # Memory that the call takes lives until the call has been enqueued: the allocator hands it out
    # again only to what comes later on the stream.
    held = [] if places is None else [places.int()]
    places_address = held[0].data_ptr() if held else 0

    def take(num_bytes: int) -> int:
        held.append(torch.empty(num_bytes, dtype=torch.uint8, device=out.device))
        return held[-1].data_ptr()

    items = [
        (
            *((*memory(frame), *frame.shape[:2]) for frame in pair),
            tuple(job.box),
            tuple(job.resized_hw),
            job.resize,
        )
        for job, pair in zip(batch.jobs, batch.frames, strict=True)
    ]
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        function(
            items,
            batch.geometry.patch_px,
            *operands,
            places_address,
            take,
            out.data_ptr(),
            str(out.dtype).removeprefix("torch."),
            torch.cuda.current_stream(out.device).cuda_stream,
        )
