"""Geometry of regions: time spans in seconds, boxes on a frame, and the step to pixels.

Spans are half-open `[start, end)`; a span list means the union of its spans. Boxes are xyxy with
the origin at the top left: `Box` is normalised to the whole source frame, `PixelBox` is in
integer source pixels and half-open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, product

from vtts_rt.perception.chat import BoxUnit
from vtts_rt.types import Box, PixelBox, TimeSpan, require

RawSpan = tuple[float, float]
RawBox = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class RawRegion:
    """One request for another look, as written: what a call or a mark binds together.

    span: (start, end) seconds. frames: first and last source frame index. ordinals: frames of the
    first look, counted from 1. day_range: two times of a day clock, such as DAY1_11210217.
    frame_number_at_seconds: asks which source frame is shown at a time; it is shown, with its
    number where the reply says it.
    box: xyxy in box_unit (None: what the family writes, see ChatFormat), of the view number `view`:
    0 is the original, k the k-th image that later rounds gave back, None the latest view.
    sample_fps, num_frames: how densely to look. query: what to look for; label: what the box holds.
    Numbers are finite, lists bounded, nothing is clipped or ordered.
    """

    span: RawSpan | None = None
    frames: tuple[int, int] | None = None
    ordinals: tuple[int, ...] = ()
    day_range: tuple[str, str] | None = None
    frame_number_at_seconds: float | None = None
    box: RawBox | None = None
    box_unit: BoxUnit | None = None
    view: int | None = None
    sample_fps: float | None = None
    num_frames: int | None = None
    query: str | None = None
    label: str | None = None


# A cropped view keeps at least this many source pixels a side: four LM tokens without upscaling.
MIN_VIEW_PX = 56
MAX_REGION_SPANS = 64


# -- spans ------------------------------------------------------------------------------------


def merge_spans(spans: Iterable[TimeSpan]) -> tuple[TimeSpan, ...]:
    """The same union as disjoint spans in ascending order; touching spans become one."""
    merged: list[TimeSpan] = []
    for span in sorted(spans, key=lambda s: (s.start_seconds, s.end_seconds)):
        if merged and span.start_seconds <= merged[-1].end_seconds:
            end = max(merged[-1].end_seconds, span.end_seconds)
            merged[-1] = TimeSpan(merged[-1].start_seconds, end)
        else:
            merged.append(span)
    return tuple(merged)


def clip_spans(spans: Iterable[TimeSpan], duration_seconds: float) -> tuple[TimeSpan, ...]:
    """The part inside [0, duration_seconds), merged; what lies outside is dropped."""
    inside = []
    for span in spans:
        start = max(span.start_seconds, 0.0)
        end = min(span.end_seconds, duration_seconds)
        if start <= end and start < duration_seconds:
            inside.append(TimeSpan(start, end))
    return merge_spans(inside)


def widen_spans(
    spans: Iterable[TimeSpan], margin_seconds: float, duration_seconds: float
) -> tuple[TimeSpan, ...]:
    """Every span longer by the margin at both ends, clipped to the video and merged."""
    wide = [
        TimeSpan(s.start_seconds - margin_seconds, s.end_seconds + margin_seconds) for s in spans
    ]
    return clip_spans(wide, duration_seconds)


def intersect_spans(a: Iterable[TimeSpan], b: Iterable[TimeSpan]) -> tuple[TimeSpan, ...]:
    """Spans of positive length that lie in both unions."""
    common = []
    for one, other in product(merge_spans(a), merge_spans(b)):
        start = max(one.start_seconds, other.start_seconds)
        end = min(one.end_seconds, other.end_seconds)
        if start < end:
            common.append(TimeSpan(start, end))
    return tuple(common)


def span_seconds(spans: Iterable[TimeSpan]) -> float:
    """Length of the union."""
    return math.fsum(s.end_seconds - s.start_seconds for s in merge_spans(spans))


def span_iou(a: Iterable[TimeSpan], b: Iterable[TimeSpan]) -> float:
    """Intersection over union of two unions, in [0, 1].

    Two unions of zero length count as equal: 1.0 (the temporal reward of VideoChat-R1.5).
    """
    left, right = merge_spans(a), merge_spans(b)
    both = span_seconds(intersect_spans(left, right))
    union = span_seconds(left + right)
    return both / union if union > 0.0 else 1.0


def usable_spans(spans: Iterable[RawSpan], duration_seconds: float) -> tuple[TimeSpan, ...]:
    """What of the raw numbers of a clue can be looked at: disjoint, ascending, inside the video.

    Dropped: NaN or infinite ends, reversed spans (as the published sampler drops them), spans
    that begin at or after the end of the video. Clipped: negative starts, ends beyond the
    video. An instant (start == end) stays, as a span of zero length. At most the first 64
    spans count.
    """
    given = [
        TimeSpan(start, end)
        for start, end in islice(spans, MAX_REGION_SPANS)
        if math.isfinite(start) and math.isfinite(end) and start <= end and end >= 0.0
    ]
    return clip_spans(given, duration_seconds)


# -- boxes ------------------------------------------------------------------------------------


def box_area(box: Box) -> float:
    """Part of the frame that the box covers; 0 for an empty or reversed box."""
    return max(0.0, box.x1 - box.x0) * max(0.0, box.y1 - box.y0)


def intersect_boxes(a: Box, b: Box) -> Box | None:
    """The common part, or None where it has no area."""
    common = Box(max(a.x0, b.x0), max(a.y0, b.y0), min(a.x1, b.x1), min(a.y1, b.y1))
    return common if common.x0 < common.x1 and common.y0 < common.y1 else None


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where neither box has an area."""
    common = intersect_boxes(a, b)
    if common is None:
        return 0.0
    both = box_area(common)
    union = box_area(a) + box_area(b) - both
    return both / union if union > 0.0 else 0.0


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of at least one box."""
    require("hull", "boxes", boxes, len(boxes) > 0, "at least one box")
    return Box(
        min(b.x0 for b in boxes),
        min(b.y0 for b in boxes),
        max(b.x1 for b in boxes),
        max(b.y1 for b in boxes),
    )


def clip_box(box: RawBox) -> Box | None:
    """Fractions of the frame as a Box: ends in order, clipped to [0, 1], None without area."""
    if not all(math.isfinite(v) for v in box):
        return None
    x0, x1 = sorted(min(max(v, 0.0), 1.0) for v in (box[0], box[2]))
    y0, y1 = sorted(min(max(v, 0.0), 1.0) for v in (box[1], box[3]))
    return Box(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def full_view(height: int, width: int) -> PixelBox:
    """The whole frame."""
    return PixelBox(0, 0, width, height)


def snap_box(box: Box, height: int, width: int, min_side_px: int = 1) -> PixelBox:
    """The smallest box of whole source pixels around `box`, inside the frame, never empty.

    min_side_px: a shorter side grows about its middle to this many pixels, or to the whole
    frame where that is smaller, and is moved to stay inside.
    """
    x0, x1 = _snap_side(box.x0, box.x1, width, min_side_px)
    y0, y1 = _snap_side(box.y0, box.y1, height, min_side_px)
    return PixelBox(x0, y0, x1, y1)


def _snap_side(low: float, high: float, size: int, min_side_px: int) -> tuple[int, int]:
    # 1e-6 px: a box that came from whole pixels must go back to the same pixels.
    start = min(max(math.floor(low * size + 1e-6), 0), size - 1)
    stop = min(max(math.ceil(high * size - 1e-6), start + 1), size)
    missing = min(max(min_side_px, 1), size) - (stop - start)
    if missing > 0:
        start = min(max(start - missing // 2, 0), size - (stop - start + missing))
        stop = start + min(max(min_side_px, 1), size)
    return start, stop


def resolve_boxes(
    boxes: Iterable[RawBox],
    view: PixelBox,
    resized_hw: tuple[int, int],
    frame_hw: tuple[int, int],
) -> list[Box]:
    """Boxes in a model's text as boxes on the whole frame.

    A model speaks of the view that it saw: `view` in source pixels, shown at `resized_hw` px.
    Four values in [0, 1] are fractions of the view, otherwise they are pixels of the resized
    view. Reversed ends are swapped, what lies outside the view is clipped; boxes with a
    non-finite value or without area after that are dropped.
    """
    height, width = resized_hw
    frame_height, frame_width = frame_hw
    resolved = []
    for box in boxes:
        fractions = all(0.0 <= v <= 1.0 for v in box)
        scale_x, scale_y = (1.0, 1.0) if fractions else (1.0 / width, 1.0 / height)
        inside = clip_box((box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y))
        if inside is None:
            continue
        view_width, view_height = view.x1 - view.x0, view.y1 - view.y0
        resolved.append(
            Box(
                (view.x0 + inside.x0 * view_width) / frame_width,
                (view.y0 + inside.y0 * view_height) / frame_height,
                (view.x0 + inside.x1 * view_width) / frame_width,
                (view.y0 + inside.y1 * view_height) / frame_height,
            )
        )
    return resolved
