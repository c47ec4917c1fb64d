"""patchify against transformers' processors of videos and images, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision_shim
from patch_tools import ISAS, full, noise, on_isa, one
from utils import QWEN3_VL, UNEVEN

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.perception.sizing import smart_resize
from vtts_rt.types import Geometry, PixelBox


@pytest.fixture(scope="module")
def processors() -> dict[Geometry, Any]:
    """transformers' video processor of each geometry."""
    torchvision_shim.install()
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    uneven = Qwen3VLVideoProcessor(image_mean=UNEVEN.mean, image_std=UNEVEN.std)
    return {GEOMETRY: Qwen2VLVideoProcessor(), QWEN3_VL: Qwen3VLVideoProcessor(), UNEVEN: uneven}


def official(
    processor: Any, frames: np.ndarray, min_pixels: int, max_pixels: int
) -> tuple[torch.Tensor, tuple[int, int]]:
    """(rows, resized_hw) of transformers for frames (T, H, W, 3)."""
    result = processor(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        cap_pixels_per_frame=False,
        do_sample_frames=False,
        return_tensors="pt",
    )
    _, rows, columns = result["video_grid_thw"][0].tolist()
    patch_px = processor.patch_size
    return result["pixel_values_videos"], (rows * patch_px, columns * patch_px)


def pair_jobs(frames: np.ndarray, resized_hw: tuple[int, int]) -> list[PatchifyJob]:
    """Whole frames two by two, an odd last one twice."""
    pairs = [(2 * i, min(2 * i + 1, len(frames) - 1)) for i in range((len(frames) + 1) // 2)]
    return [PatchifyJob(frames[a], frames[b], full(frames[a]), resized_hw) for a, b in pairs]


@pytest.mark.parametrize(
    ("shape", "min_pixels", "max_pixels"),
    [
        ((2, 56, 84, 3), 784, 10**7),  # no resize
        ((5, 112, 28, 3), 784, 10**7),  # no resize, last frame repeated
        ((3, 333, 517, 3), 784, 200_000),  # both axes change a little, odd T
        ((2, 40, 50, 3), 100_352, 602_112),  # up
        ((2, 270, 480, 3), 784, 20_000),  # down
        ((1, 56, 91, 3), 784, 10**7),  # one axis only
        ((1, 29, 1000, 3), 784, 10**7),  # flat
        ((1, 1000, 33, 3), 784, 20_000),  # tall
    ],
)
def test_equals_transformers_bit_for_bit(
    processors: dict[Geometry, Any], shape: tuple[int, ...], min_pixels: int, max_pixels: int
) -> None:
    frames = noise(*shape)
    expected, resized_hw = official(processors[GEOMETRY], frames, min_pixels, max_pixels)
    for backend in ("cpu", "reference"):
        rows = patchify(pair_jobs(frames, resized_hw), GEOMETRY, backend=backend)
        assert torch.equal(rows, expected), backend


@pytest.mark.parametrize("geometry", [QWEN3_VL, UNEVEN], ids=["Qwen3-VL", "uneven"])
@pytest.mark.parametrize(
    ("shape", "min_pixels", "max_pixels"),
    [
        ((2, 64, 96, 3), 1024, 10**7),  # no resize
        ((3, 128, 32, 3), 1024, 10**7),  # no resize, last frame repeated
        ((3, 333, 517, 3), 1024, 600_000),  # both axes change a little, odd T
        ((2, 41, 53, 3), 131_072, 786_432),  # up
        ((4, 271, 480, 3), 1024, 60_000),  # down
        ((2, 64, 91, 3), 1024, 10**7),  # one axis only
        ((2, 33, 1000, 3), 1024, 10**7),  # flat
        ((2, 1000, 37, 3), 1024, 40_000),  # tall
    ],
)
def test_equals_qwen3_vl_bit_for_bit(
    processors: dict[Geometry, Any],
    geometry: Geometry,
    shape: tuple[int, ...],
    min_pixels: int,
    max_pixels: int,
) -> None:
    frames = noise(*shape)
    expected, resized_hw = official(processors[geometry], frames, min_pixels, max_pixels)
    assert expected.shape[1] == geometry.row_size == 1536
    jobs = pair_jobs(frames, resized_hw)
    for backend in ("cpu", "reference"):
        assert torch.equal(patchify(jobs, geometry, backend=backend), expected), backend
    for isa in ISAS:
        assert torch.equal(on_isa(jobs, isa, 3, geometry), expected), isa


@pytest.mark.parametrize("hw", [(333, 517), (1000, 37), (96, 64)])
@pytest.mark.parametrize("geometry", [GEOMETRY, QWEN3_VL], ids=["Qwen2.5-VL", "Qwen3-VL"])
def test_images_equal_transformers_bit_for_bit(geometry: Geometry, hw: tuple[int, int]) -> None:
    torchvision_shim.install()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=geometry.patch_px, image_mean=geometry.mean, image_std=geometry.std
    )
    frame = noise(*hw, 3)
    result = processor(
        images=[torch.from_numpy(frame).permute(2, 0, 1)],
        size={"shortest_edge": 1024, "longest_edge": 100_000},
        return_tensors="pt",
    )
    _, rows, columns = result["image_grid_thw"][0].tolist()
    size = (rows * geometry.patch_px, columns * geometry.patch_px)
    assert torch.equal(patchify([one(frame, size)], geometry), result["pixel_values"])


def test_a_crop_equals_transformers_on_cropped_frames(processors: dict[Geometry, Any]) -> None:
    frames = noise(2, 150, 200, 3)
    box = PixelBox(13, 7, 190, 101)
    expected, resized_hw = official(processors[GEOMETRY], frames[:, 7:101, 13:190], 784, 12_000)
    job = PatchifyJob(frames[0], frames[1], box, resized_hw)
    assert torch.equal(patchify([job], GEOMETRY), expected)


@pytest.mark.parametrize("geometry", [GEOMETRY, QWEN3_VL], ids=["Qwen2.5-VL", "Qwen3-VL"])
def test_sizes_equal_transformers(geometry: Geometry) -> None:
    torchvision_shim.install()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

    rng, token_px = np.random.default_rng(0), geometry.token_px
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(token_px, 2000, 2))
        low, high = 128 * token_px**2, int(rng.integers(129, 800)) * token_px**2
        expected = theirs(height, width, token_px, low, high)
        assert smart_resize(height, width, low, high, token_px) == expected
