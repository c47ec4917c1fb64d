"""`vtts-rt data`: statistics, checks and conversions, with exit statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from feed_tools import make_manifest, write_clip

from vtts_rt import cli
from vtts_rt.data.rows import Row, read_manifest, write_rows
from vtts_rt.types import Box, TimeSpan

ROWS = [
    Row("0.mp4", "q", options=("a", "b"), answer="B", spans=(TimeSpan(1, 2),), duration_seconds=4),
    Row("0.mp4", "q", options=("a", "b"), answer="A", spans=(TimeSpan(3, 5),), duration_seconds=4),
    Row("gone.mp4", "q", boxes=(Box(0, 0, 0.5, 0.5),)),
    Row("c.png", "q", "image", pixel_boxes=((1.0, 2.0, 3.0, 4.0),)),
]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.main(["data", *map(str, argv)])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.fixture()
def manifest(tmp_path: Path) -> Path:
    write_clip(tmp_path / "0.mp4", 0)
    (tmp_path / "c.png").write_bytes(b"")
    return make_manifest(tmp_path, ROWS)


def test_statistics(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "stats", manifest, "--json")
    told: dict[str, Any] = json.loads(out)
    video, total = told["sets"]["set-video"], told["total"]
    assert status == 0 and told["skipped"] == [] and set(told["sets"]) == {"set-video", "set-image"}
    assert (video["rows"], video["files"], video["files_missing"]) == (3, 2, 1)
    assert video["rows_without_media"] == 1 and total["rows"] == 4
    assert video["answers"] == {"A": 1, "B": 1, "none": 1} and video["options"] == {"0": 1, "2": 2}
    assert video["span_seconds"] == {"min": 1.0, "median": 1.5, "mean": 1.5, "max": 2.0}
    assert video["span_shares"]["max"] == 0.5 and video["spans_past_end"] == 1
    assert video["box_shares"]["max"] == 0.25 and total["boxes_in_pixels"] == 1
    assert total["media_types"] == {"image": 1, "video": 3} and total["tasks"] == {"mc": 4}
    status, out, _ = run(capsys, "stats", manifest)
    assert status == 0 and "set-video" in out and "A:1 B:1" in out


def test_bad_rows_are_lines_and_skipped_when_asked(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (manifest.parent / "set-video.jsonl").open("a") as file:
        file.write('{"video": "\\ud800", "question": "q"}\n7\n')
    status, out, err = run(capsys, "stats", manifest)
    assert (status, out, len(err.splitlines())) == (2, "", 3)
    assert "set-video.jsonl, line 4: " in err and "set-video.jsonl, line 5: " in err
    status, out, _ = run(capsys, "stats", manifest, "--skip-bad", "--json")
    assert status == 0 and len(json.loads(out)["skipped"]) == 2
    status, out, _ = run(capsys, "check", manifest)
    # No media, and no letter, for the third; no letter for the picture; two malformed.
    assert status == 1 and "2 sets, 6 rows, 4 bad" in out
    assert "set-video.jsonl, line 3: row: media must be a file" in out
    status, out, _ = run(capsys, "check", manifest, "--json")
    assert [bad["place"] for bad in json.loads(out)["bad"]] == [
        *("line 3", "line 4", "line 5", "line 1")
    ]


def test_check_of_good_empty_and_lost_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "0.mp4", 0)
    manifest = make_manifest(tmp_path, ROWS[:2])
    assert run(capsys, "check", manifest)[:2] == (0, "1 sets, 2 rows, 0 bad\n")
    whole = (tmp_path / "0.mp4").read_bytes()
    (tmp_path / "0.mp4").write_text("this is no video")
    status, out, _ = run(capsys, "check", manifest)
    line = f"{tmp_path / 'set-video.jsonl'}, line 1: row: media must be a file that can be opened:"
    assert status == 1 and out.startswith(line) and out.endswith("1 sets, 2 rows, 2 bad\n")
    (tmp_path / "0.mp4").write_bytes(whole)
    write_rows(tmp_path / "set-video.jsonl", [])
    assert run(capsys, "check", manifest)[0] == 1
    status, _, err = run(capsys, "stats", manifest)
    assert status == 2 and "manifest must be one with rows" in err
    (tmp_path / "set-video.jsonl").unlink()
    status, out, _ = run(capsys, "check", manifest)
    assert status == 1 and "entry set-video" in out and "No such file" in out


def test_conversion_adds_to_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "charades_sta_test.txt", tmp_path / "charades.jsonl"
    source.write_text("AB 1 2##a man sits\nnonsense\n")
    into = ["--manifest", tmp_path / "m.json", "--media", tmp_path / "videos"]
    status, _, err = run(capsys, "convert", "charades-sta", source, out, *into)
    assert status == 2 and "charades_sta_test.txt, line 2: row: line must be" in err
    assert not out.exists() and not (tmp_path / "m.json").exists()
    for _ in range(2):  # the second time takes the place of the first
        argv = ("convert", "charades-sta", source, out, *into, "--skip-bad")
        status, _, err = run(capsys, *argv, "--media-name", "{id}_480.mp4")
        assert status == 0 and "1 rows, 1 skipped" in err
        (entry,) = read_manifest(tmp_path / "m.json")
    assert (entry.name, entry.task_type) == ("charades", "tg")
    ((media, row),) = entry.rows()
    assert media == tmp_path / "videos" / "AB_480.mp4" and row.spans == (TimeSpan(1, 2),)
    status, _, err = run(capsys, "convert", "charades-sta", source, out, "--media", tmp_path)
    assert status == 2 and "--media must be given with --manifest" in err
    status, _, err = run(capsys, "convert", "charades-sta", source, out, "--media-name", "x")
    assert status == 2 and "media_name must be a name with {id} in it" in err


@pytest.mark.parametrize("command", ["data check", "data stats", "rollout --out j"])
def test_a_missing_manifest_is_bad_input(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        assert cli.main([*command.split(), str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and reason in error


def test_a_broken_manifest_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("AB 1 2##a man sits\n")
    (tmp_path / "m.json").write_text("{")
    argv = ("convert", "charades-sta", tmp_path / "a.txt", tmp_path / "out.jsonl")
    argv += ("--manifest", tmp_path / "m.json", "--media", tmp_path)
    status, _, err = run(capsys, *argv)
    assert status == 2 and "m.json must be valid JSON" in err
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "m.json").read_text() == "{"
