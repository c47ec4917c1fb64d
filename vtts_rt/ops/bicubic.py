"""The antialiased bicubic resize of uint8 images: taps and reference of its three kernels.

"fixed": ATen's for uint8 on a CPU, which torchvision's v2 transforms and transformers 5 take: int16
    weights, uint8 between the two passes.
"float": float32 fused multiply-adds in both passes, cut to 0..255, rounded once, half to even: what
    torchvision's v1 transforms do on any device, and torch on a GPU. Weights are those of ATen on a
    CPU with fused multiply-adds; its pass along x leaves some sums unfused, as its compiler likes,
    and 1e-6 of the values of noise and of smooth pictures are one level off by it.
"pil": PIL.Image.resize of an RGB image in Pillow 13: weights of 22 bits, uint8 between the two
    passes, of which the one along y comes first where that is less work.
Both passes of the others run along x first.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtts_rt.ops.upload import upload
from vtts_rt.types import ResizeKernel

PIL_PRECISION = 22  # bits of a weight behind the point: 32 less 8 of a pixel and 2 of overshoot


def bicubic_taps(
    source: int, target: int, dtype: type[np.floating[Any]], *, from_source: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased bicubic filter (Keys, a = -0.5) of one axis in `dtype`.

    from_source: a tap's distance from the centre is (start + k) - centre, as PIL computes it,
    instead of ATen's k + (start - centre).

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
    if from_source:
        x = (start[:, None] + taps).astype(real) - center[:, None]
    else:
        x = taps.astype(real) + (start.astype(real) - center)[:, None]
    x = np.abs((x + real(0.5)) * inverse_scale)
    near = _fma(_fma(real(1.5), x, real(-2.5)) * x, x, real(1))
    far = _fma(_fma(x - real(5), x, real(8)), x, real(-4)) * real(-0.5)
    weights = np.where(x < 1, near, np.where(x < 2, far, real(0)))
    weights[taps >= count[:, None]] = 0
    total = np.zeros(target, dtype=real)
    for k in taps:  # one after the other: the order of a float sum is part of its value
        total += weights[:, k]
    indices = np.minimum(start[:, None] + taps, source - 1)
    return indices, weights / total[:, None]


def _fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c: fused in float32, where compilers contract ATen's polynomial, not in float64.

    Product and sum are exact in float64, up to a double rounding that needs a tie below the 53rd
    bit.
    """
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def resize(image: np.ndarray, height: int, width: int, kernel: ResizeKernel) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3) uint8 by a kernel of the file's head."""
    axis = _float_axis if kernel == "float" else partial(_integer_axis, kernel=kernel)
    if kernel == "pil" and pil_rows_first(image.shape[:2], (height, width)):
        resized = axis(axis(image, height).transpose(1, 0, 2), width).transpose(1, 0, 2)
    else:
        resized = axis(axis(image.transpose(1, 0, 2), width).transpose(1, 0, 2), height)
    rounded: np.ndarray = np.rint(np.clip(resized, 0, 255)).astype(np.uint8)
    return rounded


def pil_rows_first(source_hw: tuple[int, ...], target_hw: tuple[int, int]) -> bool:
    """Whether PIL resizes along y before it does along x: where the height shrinks, and by more
    than twice the pixels that the width does (Resample.c of Pillow 13; before, it never did)."""
    fewer_rows, fewer_columns = source_hw[0] - target_hw[0], source_hw[1] - target_hw[1]
    return fewer_rows > max(0, 2 * fewer_columns)


def integer_taps(
    source: int, target: int, kernel: ResizeKernel
) -> tuple[np.ndarray, np.ndarray, int]:
    """`bicubic_taps` with weights (target, K) int64, `precision` bits up.

    "fixed": at most 15 bits, the largest precision with round(w_max * 2^(p+1)) < 2^15, p <= 22
    (ATen, UpSampleKernelAVXAntialias.h). "pil": 22 (Pillow, Resample.c, PRECISION_BITS).
    """
    indices, weights = bicubic_taps(source, target, np.float64, from_source=kernel == "pil")
    precision = PIL_PRECISION if kernel == "pil" else 0
    largest = max(0.0, float(weights.max()))
    while precision < 22 and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    fixed = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64)
    return indices, fixed, precision


def _integer_axis(image: np.ndarray, target: int, kernel: ResizeKernel) -> np.ndarray:
    """Resize axis 0, rounded to uint8."""
    indices, fixed, precision = integer_taps(image.shape[0], target, kernel)
    total = np.full((target, *image.shape[1:]), (1 << precision) >> 1, dtype=np.int64)
    for k in range(fixed.shape[1]):
        total += fixed[:, k, None, None] * image[indices[:, k]]
    resized: np.ndarray = np.clip(total >> precision, 0, 255).astype(np.uint8)
    return resized


def _float_axis(image: np.ndarray, target: int) -> np.ndarray:
    """Resize axis 0 with float32 fused multiply-adds, tap after tap."""
    indices, weights = bicubic_taps(image.shape[0], target, np.float32)
    total = np.zeros((target, *image.shape[1:]), dtype=np.float32)
    for k in range(weights.shape[1]):
        total = _fma(weights[:, k, None, None], image[indices[:, k]], total)
    return total


class TapTable(NamedTuple):
    """Taps of one axis as kernels/patchify.py reads them.

    values: (2 + num_taps, target) int32: first source pixel, number of taps, weights; a weight is
        an integer `precision` bits up, the bits of a float32 in "float".
    span: most source pixels that a run of `token_px` outputs, one merged token, needs.
    """

    values: Tensor
    num_taps: int
    precision: int
    span: int


@lru_cache(maxsize=512)
def tap_table(
    source: int,
    target: int,
    kernel: ResizeKernel,
    token_px: int,
    device: torch.device,
    stream: int,
) -> TapTable:
    """Taps of one axis on a device, target a multiple of token_px; kept for the sizes used last
    (about 16 * (source + target) bytes each).

    stream: of `stream_of`.
    """
    precision = 0
    if source == target:  # the filter's weights are 1 and zeros then
        indices = np.arange(target)[:, None]
        weights = np.ones((target, 1), dtype=np.float32 if kernel == "float" else np.int64)
    elif kernel == "float":
        indices, weights = bicubic_taps(source, target, np.float32)
    else:
        indices, weights, precision = integer_taps(source, target, kernel)
    start = indices[:, 0]
    used = (weights != 0) * np.arange(1, weights.shape[1] + 1)
    # Where a last weight happens to be zero too, what is needed still ends no earlier than before.
    ends = np.maximum.accumulate(start + used.max(axis=1))
    bits = weights.view(np.int32) if kernel == "float" else weights.astype(np.int32)
    values = np.stack((start, ends - start, *bits.T)).astype(np.int32, order="C")
    span = int((ends[token_px - 1 :: token_px] - start[::token_px]).max())
    return TapTable(upload(values, device), weights.shape[1], precision, span)
