"""Features of the views of episodes: rendered straight from the scene, encoded once, kept.

Two sources. `sketch_features` makes features from labels alone, with a fixed random matrix: no
pixel is drawn, so the language model can see a hundred thousand clips in the time of a few
thousand. The vision stage trains the tower to write features in the same directions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tiny.episodes import Episode
from tiny.views import (
    NUM_ATTRIBUTES,
    TOKENS,
    VIEW_PX,
    FloatArray,
    ViewBatch,
    attributes,
    empty_batch,
    label_view,
    view_pixels,
)
from tiny.vision_stage import forward_views
from vtts_rt.models.base import VideoLM
from vtts_rt.types import PixelBox

_PAIRS_PER_PASS = 96


def episode_labels(episode: Episode) -> ViewBatch:
    """Labels of every view of an episode, without pixels."""
    spans = episode.transcript.spans
    batch = empty_batch(len(spans), pixels=False)
    for row, span in enumerate(spans):
        times = tuple(index / episode.scene.source_fps for index in span.segment.frame_indices)
        label_view(batch, row, episode.scene, times, span.segment.box)
    return batch


def sketch_matrix(num_channels: int) -> FloatArray:
    """(NUM_ATTRIBUTES, C) fixed random directions of the attributes."""
    rng = np.random.default_rng(0)
    return rng.normal(0.0, 0.5, (NUM_ATTRIBUTES, num_channels)).astype(np.float32)


def sketch_features(labels: ViewBatch, matrix: FloatArray, rng: np.random.Generator) -> FloatArray:
    """(N, 9, C) features that say what the labels say, with noise."""
    clean = attributes(labels) @ matrix
    noise = rng.normal(0.0, rng.uniform(0.05, 0.3), clean.shape)
    return clean + noise.astype(np.float32)


def episode_pixels(episode: Episode, rng: np.random.Generator | None) -> NDArray[np.uint8]:
    """(V, 2, 84, 84, 3) uint8 of every view; `rng` adds codec noise (see view_pixels)."""
    scene, spans = episode.scene, episode.transcript.spans
    pixels = np.empty((len(spans), 2, VIEW_PX, VIEW_PX, 3), np.uint8)
    done: dict[tuple[int, PixelBox], NDArray[np.uint8]] = {}
    for row, span in enumerate(spans):
        box = span.segment.box
        for side, frame in enumerate(span.segment.frame_indices):
            key = frame, box
            if key not in done:
                done[key] = view_pixels(scene, frame / scene.source_fps, box, rng)
            pixels[row, side] = done[key]
    return pixels


@torch.no_grad()
def encode_views(model: VideoLM, pixels: NDArray[np.uint8]) -> FloatArray:
    """(N, 9, C) features of views (N, 2, 84, 84, 3)."""
    out = []
    for start in range(0, len(pixels), _PAIRS_PER_PASS):
        part = pixels[start : start + _PAIRS_PER_PASS]
        out.append(forward_views(model, part))
    return torch.cat(out).view(len(pixels), TOKENS, -1).numpy()
