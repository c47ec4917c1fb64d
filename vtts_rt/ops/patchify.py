"""patchify: uint8 frames -> crop -> antialiased bicubic resize -> normalise -> ViT patch rows.

    rows[r, ((c*2 + f)*14 + y)*14 + x] = (resize(frame_f[box])[c, 14*R + y, 14*C + x] - m_c) / s_c
    r = ((bh * W'/28 + bw) * 2 + mh) * 2 + mw,   R = 2*bh + mh,   C = 2*bw + mw

m_c and s_c are 255 times IMAGE_MEAN and IMAGE_STD, in float32. Where the resize rounds is part of
the numbers: `rounding="cpu"` is what transformers' Qwen2VLVideoProcessor gives on a CPU, bit for
bit (int16 weights, uint8 between the two passes); "cuda" models what it gives on a GPU (float32
with fused multiply-add in both passes, clamped and rounded half to even once).

Legend: H, W source frame; H', W' target (px, multiples of 28); P patch rows, H'/14 * W'/14 a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vtts_rt.ops.dispatch import Backend, register
from vtts_rt.types import MERGE_SIZE, PATCH_ROW, PATCH_SIZE, TOKEN_PX, PixelBox, require

# OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers, the values in every Qwen2-VL and
# Qwen2.5-VL preprocessor_config.json.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_EXTENT = 1 << 20  # px a side, source and target; the limit of the native core
Rounding = Literal["cpu", "cuda"]
Frame: TypeAlias = "np.ndarray[Any, Any] | Tensor"


@dataclass(frozen=True, slots=True, eq=False)
class PatchifyJob:
    """One frame pair seen through one box at one size.

    frame_a, frame_b: (H, W, 3) uint8 RGB, numpy array or CPU tensor. Any row stride is read in
        place; other strides (planar pixels) are copied first. The same object twice is resized
        once.
    box: source px, half-open, not empty, inside both frames. The resize sees the crop only.
    resized_hw: (H', W') px, positive multiples of 28.
    """

    frame_a: Frame
    frame_b: Frame
    box: PixelBox
    resized_hw: tuple[int, int]

    @property
    def num_rows(self) -> int:
        return (self.resized_hw[0] // PATCH_SIZE) * (self.resized_hw[1] // PATCH_SIZE)


@lru_cache(maxsize=1)
def _mean_and_std() -> tuple[Tensor, Tensor]:
    """float32 mean and std in 0..255 units: multiplied in float32, as transformers does."""
    return torch.tensor(IMAGE_MEAN) * 255.0, torch.tensor(IMAGE_STD) * 255.0


def patchify_ref(
    jobs: Sequence[PatchifyJob], *, rounding: Rounding = "cpu", out: Tensor | None = None
) -> Tensor:
    """The op in plain numpy and torch: same arguments, result and errors as `patchify`."""
    frames = _checked(jobs, rounding)
    out = _output(jobs, out)
    _reference(jobs, frames, rounding, 1, out)
    return out


def _reference(
    jobs: Sequence[PatchifyJob],
    frames: list[tuple[np.ndarray, np.ndarray]],
    rounding: Rounding,
    num_threads: int,
    out: Tensor,
) -> None:
    """`num_threads` is the native core's; numpy keeps its own."""
    mean, std = _mean_and_std()
    resize = _resize_fixed_point if rounding == "cpu" else _resize_float
    begin = 0
    for job, pair in zip(jobs, frames, strict=True):
        x0, y0, x1, y1 = job.box
        height, width = job.resized_hw
        crops = [frame[y0:y1, x0:x1] for frame in pair]
        if (y1 - y0, x1 - x0) != (height, width):
            crops = [resize(crop, height, width) for crop in crops]
        pixels = torch.from_numpy(np.stack(crops)).float()  # (2, H', W', 3)
        pixels = (pixels - mean) / std
        m, p = MERGE_SIZE, PATCH_SIZE
        blocks = pixels.reshape(2, height // TOKEN_PX, m, p, width // TOKEN_PX, m, p, 3)
        rows = blocks.permute(1, 4, 2, 5, 7, 0, 3, 6).reshape(job.num_rows, PATCH_ROW)
        out[begin : begin + job.num_rows] = rows
        begin += job.num_rows


def bicubic_taps(
    source: int, target: int, dtype: type[np.floating[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased bicubic filter (Keys, a = -0.5) of one axis, as ATen computes it in `dtype`.

    Returns indices (target, K) int64 into the source axis and weights (target, K) of `dtype`, zero
    beyond an output's own taps. An output at centre c = scale * (i + 0.5) takes source pixels
    int(c - s + 0.5) .. int(c + s + 0.5), s = 2 * max(scale, 1), cut at the border.
    """
    real = dtype
    scale = real(source) / real(target)
    support = real(2) * max(scale, real(1))
    inverse_scale = real(1) / scale if scale >= 1 else real(1)
    center = scale * (np.arange(target).astype(real) + real(0.5))
    start = np.maximum((center - support + real(0.5)).astype(np.int64), 0)
    count = np.minimum((center + support + real(0.5)).astype(np.int64), source) - start
    taps = np.arange(count.max())
    x = taps.astype(real) + (start.astype(real) - center)[:, None]
    x = np.abs((x + real(0.5)) * inverse_scale)
    near = (real(1.5) * x - real(2.5)) * x * x + real(1)
    far = (((x - real(5)) * x + real(8)) * x - real(4)) * real(-0.5)
    weights = np.where(x < 1, near, np.where(x < 2, far, real(0)))
    weights[taps >= count[:, None]] = 0
    total = np.zeros(target, dtype=real)
    for k in taps:  # one after the other: the order of a float sum is part of its value
        total += weights[:, k]
    indices = np.minimum(start[:, None] + taps, source - 1)
    return indices, weights / total[:, None]


def _resize_fixed_point(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3) uint8, ATen's CPU numbers: columns, then rows."""
    columns = _fixed_point_axis(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return _fixed_point_axis(columns, height)


def _fixed_point_axis(image: np.ndarray, target: int) -> np.ndarray:
    """Resize axis 0. The precision is the largest with round(w_max * 2^(p+1)) < 2^15, p <= 22."""
    indices, weights = bicubic_taps(image.shape[0], target, np.float64)
    largest = max(0.0, float(weights.max()))
    precision = 0
    while precision < 22 and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    fixed = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64)
    total = np.full((target, *image.shape[1:]), (1 << precision) >> 1, dtype=np.int64)
    for k in range(fixed.shape[1]):
        total += fixed[:, k, None, None] * image[indices[:, k]]
    resized: np.ndarray = np.clip(total >> precision, 0, 255).astype(np.uint8)
    return resized


def _resize_float(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3) uint8, float32 in both passes, rounded once."""
    columns = _float_axis(image.transpose(1, 0, 2).astype(np.float32), width).transpose(1, 0, 2)
    resized = np.clip(_float_axis(columns, height), 0, 255)
    rounded: np.ndarray = np.rint(resized).astype(np.uint8)
    return rounded


def _float_axis(image: np.ndarray, target: int) -> np.ndarray:
    """Resize axis 0 with float32 fused multiply-adds: product and sum are exact in float64 (up to
    a double rounding that needs a tie below the 53rd bit), then rounded to float32."""
    indices, weights = bicubic_taps(image.shape[0], target, np.float32)
    total = np.zeros((target, *image.shape[1:]), dtype=np.float32)
    for k in range(weights.shape[1]):
        product = weights[:, k, None, None].astype(np.float64) * image[indices[:, k]]
        total = (product + total).astype(np.float32)
    return total


def _native(
    jobs: Sequence[PatchifyJob],
    frames: list[tuple[np.ndarray, np.ndarray]],
    rounding: Rounding,
    num_threads: int,
    out: Tensor,
) -> None:
    from vtts_rt import _C

    mean, std = _mean_and_std()
    items = [
        (a, b, tuple(job.box), job.resized_hw) for job, (a, b) in zip(jobs, frames, strict=True)
    ]
    _C.patchify(
        items,
        out.numpy(),
        tuple(mean.tolist()),
        tuple(std.tolist()),
        rounding=rounding,
        num_threads=num_threads or torch.get_num_threads(),
    )


def _native_supports(device: str) -> str | None:
    if device != "cpu":
        return f"frames are on {device}"
    try:
        from vtts_rt import _C  # noqa: F401
    except ImportError as error:
        return f"vtts_rt._C is not built ({error}); see `vtts-rt env`"
    return None


_OP = register(
    "patchify",
    Backend("cpu", _native_supports, _native),
    Backend(
        "reference",
        lambda device: None if device == "cpu" else f"frames are on {device}",
        _reference,
    ),
    devices=("cpu",),
)


def patchify(
    jobs: Sequence[PatchifyJob],
    *,
    rounding: Rounding = "cpu",
    backend: str = "auto",
    num_threads: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Patch rows of all jobs, one job after the other.

    rounding: "cpu" or "cuda", where the resize rounds (see the file's head); without effect where
        the crop already has the target size.
    backend: "auto", "cpu" (native, on the best instruction set there is) or "reference".
    num_threads: CPU threads; 0 takes torch.get_num_threads(). Never changes a value.
    out: contiguous CPU float32 (P, 1176) to write to; P is the sum of the jobs' `num_rows`.

    Returns (P, 1176) float32 on the CPU, `out` where it was given; (0, 1176) without jobs.
    Raises ValueError on a box that is empty or outside a frame, a size that is not a positive
    multiple of 28, a frame that is not (H, W, 3) uint8 on the CPU, or a wrong `out`.
    """
    frames = _checked(jobs, rounding)
    require("patchify", "num_threads", num_threads, num_threads >= 0, ">= 0")
    chosen = _OP.resolve("cpu", backend)
    out = _output(jobs, out)
    if jobs:
        chosen.run(jobs, frames, rounding, num_threads, out)
    return out


class PatchBuffer:
    """Memory for patch rows that its owner fills, uses up and fills again: `out=` of `patchify`.

    Memory fresh from the system is most of patchify's time: 32 frames of 1280x720 take 2.5 times
    as long without it. It grows to the largest number of rows asked for and stays there. One
    owner, one thread: the rows handed out before are overwritten.
    """

    def __init__(self) -> None:
        self._rows = torch.empty(0, PATCH_ROW)

    def rows_for(self, jobs: Sequence[PatchifyJob]) -> Tensor:
        """(P, 1176) float32 on the CPU, contiguous, not initialised; P as of `patchify`."""
        num_rows = sum(job.num_rows for job in jobs)
        if num_rows > len(self._rows):
            self._rows = torch.empty(num_rows, PATCH_ROW)
        return self._rows[:num_rows]


def _output(jobs: Sequence[PatchifyJob], out: Tensor | None) -> Tensor:
    shape = (sum(job.num_rows for job in jobs), PATCH_ROW)
    if out is None:
        return torch.empty(shape, dtype=torch.float32)
    usable = (
        tuple(out.shape) == shape
        and out.dtype == torch.float32
        and out.device.type == "cpu"
        and out.is_contiguous()
    )
    got = f"{tuple(out.shape)} {out.dtype} on {out.device}"
    require("patchify", "out", got, usable, f"contiguous {shape} torch.float32 on cpu")
    return out


def _checked(jobs: Sequence[PatchifyJob], rounding: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Validates everything; the frames as numpy arrays with packed pixels, shared where equal."""
    require("patchify", "rounding", rounding, rounding in ("cpu", "cuda"), "cpu or cuda")
    arrays: dict[int, np.ndarray] = {}
    for job in jobs:
        for name in ("frame_a", "frame_b"):
            frame = getattr(job, name)
            if id(frame) not in arrays:
                arrays[id(frame)] = _pixels(name, frame)
            _check_box(job.box, arrays[id(frame)].shape)
        _check_size(job.resized_hw)
    return [(arrays[id(job.frame_a)], arrays[id(job.frame_b)]) for job in jobs]


def _pixels(name: str, frame: object) -> np.ndarray:
    if isinstance(frame, Tensor):
        require(
            "patchify", name, f"a tensor on {frame.device}", frame.device.type == "cpu", "on cpu"
        )
        frame = frame.detach().numpy()
    if not isinstance(frame, np.ndarray):
        rule = "a numpy array or a torch CPU tensor"
        raise ValueError(f"patchify: {name} must be {rule}, got {type(frame).__name__}")
    is_rgb = frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8
    require("patchify", name, f"{frame.shape} {frame.dtype}", is_rgb, "(H, W, 3) uint8")
    sides = frame.shape[:2]
    fits = all(1 <= side <= MAX_EXTENT for side in sides)
    require("patchify", name, sides, fits, f"1 to {MAX_EXTENT} px high and wide")
    packed = frame.strides[2] == 1 and frame.strides[1] == 3
    return frame if packed else np.ascontiguousarray(frame)


def _check_box(box: PixelBox, shape: tuple[int, ...]) -> None:
    x0, y0, x1, y1 = box
    inside = 0 <= x0 < x1 <= shape[1] and 0 <= y0 < y1 <= shape[0]
    rule = f"not empty and inside the frame of (height, width) {tuple(shape[:2])}"
    require("patchify", "box", tuple(box), inside, rule)


def _check_size(resized_hw: tuple[int, int]) -> None:
    usable = len(resized_hw) == 2 and all(
        TOKEN_PX <= side <= MAX_EXTENT and side % TOKEN_PX == 0 for side in resized_hw
    )
    require("patchify", "resized_hw", resized_hw, usable, f"positive multiples of {TOKEN_PX} px")
