"""The rollout feed over files that are missing, broken or replaced."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feed_tools import NUM_CLIPS, check_frames, colour_of, make_manifest, rows_of
from torch.utils.data import DataLoader

from vtts_rt import RolloutDataFeed
from vtts_rt.data import frames as frames_module
from vtts_rt.data.frames import SKIP_REASONS
from vtts_rt.data.rows import BadRows
from vtts_rt.video import open_video
from vtts_rt.video.source import FrameSource


def _audio_only(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _corrupt_packets(path: Path) -> None:
    """The container stays whole, what it holds is noise."""
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = np.random.default_rng(1).integers(0, 256, len(data) - start, np.uint8).tobytes()
    path.write_bytes(bytes(data))


BREAK = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "text": lambda path: path.write_text("this is no video\n" * 50),
    "missing": lambda path: path.unlink(),
    "audio only": _audio_only,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "corrupt packets": _corrupt_packets,
}


def test_one_file_in_a_hundred_broken(
    clips_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """700 files, 7 broken in as many ways: all others come, each with its own frames."""
    num_files = 700
    for number in range(num_files):
        shutil.copy(clips_folder / f"{number % NUM_CLIPS}.mp4", tmp_path / f"{number}.mp4")
    broken = {50 + 100 * k: how for k, how in enumerate(BREAK)}
    for number, how in broken.items():
        BREAK[how](tmp_path / f"{number}.mp4")
    manifest = make_manifest(tmp_path, rows_of([1 + n % 2 for n in range(num_files)]))
    feed = RolloutDataFeed(manifest, frames=2, shuffle_seed=0, batch_size=4, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        items = [item for batch in feed for item in batch]
    for item in items:
        number = int(item.media.stem)
        assert number not in broken
        assert np.abs(item.frames[0].astype(int) - colour_of(number % NUM_CLIPS)).max() <= 8
    rows = rows_of([1 + n % 2 for n in range(num_files)])
    lost = [row for row in rows if int(Path(row.media).stem) in broken]
    assert len(items) == len(rows) - len(lost)
    assert sorted(r.question for r, _ in feed.skipped) == sorted(r.question for r in lost)
    assert all(row.media in why for row, why in feed.skipped)  # the sentence names the file
    skipped = feed.stats()["rows_skipped"]
    assert sum(skipped.values()) == len(lost) and set(skipped) <= set(SKIP_REASONS)
    assert skipped["missing"] == 1 + 350 % 2 and skipped["unreadable"] > 0
    logged = [r.getMessage() for r in caplog.records if r.name == "vtts_rt.data.feed"]
    assert sum("skipped with its rows" in line for line in logged) == len(broken)
    assert sum(line.startswith("epoch 0: rows skipped: ") for line in logged) == 1
    caplog.clear()
    list(feed)  # the next epoch tries again, and says nothing new of a file
    assert not [r for r in caplog.records if "skipped with its rows" in r.getMessage()]
    assert sum(feed.stats()["rows_skipped"].values()) == 2 * len(lost) == 2 * len(feed.skipped)


def test_a_file_replaced_while_it_is_read_is_skipped(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(media: Any, **options: Any) -> FrameSource:
        source = open_video(media, **options)
        if getattr(media, "stem", None) == "1":
            shutil.copy(media.with_stem("2"), media.with_stem("new"))
            media.with_stem("new").rename(media)
        return source

    monkeypatch.setattr(frames_module, "open_video", opened)
    feed = RolloutDataFeed(manifest, frames=2, on_bad="skip")
    items = list(feed)
    assert [int(item.media.stem) for item in items] == [0, 0, 2, 2, 3, 3, 4, 4]
    for item in items:
        check_frames(item)
    assert feed.stats()["rows_skipped"] == {"changed": 2}
    assert all("while it was open" in why for _, why in feed.skipped)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    feed = RolloutDataFeed(make_manifest(tmp_path, rows_of([1, 1])), on_bad="skip")
    message = "^RolloutDataFeed: none of 2 rows can be read: check the paths of the manifest"
    with pytest.raises(RuntimeError, match=message):
        list(feed)
    assert feed.stats()["rows_skipped"] == {"missing": 2}


def test_missing_files_refuse_the_manifest(manifest: Path) -> None:
    for number in (1, 3):
        manifest.with_name(f"{number}.mp4").unlink()
    with pytest.raises(BadRows) as caught:
        RolloutDataFeed(manifest)
    rows = manifest.with_name("set-video.jsonl")
    assert [(bad.path, bad.place) for bad in caught.value.bad] == [
        (rows, f"line {line}") for line in (3, 4, 7, 8)
    ]
    told = f"{rows}, line 3: row: media must be a file, got '{manifest.with_name('1.mp4')}'"
    assert str(caught.value) == f"{told} (and 3 more)"


@pytest.mark.parametrize("how", ["missing", "text", "corrupt packets"])
def test_a_file_that_cannot_be_read_ends_the_iteration_there(manifest: Path, how: str) -> None:
    """Once it is mended the feed goes on with its rows."""
    feed = RolloutDataFeed(manifest, frames=2)
    path = manifest.with_name("2.mp4")
    whole = path.read_bytes()
    BREAK[how](path)
    items: list[Any] = []
    for _ in range(2):
        with pytest.raises(BadRows) as caught:
            for item in feed:
                items.append(item)
        assert [bad.place for bad in caught.value.bad] == ["line 5", "line 6"]
        assert "2.mp4" in str(caught.value) and "row: media is " in str(caught.value)
    assert [item.row_number for item in items] == [0, 1, 2, 3]
    assert feed.stats()["rows_skipped"] == {} and feed.skipped == []
    path.write_bytes(whole)
    assert [item.row_number for item in feed] == [4, 5, 6, 7, 8, 9]


def test_a_worker_process_says_which_rows_are_bad(manifest: Path) -> None:
    feed = RolloutDataFeed(manifest, frames=2)
    manifest.with_name("1.mp4").write_text("this is no video")
    loader = DataLoader(feed, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="set-video.jsonl, line 3: row: media is unreadable"):
        list(loader)
