"""What an item knows of its row beyond the frames: boxes of the right unit, and a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from feed_tools import SIDE, make_manifest, rows_of, write_clip

from vtts_rt import RolloutDataFeed
from vtts_rt.data.rows import BadRows, Row
from vtts_rt.types import Box


def test_boxes_in_pixels_are_fractions_in_items(tmp_path: Path) -> None:
    write_clip(tmp_path / "0.mp4", 0)
    inside, outside = (0.0, 0.0, SIDE / 2, 2.0 * SIDE), (1.0 + SIDE, 0.0, 2.0 + SIDE, 1.0)
    rows = [Row("0.mp4", "q", pixel_boxes=(box,)) for box in (inside, outside)]
    manifest = make_manifest(tmp_path, rows)
    with pytest.raises(BadRows, match=r"line 2: row: media is mislabelled: .*box must be inside"):
        list(RolloutDataFeed(manifest, frames=1))
    feed = RolloutDataFeed(manifest, frames=1, on_bad="skip")
    (item,) = list(feed)
    assert item.row.boxes == (Box(0.0, 0.0, 0.5, 1.0),) and not item.row.pixel_boxes
    assert feed.stats()["rows_skipped"] == {"mislabelled": 1}
    assert feed.skipped[0][0] == rows[1] and "box must be inside" in feed.skipped[0][1]


def test_no_two_items_share_a_seed(tmp_path: Path) -> None:
    for number in range(5):
        write_clip(tmp_path / f"{number}.mp4", number)
    manifest = make_manifest(tmp_path, rows_of([2] * 5))
    feed = RolloutDataFeed(manifest, frames=1, remainder="pad", batch_size=4, shuffle_seed=3)
    seeds = [item.seed for _ in range(3) for batch in feed for item in batch]
    assert len(set(seeds)) == len(seeds) == 36
    again = RolloutDataFeed(manifest, frames=1, remainder="pad", batch_size=4, shuffle_seed=3)
    assert [item.seed for batch in again for item in batch] == seeds[:12]


def test_malformed_rows_are_skipped_only_where_asked(tmp_path: Path) -> None:
    write_clip(tmp_path / "0.mp4", 0)
    manifest = make_manifest(tmp_path, rows_of([1]))
    with (tmp_path / "set-video.jsonl").open("a") as file:
        file.write('{"video": "0.mp4"}\nnonsense\n')
    with pytest.raises(BadRows, match=r"line 2: row: question must be a text.*and 1 more"):
        RolloutDataFeed(manifest, frames=1)
    feed = RolloutDataFeed(manifest, frames=1, on_bad="skip")
    assert len(list(feed)) == 1 and feed.stats()["rows_skipped"] == {"malformed": 2}
