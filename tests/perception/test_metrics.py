"""Evaluation metrics over regions."""

from __future__ import annotations

from vtts_rt.perception.metrics import regions_box_iou, regions_span_iou
from vtts_rt.types import Box, Region, TimeSpan

LEFT = Region(TimeSpan(0, 2), Box(0, 0, 0.25, 1))
RIGHT = Region(TimeSpan(1, 3), Box(0.25, 0, 0.5, 1))
OTHER = Region(TimeSpan(50, 60), Box(0.9, 0.9, 1, 1), video=1)


def test_ious() -> None:
    regions = [LEFT, RIGHT, OTHER]
    assert regions_span_iou(regions, [TimeSpan(0, 4)]) == 0.75
    assert regions_box_iou(regions, Box(0, 0, 1, 1)) == 0.5
    assert regions_span_iou([], [TimeSpan(0, 4)]) == 0.0
    assert regions_box_iou([], Box(0, 0, 1, 1)) == 0.0
    assert regions_span_iou([], []) == 1.0
