"""Parity `release`: sizes, pixels and positions of the released code, held against torchvision, PIL
and transformers' model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision_shim
from transformers_tools import Clip, Image, TransformersPeer

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.sizing import image_size, resize_kernel, smart_resize
from vtts_rt.perception.strategy import plan_round
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, VideoMetadata

torchvision_shim.install()

MAX_TOKENS = 12
PIXEL = 28 * 28


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> TransformersPeer:
    return TransformersPeer(checkpoint)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, dtype="float32", device="cpu") as runtime:
        yield runtime


# -- sizes --------------------------------------------------------------------------------------


def published_size(height: int, width: int, least: float, most: float) -> tuple[int, int]:
    """smart_resize of qwen-vl-utils and of the release, restated."""
    h, w = (max(28, round(side / 28) * 28) for side in (height, width))
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        return math.floor(height / shrink / 28) * 28, math.floor(width / shrink / 28) * 28
    if h * w < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / 28) * 28, math.ceil(width * grow / 28) * 28
    return h, w


def test_sizes_are_those_of_the_released_function() -> None:
    dice = random.Random(0)
    for _ in range(2000):
        height, width = (int(10 ** dice.uniform(0.5, 3.5)) for _ in range(2))
        least, most = dice.choice([(4, 768), (128, 256), (16, 20)])
        expected = published_size(height, width, least * PIXEL, most * PIXEL)
        if max(height, width) > 200 * min(height, width) or min(expected) == 0:
            continue  # refused there
        found = smart_resize(height, width, least * PIXEL, most * PIXEL, "release")
        assert found == expected, (height, width)


@pytest.mark.parametrize("hw", [(224, 224), (20, 30), (3000, 4000), (1000, 10), (30, 28)])
def test_an_image_has_bounds_of_its_own(hw: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as processor

    release, other = ResolvedPerception(), ResolvedPerception(parity="transformers")
    assert image_size(release, *hw) == published_size(*hw, 4 * PIXEL, 768 * PIXEL)
    assert image_size(other, *hw) == processor(*hw, 28, 128 * PIXEL, 768 * PIXEL)
    height, width = image_size(release, *hw, is_crop=True)
    assert height * width >= release.min_pixels


def test_images_share_the_budget_of_a_round() -> None:
    config = ResolvedPerception(total_pixels=400 * PIXEL)
    assert image_size(config, 224, 224) == (224, 224)
    for num_images in (1, 2, 5, 1000):
        height, width = image_size(config, 3000, 4000, num_images)
        assert height * width <= max(400 * PIXEL / num_images, 4 * PIXEL)


@pytest.mark.parametrize("strategy", ["official", "grid", "refresh", "append"])
def test_every_strategy_shows_the_pixels_of_its_parity(strategy: Any) -> None:
    video = VideoMetadata("v", 90, 10.0, 9.0, 360, 640, "test")
    image = VideoMetadata("i", 1, 1.0, 0.0, 224, 224, "image", is_image=True)
    for parity in ("release", "transformers"):
        config = ResolvedPerception(parity=parity)  # type: ignore[arg-type]
        plan = plan_round(strategy, config, [video, image], [], 0)
        for segment in plan.segments:
            assert segment.resize == resize_kernel(parity, segment.is_image)  # type: ignore[arg-type]
        assert {s.resize for s in plan.segments} == (
            {"float", "pil"} if parity == "release" else {"fixed"}
        )
        shown = next(segment for segment in plan.segments if segment.is_image)
        assert (shown.resized_hw == (224, 224)) == (parity == "release")


# -- answers ------------------------------------------------------------------------------------


def resized_video(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """torchvision's v1 functional resize of uint8 frames, as the release calls it."""
    from torchvision.transforms import InterpolationMode, functional

    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    mode = InterpolationMode.BICUBIC
    video = functional.resize(video, list(size), interpolation=mode, antialias=True)
    return video.permute(0, 2, 3, 1).contiguous().numpy()


def resized_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(PIL.Image.fromarray(pixels).resize((size[1], size[0])))


def release_positions(inputs: Any, model: Any) -> torch.Tensor:
    """(3, 1, N): text goes on after the largest position, as in transformers 4.49 to 4.57."""
    kinds = inputs["mm_token_type_ids"][0].tolist()
    image_grids = iter(inputs.get("image_grid_thw", torch.zeros(0, 3)).tolist())
    video_grids = iter(inputs.get("video_grid_thw", torch.zeros(0, 3)).tolist())
    seconds = iter(float(s) for s in inputs.get("second_per_grid_ts", []))
    rate = model.config.vision_config.tokens_per_second
    places: list[tuple[int, int, int]] = []
    while len(places) < len(kinds):
        start = 1 + max((max(place) for place in places), default=-1)
        kind = kinds[len(places)]
        if kind == 0:
            places.append((start,) * 3)
            continue
        t, h, w = next(image_grids if kind == 1 else video_grids)
        step = 1.0 if kind == 1 else np.float32(next(seconds)) * np.float32(rate)
        for frame in range(t):
            time = start + int(np.float32(frame) * np.float32(step))
            places += [(time, start + y, start + x) for y in range(h // 2) for x in range(w // 2)]
    return torch.tensor(places).T[:, None]


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_the_released_numerics(
    peer: TransformersPeer, runtime: Runtime, seed: int
) -> None:
    """A video and images, resized by torchvision and PIL, at the release's positions."""
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    source_fps = dice.choice([0.1, 1.0, 8.0])
    videos = [
        rng.integers(0, 256, (dice.randint(4, 60), 70, 110, 3), dtype=np.uint8),
        rng.integers(0, 256, (dice.randint(20, 90), dice.randint(20, 90), 3), dtype=np.uint8),
    ]
    dice.shuffle(videos)
    answer = runtime.ask(
        videos,
        "Which pattern is on the red card?",
        source_fps=source_fps,
        perception=ResolvedPerception(
            max_rounds=1, max_frames=16, min_pixels=4 * PIXEL, total_pixels=128 * PIXEL
        ),
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    (result,) = answer.rounds
    media: list[Clip | Image] = []
    for video, segment in zip(videos, result.plan.segments, strict=True):
        if segment.is_image:
            media.append(Image(resized_image(video, segment.resized_hw), None))
            continue
        shown = list(dict.fromkeys(segment.frame_indices))
        frames = resized_video(video[shown], segment.resized_hw)
        media.append(Clip(frames, shown, len(video), source_fps, None))
    inputs = peer.inputs(result.prompt, media)
    theirs = peer.continued(inputs, MAX_TOKENS, position_ids=release_positions(inputs, peer.model))
    assert result.prompt_tokens == theirs.num_prompt_tokens
    assert result.token_ids == theirs.token_ids
    # A level more or less in one value of ten thousand.
    assert result.logprobs == pytest.approx(theirs.logprobs, abs=2e-3)
