from __future__ import annotations

import numpy as np
import pytest
from tiny.views import (
    COLOUR_INDEX,
    GRID,
    MIN_MARK_PX,
    NUM_ATTRIBUTES,
    READABLE_PX,
    _centre,
    _square,
    attributes,
    empty_batch,
    halve_chroma,
    label_view,
    make_view_batch,
    view_pixels,
)

from vtts_rt.data.needle import MARK_COLOURS, Level, make_scene
from vtts_rt.types import PixelBox


@pytest.fixture(autouse=True)
def _no_footage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtts_rt.data.needle.footage_available", lambda: False)


def test_batches_depend_on_seed_and_index_alone() -> None:
    first, again = make_view_batch(3, 5, 6), make_view_batch(3, 5, 6)
    for name in ("pixels", "centre", "cover", "mark", "cells", "mark_offset"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.pixels, make_view_batch(3, 6, 6).pixels)


def test_labels_point_at_what_is_drawn() -> None:
    scene = make_scene(2)
    card = scene.cards[0]
    time = (card.mark_span.start_seconds + card.mark_span.end_seconds) / 2
    x, y = ((a + b) // 2 for a, b in zip(card.mark_box[:2], card.mark_box[2:], strict=True))
    box = PixelBox(x - 30, y - 20, x + 30, y + 40)
    batch = empty_batch(1)
    label_view(batch, 0, scene, (time, time), box)
    colour = COLOUR_INDEX[card.colour]
    (token,) = np.flatnonzero(batch.mark[0, :, colour])
    column = token % GRID + batch.mark_offset[0, token, 0]
    row = token // GRID + batch.mark_offset[0, token, 1]
    assert column * 28 == pytest.approx(42, abs=1.5) and row * 28 == pytest.approx(28, abs=1.5)
    names = list(MARK_COLOURS)
    assert [names[i] for i in batch.cells[0, token]] == list(card.pattern)
    pixels = view_pixels(scene, time, box).astype(int)
    step = (card.mark_box.x1 - card.mark_box.x0) // 4
    for (dy, dx), name in zip(((-1, -1), (-1, 1), (1, -1), (1, 1)), card.pattern, strict=True):
        seen = pixels[round(28 + dy * step * 1.4), round(42 + dx * step * 1.4)]
        distance = {n: np.abs(seen - np.array(c)).sum() for n, c in MARK_COLOURS.items()}
        assert min(distance, key=lambda n: distance[n]) == name


def test_nothing_is_labelled_when_nothing_shows() -> None:
    scene = make_scene(2)
    last = max(card.span.end_seconds for card in scene.cards)
    batch = empty_batch(1)
    label_view(batch, 0, scene, (last, last), PixelBox(0, 0, scene.width, scene.height))
    assert not batch.cover.any() and not batch.mark.any() and (batch.cells == -1).all()
    assert attributes(batch).shape == (1, 9, NUM_ATTRIBUTES)
    assert not attributes(batch).any()


@pytest.mark.parametrize(
    ("level", "part", "seen", "readable"),
    [
        ("glance", 1.0, True, True),
        ("near", 1.0, False, False),
        ("near", 0.4, True, True),
        ("far", 1.0, False, False),
        ("far", 0.4, True, False),
        ("far", 0.125, True, True),
    ],
)
def test_the_level_says_where_a_mark_is_seen_and_read(
    level: Level, part: float, seen: bool, readable: bool
) -> None:
    for seed in range(8):
        scene = make_scene(seed, difficulty=level)
        card = scene.cards[0]
        time = (card.mark_span.start_seconds + card.mark_span.end_seconds) / 2
        side = round(part * scene.width)
        box = _square(scene, *_centre(card.mark_box), side)
        batch = empty_batch(1)
        label_view(batch, 0, scene, (time, time), box)
        colour = COLOUR_INDEX[card.colour]
        assert bool(batch.mark[..., colour].any()) == seen
        (token,) = np.flatnonzero(batch.mark[0, :, colour]) if seen else (0,)
        assert bool((batch.cells[0, token] >= 0).all()) == readable
        mark = (card.mark_box.x1 - card.mark_box.x0) / side * 84
        assert (mark >= MIN_MARK_PX, mark >= READABLE_PX) == (seen, readable)


def test_views_of_training_are_of_the_scales_of_rounds() -> None:
    batch = make_view_batch(3, 0, 96)
    readable = (batch.cells[..., 0] >= 0).any(1)
    assert readable.sum() > 12 and batch.card_known.sum() > 48
    assert (readable & (batch.card_known > 0)).sum() > 8  # in whole frames and views of cards too


def test_half_chroma_keeps_grey_and_whole_blocks() -> None:
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (16, 16, 1), dtype=np.uint8), 3, axis=2)
    assert np.abs(halve_chroma(grey).astype(int) - grey).max() <= 1
    flat = np.full((8, 8, 3), (200, 30, 90), np.uint8)
    assert np.abs(halve_chroma(flat).astype(int) - flat).max() <= 1
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    red = halve_chroma(stripes).astype(int)
    assert (red[:, 1::2, 0] > 20).all()  # colour leaks into the black columns
