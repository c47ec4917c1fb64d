"""The antialiased bicubic resize of uint8 images, as ATen computes it: taps and reference.

`fixed_point` rounds as on a CPU (int16 weights, uint8 between the two passes), `float` as on a
GPU (float32 fused multiply-adds, rounded once at the end).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtts_rt.ops.upload import upload
from vtts_rt.types import TOKEN_PX


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


def resize_fixed_point(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3) uint8, ATen's CPU numbers: columns, then rows."""
    columns = _fixed_point_axis(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return _fixed_point_axis(columns, height)


def fixed_point_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, int]:
    """`bicubic_taps` with weights (target, K) int64 of at most 15 bits, `precision` bits up: the
    largest precision with round(w_max * 2^(p+1)) < 2^15, p <= 22."""
    indices, weights = bicubic_taps(source, target, np.float64)
    largest = max(0.0, float(weights.max()))
    precision = 0
    while precision < 22 and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    scaled = weights * (1 << precision)
    fixed = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64)
    return indices, fixed, precision


def _fixed_point_axis(image: np.ndarray, target: int) -> np.ndarray:
    """Resize axis 0."""
    indices, fixed, precision = fixed_point_taps(image.shape[0], target)
    total = np.full((target, *image.shape[1:]), (1 << precision) >> 1, dtype=np.int64)
    for k in range(fixed.shape[1]):
        total += fixed[:, k, None, None] * image[indices[:, k]]
    resized: np.ndarray = np.clip(total >> precision, 0, 255).astype(np.uint8)
    return resized


def resize_float(image: np.ndarray, height: int, width: int) -> np.ndarray:
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


class TapTable(NamedTuple):
    """Taps of one axis as kernels/patchify.py reads them.

    values: (2 + num_taps, target) int32: first source pixel, number of taps, weights; a weight is
        `precision` bits up in fixed point, the bits of a float32 otherwise.
    span: most source pixels that a run of TOKEN_PX outputs, one merged token, needs.
    """

    values: Tensor
    num_taps: int
    precision: int
    span: int


@lru_cache(maxsize=512)
def tap_table(
    source: int, target: int, fixed_point: bool, device: torch.device, stream: int
) -> TapTable:
    """Taps of one axis on a device, target a multiple of TOKEN_PX; kept for the sizes used last
    (about 16 * (source + target) bytes each).

    stream: of `stream_of`.
    """
    precision = 0
    if source == target:  # the filter's weights are 1 and zeros then
        indices = np.arange(target)[:, None]
        weights = np.ones((target, 1), dtype=np.int64 if fixed_point else np.float32)
    elif fixed_point:
        indices, weights, precision = fixed_point_taps(source, target)
    else:
        indices, weights = bicubic_taps(source, target, np.float32)
    start = indices[:, 0]
    used = (weights != 0) * np.arange(1, weights.shape[1] + 1)
    # Where a last weight happens to be zero too, what is needed still ends no earlier than before.
    ends = np.maximum.accumulate(start + used.max(axis=1))
    bits = weights.astype(np.int32) if fixed_point else weights.view(np.int32)
    values = np.stack((start, ends - start, *bits.T)).astype(np.int32, order="C")
    span = int((ends[TOKEN_PX - 1 :: TOKEN_PX] - start[::TOKEN_PX]).max())
    return TapTable(upload(values, device), weights.shape[1], precision, span)
