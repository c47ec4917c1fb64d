"""Resize kernels against torchvision v1, PIL and a float64 model, and their tap tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision_shim

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.bicubic import bicubic_taps, pil_rows_first, resize, tap_table
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import RESIZE_KERNELS, PixelBox


def test_float_is_close_to_a_float64_model() -> None:
    """Against float64 the uint8 result may be off by one where a value lies at a rounding edge."""
    frame, (height, width) = scene(97, 133, np.random.default_rng(0), 0), (56, 84)
    columns, column_weights = bicubic_taps(133, width, np.float64)
    rows, row_weights = bicubic_taps(97, height, np.float64)
    wide = np.einsum("hwkc,wk->hwc", frame[:, columns].astype(np.float64), column_weights)
    exact = np.clip(np.einsum("hkwc,hk->hwc", wide[rows], row_weights), 0, 255)
    off = np.abs(resize(frame, height, width, "float") - np.rint(exact))
    assert off.max() <= 1 and (off > 0).mean() <= 4e-4


def scene(height: int, width: int, rng: np.random.Generator, kind: int) -> np.ndarray:
    """Noise, waves with a little noise, or steps from black to white, whose overshoot is cut."""
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    if kind == 1:
        return np.stack([255 * ((x // 7 + y // 5 + c) % 2) for c in range(3)], -1).astype(np.uint8)
    waves = [128 + 100 * np.sin(x / 9 + c) * np.cos(y / 14 - c) for c in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def test_float_is_the_resize_of_torchvision_v1() -> None:
    """At most one level, on at most 1e-4 of the values, of every picture and of all. Not of steps
    between two values at a dyadic scale: they end at rounding edges, and the order of a sum, which
    compilers of torch choose, decides."""
    torchvision_shim.install()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as v1

    rng = np.random.default_rng(0)
    num_values = num_off = 0
    for index in range(36):
        frame = scene(*rng.integers(20, 400, 2).tolist(), rng, 2 * (index % 2))
        height, width = (28 * rng.integers(1, 14, 2)).tolist()
        pixels = torch.from_numpy(frame).permute(2, 0, 1)
        v1_pixels = v1.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        theirs = v1_pixels.permute(1, 2, 0).numpy().astype(int)
        off = np.abs(resize(frame, height, width, "float") - theirs)
        assert off.max() <= 1
        assert (off > 0).sum() <= max(2, 1e-4 * off.size), (frame.shape, height, width)
        num_values, num_off = num_values + off.size, num_off + (off > 0).sum()
    assert num_values > 2e6 and num_off <= 3e-5 * num_values


def test_pil_is_the_resize_of_pil() -> None:
    """To the bit: up and down, one axis only, along y first, tall and flat; cropped before."""
    Image = pytest.importorskip("PIL.Image")
    import PIL

    rng = np.random.default_rng(0)
    rows_first = 0
    for index in range(90):
        height, width = rng.integers(1, 300, 2).tolist()
        size = tuple((28 * rng.integers(1, 9, 2)).tolist())
        if index % 5 == 0:
            height, width = (rng.integers(1, 2000, 2) // rng.permutation([1, 40]) + 1).tolist()
        if index % 7 == 0:
            height = size[0]
        frame = scene(height, width, rng, index % 3)
        x0, y0 = int(rng.integers(width)), int(rng.integers(height))
        box = PixelBox(0, 0, width, height) if index % 3 else PixelBox(x0, y0, width, height)
        crop = frame[box.y0 :, box.x0 :]
        if pil_rows_first(crop.shape[:2], size):
            rows_first += 1
            if int(PIL.__version__.split(".")[0]) < 13:
                continue
        theirs = np.asarray(Image.fromarray(crop).resize(size[::-1]))
        assert np.array_equal(resize(crop, *size, "pil"), theirs), (crop.shape, size)
        rows = patchify([PatchifyJob(frame, frame, box, size, "pil")], GEOMETRY)
        whole = PixelBox(0, 0, size[1], size[0])
        right = patchify([PatchifyJob(theirs, theirs, whole, size)], GEOMETRY)
        assert torch.equal(rows, right), (crop.shape, size)
    assert 10 <= rows_first <= 80


def test_a_tap_table_holds_the_filter() -> None:
    """What the GPU reads: also where an upscaling filter's last weight is zero by chance."""
    for source, target in ((91, 56), (13, 28), (28, 28), (14, 56), (300, 28)):
        for kernel in RESIZE_KERNELS:
            table = tap_table(source, target, kernel, 28, torch.device("cpu"), 0)
            start, count = table.values[0].long(), table.values[1].long()
            ends = (start + count).view(-1, 28)
            assert bool((ends[:, -1] == ends.max(1).values).all()) and bool((count > 0).all())
            assert table.span == (ends[:, -1] - start[::28]).max()
            weights = table.values[2:].T
            wide = weights.contiguous().view(torch.float32) if kernel == "float" else weights
            dense = torch.zeros(target, source + table.num_taps, dtype=torch.float64)
            dense.scatter_add_(1, start[:, None] + torch.arange(table.num_taps), wide.double())
            assert bool((dense[:, source:] == 0).all())
            indices, exact = bicubic_taps(source, target, np.float64)
            right = torch.zeros(target, source, dtype=torch.float64)
            right.scatter_add_(1, torch.from_numpy(indices), torch.from_numpy(exact))
            found = dense[:, :source] / (1 << table.precision)
            tolerance = {"fixed": 2.0**-14, "float": 1e-5, "pil": 2.0**-23}[kernel]
            assert (found - right).abs().max() <= tolerance
