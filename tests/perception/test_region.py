"""Region geometry against brute force on a raster, and the defined results of bad input."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtts_rt.perception.region import (
    box_iou,
    hull,
    intersect_spans,
    merge_spans,
    resolve_boxes,
    snap_box,
    span_iou,
    span_seconds,
    usable_spans,
    widen_spans,
)
from vtts_rt.types import Box, PixelBox, TimeSpan

INT_SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda t: TimeSpan(t[0], t[0] + t[1])),
    max_size=6,
)
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
FRACTION = st.floats(0.0, 1.0)


def seconds_of(spans: list[TimeSpan]) -> set[int]:
    return {t for s in spans for t in range(int(s.start_seconds), int(s.end_seconds))}


@given(INT_SPANS, INT_SPANS)
def test_span_algebra_is_set_algebra(a: list[TimeSpan], b: list[TimeSpan]) -> None:
    left, right = seconds_of(a), seconds_of(b)
    assert seconds_of(list(merge_spans(a))) == left
    assert span_seconds(a) == len(left)
    assert seconds_of(list(intersect_spans(a, b))) == left & right
    expected = len(left & right) / len(left | right) if left | right else 1.0
    assert span_iou(a, b) == pytest.approx(expected)
    merged = merge_spans(a)
    assert all(x.end_seconds < y.start_seconds for x, y in zip(merged, merged[1:], strict=False))


@given(st.lists(st.tuples(ANY_FLOAT, ANY_FLOAT), max_size=80), st.floats(0.1, 1e5))
def test_usable_spans_lie_in_the_video(raw: list[tuple[float, float]], duration: float) -> None:
    spans = usable_spans(raw, duration)
    assert len(spans) <= 64
    for s in spans:
        assert 0.0 <= s.start_seconds <= s.end_seconds <= duration
    assert merge_spans(spans) == spans


def test_usable_spans_rules() -> None:
    raw = [
        (-3.0, 2.0),
        (9.0, 5.0),
        (8.0, 99.0),
        (20.0, 30.0),
        (-5.0, -1.0),
        (math.nan, 1.0),
        (4.0, 4.0),
    ]
    assert usable_spans(raw, 10.0) == (TimeSpan(0, 2), TimeSpan(4, 4), TimeSpan(8, 10))
    assert usable_spans([(0.0, 1.0)] * 10**5, 10.0) == (TimeSpan(0, 1),)


def test_widen() -> None:
    assert widen_spans([TimeSpan(1, 2), TimeSpan(5, 9.5)], 1.0, 10.0) == (
        TimeSpan(0, 3),
        TimeSpan(4, 10),
    )


@given(
    FRACTION,
    FRACTION,
    FRACTION,
    FRACTION,
    st.integers(1, 900),
    st.integers(1, 900),
    st.integers(1, 80),
)
def test_snap_is_inside_and_around(
    a: float, b: float, c: float, d: float, height: int, width: int, side: int
) -> None:
    box = Box(min(a, b), min(c, d), max(a, b), max(c, d))
    px = snap_box(box, height, width, side)
    assert 0 <= px.x0 < px.x1 <= width and 0 <= px.y0 < px.y1 <= height
    assert px.x1 - px.x0 >= min(side, width) and px.y1 - px.y0 >= min(side, height)
    assert px.x0 <= box.x0 * width + 1e-5 and px.x1 >= box.x1 * width - 1e-5
    assert px.y0 <= box.y0 * height + 1e-5 and px.y1 >= box.y1 * height - 1e-5


@given(st.integers(1, 3000), st.integers(1, 3000), st.data())
def test_pixels_survive_normalising(height: int, width: int, data: st.DataObject) -> None:
    x0 = data.draw(st.integers(0, width - 1))
    y0 = data.draw(st.integers(0, height - 1))
    px = PixelBox(
        x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    )
    box = Box(px.x0 / width, px.y0 / height, px.x1 / width, px.y1 / height)
    assert snap_box(box, height, width) == px


def test_resolve_pixels_of_the_resized_view() -> None:
    view = PixelBox(100, 50, 300, 150)  # 200 x 100 px, shown at 400 x 200
    (box,) = resolve_boxes([(200.0, 100.0, 400.0, 200.0)], view, (200, 400), (200, 400))
    assert box == Box(200 / 400, 100 / 200, 300 / 400, 150 / 200)


def test_resolve_fractions_and_repairs() -> None:
    view, size = PixelBox(0, 0, 400, 200), (56, 112)
    assert resolve_boxes([(0.5, 0.0, 1.0, 1.0)], view, size, (200, 400)) == [Box(0.5, 0, 1, 1)]
    assert resolve_boxes([(112.0, 56.0, 56.0, 0.0)], view, size, (200, 400)) == [Box(0.5, 0, 1, 1)]
    assert resolve_boxes([(-50.0, -9.0, 56.0, 900.0)], view, size, (200, 400)) == [
        Box(0, 0, 0.5, 1)
    ]
    bad = [(5.0, 5.0, 5.0, 9.0), (math.nan, 0.0, 1.0, 1.0), (500.0, 0.0, 600.0, 9.0)]
    assert resolve_boxes(bad, view, size, (200, 400)) == []


def test_box_iou_and_hull() -> None:
    a, b = Box(0, 0, 0.5, 1), Box(0.25, 0, 0.75, 1)
    assert box_iou(a, b) == pytest.approx(1 / 3)
    assert box_iou(a, a) == 1.0
    assert box_iou(a, Box(0.6, 0, 1, 1)) == 0.0
    assert box_iou(Box(0.2, 0.2, 0.2, 0.2), a) == 0.0
    assert hull([a, b]) == Box(0, 0, 0.75, 1)
    with pytest.raises(ValueError, match="hull: boxes must be at least one box"):
        hull([])
