"""How well clues and answers match what is known to be right; each in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from vtts_rt.perception.region import box_iou, hull, span_iou
from vtts_rt.types import Box, Region, TimeSpan


def regions_span_iou(regions: Sequence[Region], spans: Sequence[TimeSpan], video: int = 0) -> float:
    """IoU in time of a clue's regions in one video with the true spans."""
    return span_iou([r.span for r in regions if r.video == video], spans)


def regions_box_iou(regions: Sequence[Region], box: Box, video: int = 0) -> float:
    """IoU on the frame of the box around a clue's boxes in one video with the true box.

    0 without regions; a clue without boxes stands for the whole frame.
    """
    boxes = [r.box for r in regions if r.video == video]
    return box_iou(hull(boxes), box) if boxes else 0.0
