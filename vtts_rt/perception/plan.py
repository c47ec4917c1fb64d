"""What a round shows (FramePlan), and what a round left behind (RoundHistory)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.chat import BoxUnit
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.region import clip_box, resolve_boxes, usable_spans
from vtts_rt.perception.sizing import resize_kernel
from vtts_rt.types import (
    FULL_BOX,
    Box,
    PairRef,
    PixelBox,
    Region,
    Segment,
    TimeSpan,
    VideoMetadata,
)


@dataclass(frozen=True, slots=True)
class View:
    """What a round shows of one video.

    box: source px, shown at resized_hw px. spans: the time looked at. cell_seconds: time step
    of the pairs (0 for an image), level: its dyadic level (cell = 2 / sample_fps * 2^-level; 0
    for `official`). A round that shows nothing of a video keeps the view of the round before:
    that is what a clue refers to.
    """

    video: int
    box: PixelBox
    resized_hw: tuple[int, int]
    spans: tuple[TimeSpan, ...]
    cell_seconds: float
    level: int = 0


@dataclass(frozen=True, slots=True)
class FramePlan:
    """The frame pairs, boxes and pixel sizes of one round.

    segments: in prompt order. frame_indices, timestamps_seconds: the frames of this round in
    prompt order; `official` lists an odd number as sampled, without the repeated last frame
    that completes the pair. sample_fps: frames a second as told to the model, of the first
    video. views: one a video. regions: the clue that led here, as geometry. notes: sentences
    about every fallback taken. time_labels: whether the layout writes times before pairs.
    """

    round_index: int
    segments: tuple[Segment, ...]
    frame_indices: tuple[int, ...]
    timestamps_seconds: tuple[float, ...]
    sample_fps: float
    views: tuple[View, ...]
    regions: tuple[Region, ...] = ()
    notes: tuple[str, ...] = ()
    time_labels: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.segments

    @property
    def resized_hw(self) -> tuple[int, int]:
        """(height, width) px of the first segment; (0, 0) for an empty plan."""
        return self.segments[0].resized_hw if self.segments else (0, 0)

    @property
    def grid_thw(self) -> list[tuple[int, int, int]]:
        """(pairs, patch rows, patch columns) of every segment."""
        return [segment.grid_thw for segment in self.segments]

    @property
    def num_pairs(self) -> int:
        return sum(len(segment.pairs) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class RoundHistory:
    """A finished round: what it showed, and the clue it ended with.

    forced: the clue did not come from the model; its boxes are fractions of the whole frame,
    while a model's boxes refer to the view it saw. With several videos a clue speaks of all
    of them; its spans say nothing about images. box_unit: of the model's boxes (ChatFormat).
    """

    plan: FramePlan
    clue: Clue
    forced: bool = False
    box_unit: BoxUnit = "px"

    def spans(self, metadata: VideoMetadata) -> tuple[TimeSpan, ...]:
        """The spans that can be looked at, without those that lie outside the video."""
        if metadata.is_image:
            return ()
        return usable_spans(self.clue.spans, metadata.duration_seconds)

    def boxes(self, video: int, metadata: VideoMetadata) -> list[Box]:
        """The boxes on the whole frame of a video, without those that have no area."""
        if self.forced:
            clipped = (clip_box(box) for box in self.clue.boxes)
            return [box for box in clipped if box is not None]
        view = self.plan.views[video]
        frame_hw = (metadata.height, metadata.width)
        shown_hw = (1000, 1000) if self.box_unit == "thousandth" else view.resized_hw
        return resolve_boxes(self.clue.boxes, view.box, shown_hw, frame_hw)

    def regions(self, videos: Sequence[VideoMetadata]) -> tuple[Region, ...]:
        """Every span with every box, for each video that the clue says something about.

        Without boxes the box is the whole frame, without spans the time is that of the view
        in which the clue was given. () where the clue cannot be used.
        """
        regions: list[Region] = []
        for video, metadata in enumerate(videos):
            spans, boxes = self.spans(metadata), self.boxes(video, metadata)
            if spans or boxes:
                spans = spans or self.plan.views[video].spans
                regions += [Region(s, b, video) for s in spans for b in boxes or [FULL_BOX]]
        return tuple(regions)


def frame_times(metadata: VideoMetadata) -> NDArray[np.float64]:
    """(num_frames,) float64 seconds: timestamps, or index / source_fps where there are none."""
    if metadata.timestamps_seconds is not None:
        return np.asarray(metadata.timestamps_seconds, dtype=np.float64)
    return np.arange(metadata.num_frames) / metadata.source_fps


def image_segment(
    video: int,
    metadata: VideoMetadata,
    box: PixelBox,
    hw: tuple[int, int],
    config: ResolvedPerception,
) -> Segment:
    """An image is one pair of the same frame."""
    pair = PairRef(video, metadata.video_id, 0, 0, 0.0)
    kernel = resize_kernel(config.numerics, True)
    return Segment((pair,), box, hw, config.geometry, is_image=True, resize=kernel)
