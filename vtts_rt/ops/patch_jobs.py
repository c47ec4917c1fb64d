"""Jobs of patchify and patch_embed, their checks, and the launch of the Triton kernel.

Legend: H, W source frame; H', W' target (px, multiples of a token's); T merged tokens of all jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vtts_rt.ops.bicubic import pil_rows_first, tap_table
from vtts_rt.ops.upload import stream_of, upload
from vtts_rt.types import (
    RESIZE_KERNELS,
    Frame,
    Geometry,
    PixelBox,
    ResizeKernel,
    require,
)

MAX_EXTENT = 1 << 20  # px a side, source and target; the limit of the native core
MAX_UNITS = (1 << 31) - 1  # of the Triton kernel: tokens of single frames


@dataclass(frozen=True, slots=True, eq=False)
class PatchifyJob:
    """One frame pair seen through one box at one size.

    frame_a, frame_b: (H, W, 3) uint8 RGB, numpy array or tensor, of the CPU or, all frames of a
        call, of one CUDA device. Any row stride is read in place; other strides (planar pixels)
        are copied first. The same object twice is resized once.
    box: source px, half-open, not empty, inside both frames. The resize sees the crop only.
    resized_hw: (H', W') px, positive multiples of the geometry's token_px.
    resize: the kernel (vtts_rt.ops.bicubic), without effect where the crop has the target's size.
    """

    frame_a: Frame
    frame_b: Frame
    box: PixelBox
    resized_hw: tuple[int, int]
    resize: ResizeKernel = "fixed"


def num_rows(jobs: Sequence[PatchifyJob], geometry: Geometry) -> int:
    """Patch rows of all jobs."""
    num_tokens = sum(geometry.num_tokens(job.resized_hw) for job in jobs)
    return num_tokens * geometry.patches_per_token


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Checked jobs. frames: with packed pixels, arrays on the CPU and tensors elsewhere."""

    jobs: Sequence[PatchifyJob]
    geometry: Geometry
    frames: list[tuple[Frame, Frame]]
    device: torch.device

    @property
    def num_rows(self) -> int:
        return num_rows(self.jobs, self.geometry)

    def mean_and_std(self) -> tuple[tuple[float, ...], ...]:
        """As vtts_rt._C takes them; see the function of that name."""
        return tuple(map(tuple, mean_and_std(self.geometry, torch.device("cpu")).tolist()))

    def items(self) -> list[tuple[object, ...]]:
        """Jobs on the CPU as vtts_rt._C takes them."""
        return [
            (a, b, tuple(job.box), job.resized_hw, job.resize)
            for job, (a, b) in zip(self.jobs, self.frames, strict=True)
        ]


@lru_cache(maxsize=8)
def mean_and_std(geometry: Geometry, device: torch.device) -> Tensor:
    """(2, 3) float32 mean and std in 0..255 units: multiplied in float32, as transformers does."""
    return (torch.tensor((geometry.mean, geometry.std)) * 255.0).to(device)


def checked(
    what: str, jobs: Sequence[PatchifyJob], geometry: Geometry, places: Tensor | None
) -> Batch:
    """Validates everything; frames are shared where equal."""
    pixels: dict[int, Frame] = {}
    device = torch.device("cpu")
    for job in jobs:
        x0, y0, x1, y1 = job.box
        for name in ("frame_a", "frame_b"):
            frame = getattr(job, name)
            if id(frame) not in pixels:
                found = _pixels(what, name, frame)
                on = found.device if isinstance(found, Tensor) else torch.device("cpu")
                if not pixels:
                    device = on
                require(what, name, f"a frame on {on}", on == device, f"on {device} as the first")
                pixels[id(frame)] = found
            height, width = pixels[id(frame)].shape[:2]
            inside = 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            rule = f"not empty and inside the frame of (height, width) {(height, width)}"
            require(what, "box", tuple(job.box), inside, rule)
        check_size(what, job.resized_hw, geometry)
        require(what, "resize", job.resize, job.resize in RESIZE_KERNELS, "fixed, float or pil")
    frames = [(pixels[id(job.frame_a)], pixels[id(job.frame_b)]) for job in jobs]
    batch = Batch(jobs, geometry, frames, device)
    if places is not None:
        num_tokens = batch.num_rows // geometry.patches_per_token
        alike = (tuple(places.shape), places.device) == ((num_tokens,), device)
        usable = alike and places.dtype in (torch.int32, torch.int64) and places.is_contiguous()
        got = f"{tuple(places.shape)} {places.dtype} on {places.device}"
        rule = f"contiguous ({num_tokens},) int32 or int64 on {device}"
        require(what, "places", got, usable, rule)
        if places.is_cpu:  # reading them would wait for a GPU
            there = torch.equal(places.sort().values, torch.arange(num_tokens, dtype=places.dtype))
            require(what, "places", "another order", there, "a permutation of all tokens")
    return batch


def _pixels(what: str, name: str, frame: object) -> Frame:
    if isinstance(frame, Tensor):
        kind, got = frame.device.type, f"a tensor on {frame.device}"
        require(what, name, got, kind in ("cpu", "cuda"), "on cpu or cuda")
        frame = frame.detach() if kind == "cuda" else frame.detach().numpy()
    if not isinstance(frame, (np.ndarray, Tensor)):
        rule = "a numpy array or a torch tensor"
        raise ValueError(f"{what}: {name} must be {rule}, got {type(frame).__name__}")
    is_rgb = frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype in (np.uint8, torch.uint8)
    got = f"{tuple(frame.shape)} {frame.dtype}"
    require(what, name, got, is_rgb, "(H, W, 3) uint8")
    sides = tuple(frame.shape[:2])
    fits = all(1 <= side <= MAX_EXTENT for side in sides)
    require(what, name, sides, fits, f"1 to {MAX_EXTENT} px high and wide")
    if isinstance(frame, Tensor):
        return frame if frame.stride()[1:] == (3, 1) else frame.contiguous()
    return frame if frame.strides[1:] == (3, 1) else np.ascontiguousarray(frame)


def check_size(what: str, resized_hw: tuple[int, int], geometry: Geometry) -> None:
    """Raise ValueError unless both sides are positive multiples of a token's."""
    token_px = geometry.token_px
    usable = len(resized_hw) == 2 and all(
        token_px <= side <= MAX_EXTENT and side % token_px == 0 for side in resized_hw
    )
    require(what, "resized_hw", resized_hw, usable, f"positive multiples of {token_px} px")


def too_many(batch: Batch, *rest: object) -> str | None:
    """`Backend.refuses` of the Triton kernel: None, or why it cannot count a batch's tokens."""
    units = sum(
        batch.geometry.num_tokens(job.resized_hw) * len(set(map(id, pair)))
        for job, pair in zip(batch.jobs, batch.frames, strict=True)
    )
    return f"{units} tokens of single frames, more than {MAX_UNITS}" if units > MAX_UNITS else None


def launch(batch: Batch, places: Tensor | None, out: Tensor) -> None:
    """The Triton kernel: rows of float32, float16 or bfloat16, or of uint8 for plain pixels.

    One launch for all jobs that sum integers ("fixed" and "pil") and one for those that sum floats:
    the type of the sums is compiled in.
    out: contiguous (P, row size) on the batch's device, P > 0.
    """
    # Launched where the frames are, whichever device is current; without effect on a CPU.
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        for fixed in {job.resize != "float" for job in batch.jobs}:
            _launch_alike(batch, fixed, places, out)


def _launch_alike(batch: Batch, fixed: bool, places: Tensor | None, out: Tensor) -> None:
    """The rows of the jobs that sum integers, or of the others."""
    from vtts_rt.kernels import patchify as kernel

    stream, geometry = stream_of(out), batch.geometry
    token_px = geometry.token_px
    fields, units_of_job, held, stage_rows = [], [], [], 1
    first_unit = first_token = 0
    for job, pair in zip(batch.jobs, batch.frames, strict=True):
        num_tokens = geometry.num_tokens(job.resized_hw)
        first_token += num_tokens
        if (job.resize != "float") != fixed:
            continue
        job, pair = _after_rows(job, pair, token_px, out.device, stream)
        held.append(pair)
        x0, y0, x1, y1 = job.box
        height, width = job.resized_hw
        columns = tap_table(x1 - x0, width, job.resize, token_px, out.device, stream)
        rows = tap_table(y1 - y0, height, job.resize, token_px, out.device, stream)
        stage_rows = max(stage_rows, rows.span)
        crops = [(base + y0 * stride + 3 * x0, stride) for base, stride in map(memory, pair)]
        num_frames = len(set(crops))
        tables = [
            value
            for extent, taps in ((width, columns), (height, rows))
            for value in (taps.values.data_ptr(), extent, taps.num_taps, taps.precision)
        ]
        begin = (num_frames, first_unit, first_token - num_tokens, width // token_px)
        fields.append((*crops[0], *crops[1], *begin, *tables))
        units_of_job.append(num_tokens * num_frames)
        first_unit += units_of_job[-1]
    jobs = np.array(fields, dtype=np.int64)
    job_of_unit = np.repeat(np.arange(len(jobs), dtype=np.int32), units_of_job)
    numbers = np.concatenate((jobs.reshape(-1).view(np.int32), job_of_unit))
    blob = upload(numbers, out.device)
    kernel.patchify(
        blob[: 2 * jobs.size].view(torch.int64).view(jobs.shape),
        blob[2 * jobs.size :],
        places,
        mean_and_std(geometry, out.device),
        geometry.patch_px,
        stage_rows,
        fixed,
        out,
    )


def _after_rows(
    job: PatchifyJob,
    pair: tuple[Frame, Frame],
    token_px: int,
    device: torch.device,
    stream: int,
) -> tuple[PatchifyJob, tuple[Frame, Frame]]:
    """The part of a job for the kernel, which resizes along x first: all of it, or the rest of one
    that PIL resizes along y first, which torch's operators do here."""
    x0, y0, x1, y1 = job.box
    height = job.resized_hw[0]
    source_hw = (y1 - y0, x1 - x0)
    if job.resize != "pil" or not pil_rows_first(source_hw, job.resized_hw):
        return job, pair
    taps = tap_table(y1 - y0, height, job.resize, token_px, device, stream)
    start, weights = taps.values[0], taps.values[2:, :, None, None]
    done: dict[int, Tensor] = {}
    for frame in pair:
        if id(frame) in done:
            continue
        crop = torch.as_tensor(frame[y0:y1, x0:x1])
        half = (1 << taps.precision) >> 1
        shape = (height, *crop.shape[1:])
        total = torch.full(shape, half, dtype=torch.int32, device=device)
        for k in range(taps.num_taps):  # weights behind an output's own taps are zero
            total += weights[k] * crop[(start + k).clamp(max=len(crop) - 1)].int()
        done[id(frame)] = (total >> taps.precision).clamp(0, 255).to(torch.uint8)
    box = PixelBox(0, 0, x1 - x0, height)
    return replace(job, box=box), (done[id(pair[0])], done[id(pair[1])])


def memory(frame: Frame) -> tuple[int, int]:
    """(address, bytes from row to row)"""
    if isinstance(frame, Tensor):
        return frame.data_ptr(), frame.stride(0)
    return frame.__array_interface__["data"][0], frame.strides[0]
