"""patchify: crops of uint8 frames, resized by every kernel, as rows of every type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from op_cases.case import Build, Case, Scale, bench_dtype, built_later
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.patch_jobs import num_rows
from vtts_rt.ops.patchify import PatchifyJob, patchify, patchify_ref
from vtts_rt.types import RESIZE_KERNELS, PixelBox, ResizeKernel


class Look(NamedTuple):
    """Equal jobs on frames of their own."""

    num_jobs: int
    frame_hw: tuple[int, int]
    box: tuple[int, int, int, int]
    resized_hw: tuple[int, int]
    same_frame: bool = False


LOOKS: dict[str, dict[str, list[Look]]] = {
    "check": {
        "one pixel up": [Look(1, (1, 1), (0, 0, 1, 1), (28, 28))],
        "as it is, one frame twice": [Look(1, (31, 60), (2, 3, 58, 31), (28, 56), True)],
        "one axis": [Look(1, (28, 91), (0, 0, 91, 28), (28, 56))],
        "down by 5": [Look(1, (150, 37), (1, 5, 37, 150), (28, 28))],
        "several": [
            Look(1, (40, 53), (3, 1, 50, 40), (56, 28)),
            Look(2, (35, 71), (0, 0, 71, 35), (28, 56)),
            Look(1, (20, 30), (0, 0, 30, 20), (28, 84), True),
        ],
    },
    # 32 frames of a video at the processor's default budget; crops of what a clue points at.
    "cuda": {
        "16 pairs, 1280x720 to 1008x560": [Look(16, (720, 1280), (0, 0, 1280, 720), (560, 1008))],
        "16 crops, 640x360 to 644x364": [Look(16, (720, 1280), (300, 200, 940, 560), (364, 644))],
    },
    "cpu": {"4 pairs, 640x360 to 336x280": [Look(4, (360, 640), (0, 0, 640, 360), (280, 336))]},
}


def jobs_of(
    looks: Sequence[Look], device: str, *resize: ResizeKernel, seed: int = 0
) -> list[PatchifyJob]:
    """Jobs on frames of noise that lie in wider rows, as frames of a decoder do; the resize kernels
    take turns."""
    generator = torch.Generator().manual_seed(seed)
    kernels = cycle(resize or ("fixed",))

    def frame(height: int, width: int) -> Tensor:
        noise = torch.randint(0, 256, (height, width + 5, 3), generator=generator)
        return noise.to(torch.uint8).to(device)[:, :width]

    jobs = []
    for look in looks:
        for _ in range(look.num_jobs):
            a = frame(*look.frame_hw)
            b = a if look.same_frame else frame(*look.frame_hw)
            jobs.append(PatchifyJob(a, b, PixelBox(*look.box), look.resized_hw, next(kernels)))
    return jobs


def num_source_bytes(jobs: Sequence[PatchifyJob]) -> int:
    """Of the crops, each once."""
    frames = {(id(f), job.box) for job in jobs for f in (job.frame_a, job.frame_b)}
    return sum(3 * (x1 - x0) * (y1 - y0) for _, (x0, y0, x1, y1) in frames)


def places_of(jobs: Sequence[PatchifyJob], device: str) -> Tensor:
    num_tokens = num_rows(jobs, GEOMETRY) // GEOMETRY.patches_per_token
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(1)).to(device)


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale every kernel to the bit; then 16-bit types, in another order of tokens, and
    the kernels mixed."""
    for name, looks in LOOKS[scale if scale == "check" else device].items():
        if scale == "check":
            for resize in RESIZE_KERNELS:
                yield _case(f"{name}, {resize}", looks, [resize], device, torch.float32)
            continue
        for resize in ("fixed", "float"):
            for dtype in dict.fromkeys((torch.float32, bench_dtype(device))):
                yield _case(f"{name}, {resize}", looks, [resize], device, dtype)
    if scale == "check":
        looks = LOOKS["check"]["several"]
        for dtype in (torch.float16, torch.bfloat16):
            yield _case("several, of all kernels", looks, RESIZE_KERNELS, device, dtype)


@built_later
def _case(
    name: str,
    looks: Sequence[Look],
    resize: Sequence[ResizeKernel],
    device: str,
    dtype: torch.dtype,
) -> Case:
    jobs = jobs_of(looks, device, *resize)
    wide = dtype is torch.float32
    places = None if wide else places_of(jobs, device)

    def run(backend: str) -> tuple[Tensor]:
        return (patchify(jobs, GEOMETRY, dtype=dtype, places=places, backend=backend),)

    def exact() -> tuple[Tensor]:
        return (patchify_ref(jobs, GEOMETRY, places=places),)

    def rounded() -> tuple[Tensor]:
        return (patchify_ref(jobs, GEOMETRY, dtype=dtype, places=places),)

    return Case(
        name=name,
        dtype=dtype,
        run=run,
        exact=exact,
        # Bit for bit, even where the interpreter's fused multiply-add rounds twice: no pixel of
        # these lies that near to a rounding edge.
        eager=None if wide else rounded,
        num_bytes=num_source_bytes(jobs)
        + num_rows(jobs, GEOMETRY) * GEOMETRY.row_size * dtype.itemsize,
        native=(torch.float32,),
    )
