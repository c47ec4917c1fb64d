"""Frame policies on the dyadic grid: `grid`, and the one of `refresh` and `append`.

The frames of a round (max_frames) are shared equally by the videos of a question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.plan import (
    FramePlan,
    RoundHistory,
    View,
    make_image,
    make_plan,
    make_segment,
)
from vtts_rt.perception.region import MIN_VIEW_PX, full_view, hull, snap_box, widen_spans
from vtts_rt.perception.sizing import image_size, view_size
from vtts_rt.perception.timeline import Cells, Timeline
from vtts_rt.types import PairRef, PixelBox, Segment, TimeSpan, VideoMetadata

_LEAST_FOCUS_PAIRS = 4  # 8 frames: a short clip's later look is still worth a round


def plan_grid(
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    history: Sequence[RoundHistory],
    round_index: int,
) -> FramePlan:
    """One segment a video; number of pairs, size and time step are those of round 1.

    A clue moves pairs: some second halves of cells inside the spans come in, so that the
    spans get `key_ratio` times the density, and as many pairs outside go, at most half of
    them, those after the first span first. An unusable clue shows round 1's frames again, as
    does one that covers all or too little; the notes say so.
    """
    look = history[-1] if history else None
    looks: list[tuple[View, list[Segment]]] = []
    notes: list[str] = []
    for video, metadata in enumerate(videos):
        box = full_view(metadata.height, metadata.width)
        if metadata.is_image:
            size = _image_size(config, videos, video, box)
            looks.append(make_image(config, metadata, View(video, box, size, (), 0.0)))
            continue
        timeline = Timeline(video, metadata, config.sample_fps)
        level = timeline.first_level(config, _max_pairs(config, videos))
        spans = () if look is None else look.spans(metadata)
        if look is not None and not spans:
            notes.append("no usable time span in the clue: the frames of the first round")
        pairs = _denser_inside(timeline, level, spans, config.key_ratio)
        if spans and pairs == timeline.pairs(np.arange(timeline.num_cells(level)), level):
            notes.append(f"video {video}: the clue changes nothing: the frames of the first round")
        size = view_size(config, metadata.height, metadata.width, 2 * len(pairs))
        step = timeline.cell_seconds(level)
        view = View(video, box, size, (TimeSpan(0.0, metadata.duration_seconds),), step, level)
        looks.append((view, [make_segment(config, pairs, view, seconds_per_grid=step)]))
    return make_plan(config, videos, look, round_index, looks, notes)


def _denser_inside(
    timeline: Timeline, level: int, spans: Sequence[TimeSpan], key_ratio: float
) -> list[PairRef]:
    """All cells of the level, with some pairs moved from outside the spans to the inside."""
    num = timeline.num_cells(level)
    inside = timeline.cells(spans, level)
    outside = np.setdiff1d(np.arange(num), inside)
    if len(inside) == 0 or len(outside) == 0:
        return timeline.pairs(np.arange(num), level)
    weight = len(inside) * key_ratio
    extra = round(num * weight / (weight + len(outside))) - len(inside)
    after, before = outside[outside > inside[0]], outside[outside < inside[0]]
    extra = max(0, min(extra, len(after) // 2 + len(before) // 2))
    finer: list[PairRef] = []
    depth = 1
    while len(finer) < extra and timeline.resolves(level + depth):
        halves = timeline.cells(spans, level + depth)
        # First halves begin with the frame that their parent begins with.
        halves = halves[halves % 2 == 1]
        finer += timeline.pairs(_spread(halves, extra - len(finer)), level + depth)
        depth += 1
    num_after = min(len(finer), len(after) // 2)
    drop = np.concatenate([_spread(after, num_after), _spread(before, len(finer) - num_after)])
    kept = timeline.pairs(np.setdiff1d(np.arange(num), drop), level)
    return sorted(kept + finer, key=lambda pair: pair.time_seconds)


def _spread(cells: Cells, num: int) -> Cells:
    """`num` of the cells (or all, if there are fewer), evenly spread."""
    if num >= len(cells):
        return cells
    return cells[(2 * np.arange(num) + 1) * len(cells) // (2 * max(num, 1))]


def plan_focus(
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    history: Sequence[RoundHistory],
    round_index: int,
    *,
    only_new: bool,
) -> FramePlan:
    """`refresh` and `append`: the whole video first, then what the clue points to.

    Every pair is a segment. A later round takes the clue's spans, wider by focus_margin_cells
    cells of the round in which it was given, at the finest level that fits into focus_frames,
    yet one level finer than that round (max_frames and the source permitting). It is seen
    through the box around all boxes (at least 56 source px a side). Without boxes the whole
    frame; without spans the time and the level of that round. Every view has the pixel budget
    of a frame in a round of max_frames. only_new leaves out what an earlier round has shown.
    Empty where that leaves nothing, or the clue cannot be used.
    """
    shown = {
        _content(pair, segment)
        for past in (history if only_new else ())
        for segment in past.plan.segments
        for pair in segment.pairs
    }
    looks: list[tuple[View, list[Segment]]] = []
    notes: list[str] = []
    look = history[-1] if history else None
    for video in range(len(videos)):
        view, planned = _look(config, videos, video, look, notes)
        fresh: list[Segment] = []
        if planned:
            for segment in planned:
                key = _content(segment.pairs[0], segment)
                if key not in shown:
                    shown.add(key)
                    fresh.append(segment)
            if not fresh:
                notes.append(f"video {video}: all that the clue points to has been shown")
        looks.append((view if fresh or look is None else look.plan.views[video], fresh))
    return make_plan(config, videos, look, round_index, looks, notes)


def _look(
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    video: int,
    look: RoundHistory | None,
    notes: list[str],
) -> tuple[View, list[Segment]]:
    """View and one-pair segments of one video, before anything is left out; none of an unusable
    clue, with the view of its round."""
    metadata = videos[video]
    box = full_view(metadata.height, metadata.width)
    boxes = [] if look is None else look.boxes(video, metadata)
    if boxes:
        box = snap_box(hull(boxes), metadata.height, metadata.width, MIN_VIEW_PX)
    if metadata.is_image:
        if look is not None and not boxes:
            notes.append(f"image {video}: no usable box in the clue")
            return look.plan.views[video], []
        size = _image_size(config, videos, video, box)
        return make_image(config, metadata, View(video, box, size, (), 0.0))
    size = view_size(config, box.y1 - box.y0, box.x1 - box.x0, config.max_frames)
    timeline = Timeline(video, metadata, config.sample_fps)
    max_pairs = _max_pairs(config, videos)
    level = timeline.first_level(config, max_pairs)
    spans: tuple[TimeSpan, ...] = (TimeSpan(0.0, metadata.duration_seconds),)
    if look is not None:
        before = look.plan.views[video]
        clue_spans = look.spans(metadata)
        if clue_spans:
            margin_seconds = config.focus_margin_cells * before.cell_seconds
            spans = widen_spans(clue_spans, margin_seconds, metadata.duration_seconds)
            num_pairs = focus_pairs(config, max_pairs, timeline.num_cells(level))
            wanted = max(before.level + 1, timeline.finest_level(spans, level, num_pairs))
            level = min(wanted, timeline.finest_level(spans, level, max_pairs))
        elif boxes:
            notes.append(f"video {video}: no usable time span in the clue, the time stays")
            spans, level = before.spans, before.level
        else:
            notes.append(f"video {video}: no usable time span and no usable box in the clue")
            return before, []
    pairs = timeline.pairs(timeline.cells(spans, level), level)
    view = View(video, box, size, spans, timeline.cell_seconds(level), level)
    return view, [make_segment(config, [pair], view) for pair in pairs]


def finer_frames(
    videos: Sequence[VideoMetadata], plan: FramePlan, sample_fps: float
) -> dict[int, list[int]]:
    """Video -> frames of the cells one level finer than those seen, without the plan's own.

    That is where the next clue leads first. A second level cost the first look twice as much
    (2.6 % of it on two cores) and saved a third look 30 ms of 110: it needs frames behind the
    last one wanted before a keyframe, which no decoder passes.
    """
    seen = {(p.video, f) for s in plan.segments for p in s.pairs for f in (p.frame_a, p.frame_b)}
    finer: dict[int, list[int]] = {}
    for view in plan.views:
        timeline = Timeline(view.video, videos[view.video], sample_fps) if view.spans else None
        if timeline is not None and timeline.resolves(view.level + 1):
            cells = timeline.cells(view.spans, view.level + 1)
            pairs = timeline.pairs(cells, view.level + 1)
            named = dict.fromkeys(f for pair in pairs for f in (pair.frame_a, pair.frame_b))
            finer[view.video] = [f for f in named if (view.video, f) not in seen]
    return finer


def _content(pair: PairRef, segment: Segment) -> tuple[int, int, int, PixelBox, tuple[int, int]]:
    """What makes two pairs of a question the same picture."""
    return pair.video, pair.frame_a, pair.frame_b, segment.box, segment.resized_hw


def grid_pairs(
    config: ResolvedPerception, metadata: VideoMetadata, videos: Sequence[VideoMetadata]
) -> int:
    """Frame pairs of a first look at one of `videos`, of `grid`, `refresh` and `append`."""
    timeline = Timeline(0, metadata, config.sample_fps)
    return timeline.num_cells(timeline.first_level(config, _max_pairs(config, videos)))


def _max_pairs(config: ResolvedPerception, videos: Sequence[VideoMetadata]) -> int:
    moving = sum(not metadata.is_image for metadata in videos)
    return max(1, config.max_frames // 2 // max(moving, 1))


def focus_pairs(config: ResolvedPerception, max_pairs: int, first_pairs: int) -> int:
    """Most pairs of a later look at one video."""
    wanted = config.focus_frames // 2 or max(first_pairs // 2, _LEAST_FOCUS_PAIRS)
    return min(wanted, max_pairs)


def _image_size(
    config: ResolvedPerception, videos: Sequence[VideoMetadata], video: int, box: PixelBox
) -> tuple[int, int]:
    """Images share the pixels of a round; each counts as one pair."""
    images = sum(metadata.is_image for metadata in videos)
    is_crop = box != full_view(videos[video].height, videos[video].width)
    return image_size(config, box.y1 - box.y0, box.x1 - box.x0, images, is_crop=is_crop)
