"""Manifests for tests of the rollout feed, with files and without."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtts_rt.data import feed as feed_module
from vtts_rt.data import frames as frames_module
from vtts_rt.data import rows as rows_module
from vtts_rt.data.rows import DataSet, Row, read_manifest, write_manifest, write_rows
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.writer import write_video

SIDE = 36
NUM_CLIPS = 5  # of tests/data/conftest.py


def make_manifest(folder: Path, rows: Sequence[Row], name: str = "set") -> Path:
    """A manifest of one data set per media type; media lie in `folder`."""
    sets = []
    for kind in ("video", "image"):
        if some := [row for row in rows if row.media_type == kind]:
            write_rows(folder / f"{name}-{kind}.jsonl", some)
            sets.append(DataSet(f"{name}-{kind}", kind, "mc", Path(), Path(f"{name}-{kind}.jsonl")))
    path = folder / f"{name}.json"
    write_manifest(path, sets)
    return path


def rows_of(counts: Sequence[int]) -> list[Row]:
    """`counts[v]` questions about the file `v.mp4`; their options name video and question."""
    return [
        Row(f"{video}.mp4", f"question {k} of {video}?")
        for video, count in enumerate(counts)
        for k in range(count)
    ]


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour that tells file `number` from its neighbours after lossy coding, too."""
    return (37 * number + 20) % 236 + 10, (101 * number) % 236 + 10, (59 * number + 90) % 236 + 10


def write_clip(path: Path, number: int, num_frames: int = 6) -> None:
    """A clip of one colour, that of its number."""
    frame = np.full((SIDE, SIDE, 3), colour_of(number), np.uint8)
    write_video(path, [frame] * num_frames, source_fps=4.0, gop=3, crf=4)


def check_frames(item: Any) -> None:
    """The frames are those of the item's own file."""
    assert len(item.frames) == len(item.frame_indices) == len(item.timestamps_seconds) > 0
    for frame in item.frames:
        assert frame.dtype == np.uint8 and frame.ndim == 3 and not frame.flags.writeable
        difference = np.abs(frame.astype(int) - colour_of(int(item.media.stem)))
        assert difference.max() <= 8, item.media


def data_sets(counts: list[int]) -> list[DataSet]:
    """The rows as data sets; their files are read when the feed is made."""
    folder = Path(tempfile.mkdtemp())
    return read_manifest(make_manifest(folder, rows_of(counts)))


class FakeVideos:
    """Stands in for `open_video`: `17.mp4` is four frames whose pixels are 17.

    opened: how often, by number. broken: numbers that cannot be opened. seconds: of each opening.
    running, most_running: openings at work at once.
    """

    def __init__(self, broken: Sequence[int] = (), seconds: float = 0.0) -> None:
        self.opened: Counter[int] = Counter()
        self.broken = set(broken)
        self.seconds = seconds
        self.running = self.most_running = 0
        self.before_open: Callable[[int], None] | None = None
        self._lock = threading.Lock()

    def __call__(self, media: Any, **_: Any) -> ArraySource:
        if isinstance(media, bytes):
            return ArraySource(np.zeros((1, 1, 3), np.uint8))
        number = int(Path(media).stem)
        with self._lock:
            self.opened[number] += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if self.before_open is not None:
                self.before_open(number)
            if self.seconds:
                time.sleep(self.seconds)
            if number in self.broken:
                raise ValueError(f"{number} is broken")
            pixels = np.full((4, 2, 2, 3), number % 256, np.uint8)
            return ArraySource(pixels, source_fps=1.0)
        finally:
            with self._lock:
                self.running -= 1


def use(patch: pytest.MonkeyPatch, videos: FakeVideos) -> FakeVideos:
    patch.setattr(frames_module, "open_video", videos)
    patch.setattr(feed_module, "open_video", videos)
    # Without a file there is nothing to tell whether it is there, and was replaced.
    patch.setattr(rows_module, "is_file", lambda media: True)
    patch.setattr(frames_module, "_identity", lambda media: 1)
    return videos
