"""What a round shows (FramePlan), and what a round left behind (RoundHistory)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.chat import BoxUnit
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.region import RawBox, clip_box, resolve_boxes, usable_spans
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
        return self.on_frame(self.clue.boxes, self.plan.views[video], metadata)

    def on_frame(
        self,
        boxes: Iterable[RawBox],
        view: View | Segment,
        metadata: VideoMetadata,
        unit: BoxUnit | None = None,
    ) -> list[Box]:
        """Boxes that were said of a view, on the whole frame; unit: None for box_unit."""
        if self.forced:
            return [box for raw in boxes if (box := clip_box(raw)) is not None]
        sides = {"px": view.resized_hw, "thousandth": (1000, 1000), "fraction": (1, 1)}
        frame_hw = (metadata.height, metadata.width)
        return resolve_boxes(boxes, view.box, sides[unit or self.box_unit], frame_hw)

    def regions(self, videos: Sequence[VideoMetadata]) -> tuple[Region, ...]:
        """Every span with every box, for each video that the clue says something about.

        Without boxes the box is the whole frame, without spans the time is that of the view
        in which the clue was given; an image's is 0. () where the clue cannot be used.
        """
        regions: list[Region] = []
        for video, metadata in enumerate(videos):
            spans, boxes = self.spans(metadata), self.boxes(video, metadata)
            if spans or boxes:
                spans = spans or self.plan.views[video].spans or (TimeSpan(0.0, 0.0),)
                regions += [Region(s, b, video) for s in spans for b in boxes or [FULL_BOX]]
        return tuple(regions)


def frame_times(metadata: VideoMetadata) -> NDArray[np.float64]:
    """(num_frames,) float64 seconds: timestamps, or index / source_fps where there are none."""
    if metadata.timestamps_seconds is not None:
        return np.asarray(metadata.timestamps_seconds, dtype=np.float64)
    return np.arange(metadata.num_frames) / metadata.source_fps


def make_segment(
    config: ResolvedPerception,
    pairs: Iterable[PairRef],
    view: View,
    *,
    is_image: bool = False,
    seconds_per_grid: float = 1.0,
) -> Segment:
    """Pairs as they are seen through a view."""
    kernel = resize_kernel(config.numerics, is_image)
    pairs, box, hw = tuple(pairs), view.box, view.resized_hw
    return Segment(pairs, box, hw, config.geometry, seconds_per_grid, is_image, kernel)


def make_image(
    config: ResolvedPerception, metadata: VideoMetadata, view: View
) -> tuple[View, list[Segment]]:
    """View and segment of an image, which is one pair of the same frame."""
    pair = PairRef(view.video, metadata.video_id, 0, 0, 0.0)
    return view, [make_segment(config, [pair], view, is_image=True)]


def make_plan(
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    look: RoundHistory | None,
    round_index: int,
    looks: Sequence[tuple[View, Sequence[Segment]]],
    notes: Sequence[str],
    frames: Sequence[Sequence[int]] | None = None,
) -> FramePlan:
    """The plan of a round. look: whose clue it follows. looks: what it shows of each video; frames:
    those of each video, where they are others than its segments hold."""
    shown = [tuple(f for s in segments for f in s.frame_indices) for _, segments in looks]
    stamps: list[float] = []
    for metadata, indices in zip(videos, frames or shown, strict=True):
        times = np.zeros(1) if metadata.is_image else frame_times(metadata)
        stamps += times[[*indices]].tolist()
    steps = [view.cell_seconds for view, _ in looks if view.cell_seconds > 0.0]
    return FramePlan(
        round_index=round_index,
        segments=tuple(segment for _, segments in looks for segment in segments),
        frame_indices=tuple(frame for indices in frames or shown for frame in indices),
        timestamps_seconds=tuple(stamps),
        sample_fps=2.0 / steps[0] if steps else config.sample_fps,
        views=tuple(view for view, _ in looks),
        regions=() if look is None else look.regions(videos),
        notes=tuple(dict.fromkeys(notes)),
        time_labels=config.time_labels,
    )
