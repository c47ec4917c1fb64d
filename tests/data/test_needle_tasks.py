"""The balanced set of needle: rows of each task say what their media show."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vtts_rt import RolloutDataFeed
from vtts_rt.data.needle import CARD_COLOURS, Scene, make_scene
from vtts_rt.data.needle_tasks import (
    MovingScene,
    make_moving_scene,
    mc_row,
    tracking_row,
    write_balanced,
)
from vtts_rt.data.row import NUM_TRACKED
from vtts_rt.data.rows import TASKS, Row, check_evidence, read_manifest
from vtts_rt.types import Box, PixelBox


def _pixels(box: Box, side: int) -> PixelBox:
    return PixelBox(*(round(value * side) for value in (box.x0, box.y0, box.x1, box.y1)))


def _fill(colour: str) -> np.ndarray:
    return np.array(CARD_COLOURS[colour], float)


def _shows(frame: np.ndarray, box: Box, colour: str, atol: float = 45) -> bool:
    """Whether the box's middle has the colour (shades differ by 15 %), and its corner is white."""
    x0, y0, x1, y1 = _pixels(box, len(frame))
    corner = frame[y0 : y0 + 2, x0 : x0 + 2].reshape(-1, 3)
    quarter = frame[y0 + 8 : y0 + 12, x0 + 8 : x0 + 12].reshape(-1, 3).mean(0)
    return bool((corner > 180).all() and np.abs(quarter - _fill(colour)).max() < atol)


def test_the_boxes_of_a_tracking_row_are_where_the_card_is() -> None:
    speeds = []
    for seed in range(12):
        scene = make_moving_scene(seed, "held_out", footage=False)
        row = tracking_row(scene, "x.mp4")
        check_evidence(row, "tracking")
        assert len(row.boxes) == len(row.box_times) == NUM_TRACKED
        colour = scene.movers[-1].card.colour
        assert colour in row.question
        assert colour not in {card.colour for card in scene.cards}
        assert len({mover.card.colour for mover in scene.movers}) == 2
        for time, box in zip(row.box_times, row.boxes, strict=True):
            index = round(time * scene.source_fps)
            assert 0 <= index < scene.num_frames
            assert seed > 2 or _shows(scene.frame(index), box, colour)
        centres = np.array([[b.x0 + b.x1, b.y0 + b.y1] for b in row.boxes]) / 2
        speeds.append(np.ptp(centres, axis=0).max())
    assert min(speeds) > 0.15  # of the frame: it moves


def test_moving_cards_leave_the_scene_as_it_was() -> None:
    scene, moving = make_scene(5, footage=False), make_moving_scene(5, footage=False)
    assert moving.cards == scene.cards and moving.num_frames < scene.num_frames
    still = MovingScene(**{**vars(moving), "movers": ()})
    np.testing.assert_array_equal(still.frame(20), scene.frame(20))
    part = PixelBox(40, 60, 200, 222)
    whole = moving.render(1.5)
    np.testing.assert_array_equal(
        moving.render(1.5, part), whole[part.y0 : part.y1, part.x0 : part.x1]
    )


def test_the_first_card_is_the_one_that_starts_first() -> None:
    for seed in range(20):
        scene = make_scene(seed, footage=False)
        first = min(scene.cards, key=lambda card: card.span.start_seconds)
        for letter in range(4):
            row = mc_row(scene, letter, "x.mp4")
            assert row.answer == "ABCD"[letter]
            assert row.options[letter] == f"the {first.colour} card"
            assert len(set(row.options)) == 4


def test_a_balanced_set_of_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtts_rt.data.needle_tasks.write_clip", lambda *_: None)
    monkeypatch.setattr(Scene, "frame", lambda *_: np.zeros((2, 2, 3), np.uint8))
    manifest = write_balanced(tmp_path, 3, 8, "held_out", footage=False)
    sets = read_manifest(manifest)
    assert [entry.task_type for entry in sets] == list(TASKS)
    told: dict[str, list[Row]] = {e.task_type: [row for _, row in e.rows()] for e in sets}
    for task, rows in told.items():
        assert len(rows) == 8 and len({row.media for row in rows}) == 8
        for row in rows:
            check_evidence(row, task)
        letters = Counter(row.answer for row in rows)
        assert letters == dict.fromkeys("ABCD" if rows[0].options else [None], 8 // len(letters))
    assert told["gqa"][0].spans and told["gqa"][0].boxes and not told["igqa"][0].spans
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.jsonl"))]
    write_balanced(tmp_path, 3, 8, "held_out", footage=False)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.jsonl"))] == before


def test_some_tasks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtts_rt.data.needle.DURATION_SECONDS", (8.0, 8.0))
    manifest = write_balanced(tmp_path, 0, 1, tasks=["gqa"], footage=False)
    (entry,) = read_manifest(manifest)
    ((media, row),) = entry.rows(validate=True)
    assert entry.task_type == "gqa" and row.answer is not None and row.spans
    assert list(media.parent.iterdir()) == [media]  # what no row shows is not written


def test_the_feed_reads_a_balanced_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtts_rt.data.needle.DURATION_SECONDS", (8.0, 8.0))
    monkeypatch.setattr("vtts_rt.data.needle_tasks.TRACKING_SECONDS", (2.0, 2.0))
    done: list[tuple[int, int]] = []
    manifest = write_balanced(
        tmp_path, 0, 1, footage=False, progress=lambda *place: done.append(place)
    )
    assert done == [(1, 1)]
    rows = [row for entry in read_manifest(manifest) for row in entry.rows(validate=True)]
    assert len(rows) == len(TASKS)
    feed = RolloutDataFeed(manifest, frames=NUM_TRACKED)
    items = {item.data_set: item for item in feed}
    assert set(items) == {f"needle-{task}" for task in TASKS} and not feed.skipped
    found = items["needle-detection"]
    (colour,) = (name for name in CARD_COLOURS if name in found.row.question)
    assert _shows(np.asarray(found.frames[0]), found.row.boxes[0], colour)
    tracked = items["needle-tracking"]
    (colour,) = (name for name in CARD_COLOURS if name in tracked.row.question)
    assert np.allclose(tracked.timestamps_seconds, tracked.row.box_times, atol=1e-3)
    for frame, box in zip(tracked.frames, tracked.row.boxes, strict=True):
        assert _shows(np.asarray(frame), box, colour, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_per_task": 0}, "num_per_task must be in 1..100000, got 0"),
        ({"num_per_task": 2.0}, "num_per_task must be"),
        ({"split": "dev"}, "split must be one of train, held_out"),
        ({"seed": -1}, "seed must be an integer"),
        ({"tasks": []}, "tasks must be some of tg, gqa"),
        ({"tasks": ["gqa", "gqa"]}, "tasks must be"),
        ({"tasks": ["vqa"]}, "tasks must be"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str, tmp_path: Path) -> None:
    given = {"seed": 0, "num_per_task": 1, **change}
    with pytest.raises(ValueError, match=f"write_balanced: {message}"):
        write_balanced(tmp_path / "new", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
