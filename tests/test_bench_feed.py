"""bench/bench_feed.py at a size for tests: it runs, counts, and says who took no part."""

from __future__ import annotations

import json
from pathlib import Path

import bench_feed
import pytest

from vtts_rt.bench import script

FLAGS = "--clips 10 --seconds 1 --height 48 --width 64 --frames 4 --group-size 2 --sample-ms 2"


@pytest.mark.slow
@pytest.mark.parametrize("work", [[], ["--compute"]])
def test_every_contender_gives_every_sample(
    work: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "feed.json"
    places = ["--cache-dir", str(tmp_path), "--output-json", str(out)]
    assert script(bench_feed, [*FLAGS.split(), "--repeats", "1", *work, *places]) == 0
    result = json.loads(out.read_text())
    rows = result["results"]
    assert [row["name"] for row in rows][0] == "RolloutDataFeed"
    assert len(rows) == 3 or "decord" in result["absent"]
    assert result["busy"] == rows[0]["busy"]
    assert all(0 < row["least_busy"] <= row["busy"] <= 1 for row in rows)
    assert all(row["samples_per_second"] > 0 for row in rows)
    assert "RolloutDataFeed" in capsys.readouterr().out
    clips = list(tmp_path.glob("feed-*/*.mp4"))
    assert len({path.read_bytes() for path in clips}) == len(clips) == 10


def test_a_bad_flag_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bench: clips must be >= 1, got 0"):
        script(bench_feed, ["--clips", "0", "--cache-dir", str(tmp_path)])
