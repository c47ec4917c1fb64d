"""The index cache: what a second process knows of a video, and where it lies."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_cache_tools import fields, forget, learned, make_unreadable, opened, own_cache

from vtts_rt.video import container, index_cache, open_video
from vtts_rt.video.container import PIECE_BYTES, Media
from vtts_rt.video.index_cache import FILE_NAME, IndexCache, known_facts, remember_facts

Make = Callable[..., Path]
Code = Callable[[np.ndarray], int]

KINDS: dict[str, dict[str, Any]] = {
    "c.mp4": {"gop": 12, "b_frames": 3},
    "c.mkv": {"gop": 12, "b_frames": 3},
    "c.ts": {"gop": 8, "b_frames": 3, "encoder_options": {"x264-params": "open-gop=1"}},
    "c.h264": {"gop": 12, "b_frames": 3},
    "c.avi": {"gop": 12, "b_frames": 3},
    "c.mov": {"rotation_degrees": 90},
    "c.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "c.webm": {"codec": "libvpx", "gop": 30},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_remembered_is_what_was_learned(
    name: str, make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(name, 40, **KINDS[name])
    fresh, cold = learned(path), opened(path)
    forget()
    warm = opened(path)
    assert warm == cold
    forget()
    known = known_facts(Media(path), None)
    assert known is not None and fields(known) == fields(fresh)
    make_unreadable(monkeypatch)
    with open_video(path) as source:
        assert source.metadata == cold[0]


def test_bytes_are_known_by_their_content(make_clip: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_clip("c.mp4", 40)
    with open_video(path) as source:
        metadata = source.metadata
    data = path.read_bytes()
    make_unreadable(monkeypatch)
    with open_video(data) as source:
        assert source.metadata == metadata


def test_the_rate_of_a_stream_without_times_is_part_of_the_name(make_clip: Make) -> None:
    path = make_clip("c.h264", 40, gop=12)
    for fps in (5.0, 8.0, 5.0):
        with open_video(path, source_fps=fps) as source:
            assert source.metadata.source_fps == fps


@pytest.mark.parametrize("what", ["index", "pyav", "ffmpeg"])
def test_other_versions_know_nothing(
    what: str, make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip("c.mp4", 40)
    opened(path)
    assert known_facts(Media(path), None) is not None
    if what == "index":
        monkeypatch.setattr(index_cache, "INDEX_VERSION", index_cache.INDEX_VERSION + 1)
    elif what == "pyav":
        monkeypatch.setattr(index_cache.av, "__version__", "0.0")
    else:
        versions = {**index_cache.av.library_versions, "libavformat": (1, 2, 3)}
        monkeypatch.setattr(index_cache.av, "library_versions", versions)
    assert known_facts(Media(path), None) is None


def test_a_changed_file_is_another_file(make_clip: Make, tmp_path: Path, code_of: Code) -> None:
    path = tmp_path / "c.mp4"
    path.write_bytes(make_clip("c.mp4", 40).read_bytes())
    first = opened(path)
    times = path.stat()
    other = tmp_path / "other.mp4"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    for rewrite in (
        lambda: path.write_bytes(data),
        lambda: other.write_bytes(data) and other.replace(path),
    ):
        rewrite()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the change time remains
        forget()
        assert known_facts(Media(path), None) is None or opened(path)[0] != first[0]
        assert opened(path)[0].video_id != first[0].video_id
    path.write_bytes(make_clip("c.mp4", 40).read_bytes())
    assert opened(path) == first


def test_a_file_that_was_just_written_is_not_remembered(
    make_clip: Make, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "SETTLE_SECONDS", 3600.0)
    path = tmp_path / "c.mp4"
    path.write_bytes(make_clip("c.mp4", 40).read_bytes())
    opened(path)
    assert known_facts(Media(path), None) is None and not container._hashes
    monkeypatch.setattr(container, "SETTLE_SECONDS", 0.0)
    assert known_facts(Media(path), None) is None


# -- where it lies --------------------------------------------------------------------------------


def test_off_and_default_folders(
    make_clip: Make, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip("c.mp4", 40)
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    opened(path)
    assert not folder.exists() and not Path("off").exists()
    monkeypatch.delenv("VTTS_RT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    opened(path)
    assert (tmp_path / "xdg" / "vtts_rt" / FILE_NAME).is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    opened(path)
    assert (tmp_path / "home" / ".cache" / "vtts_rt" / FILE_NAME).is_file()


def break_cache(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Spoils the cache; returns what must live as long as it is spoilt."""
    file = folder / FILE_NAME
    if how == "folder is a file":
        folder.write_text("")
        return None
    if how == "unwritable":
        monkeypatch.setenv("VTTS_RT_CACHE_DIR", "/proc/none")  # not even by root
        return None
    folder.mkdir(exist_ok=True)
    if how == "file is a folder":
        file.mkdir()
    elif how == "garbage":
        file.write_bytes(random.Random(0).randbytes(20_000))
    elif how == "text":
        file.write_text("hello")
    elif how == "foreign":
        with sqlite3.connect(file) as db:
            db.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB, used INTEGER)")
        db.close()
    elif how == "locked":
        monkeypatch.setattr(index_cache, "LOCK_SECONDS", 0.05)
        assert IndexCache(folder).get("nothing") is None
        db = sqlite3.connect(file, isolation_level=None)
        db.execute("BEGIN EXCLUSIVE")
        return db
    elif how == "disk full":
        with sqlite3.connect(file, isolation_level=None) as db:
            db.execute("PRAGMA page_size = 512")  # too small for what is to be put
            db.execute(index_cache.TABLE)
        db.close()
        connect = index_cache._connect

        def full(path: Path) -> Any:
            db = connect(path)
            db.execute("PRAGMA max_page_count = 1")  # or as many as there are
            return db

        monkeypatch.setattr(index_cache, "_connect", full)
    elif how == "no sqlite":
        monkeypatch.setitem(sys.modules, "sqlite3", None)
    return None


@pytest.mark.parametrize(
    "how",
    [
        "folder is a file",
        "unwritable",
        "file is a folder",
        "garbage",
        "text",
        "foreign",
        "locked",
        "disk full",
        "no sqlite",
    ],
)
def test_a_cache_that_cannot_be_used_is_logged_once(
    how: str,
    make_clip: Make,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_clip("c.mp4", 40, gop=12)
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    want = opened(path)
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", str(folder))
    held = break_cache(how, folder, monkeypatch)
    before = (folder / FILE_NAME).read_bytes() if how in ("garbage", "foreign") else None
    with caplog.at_level(logging.WARNING):
        assert [opened(path), opened(path)] == [want, want]
    messages = [r.getMessage() for r in caplog.records if "index cache" in r.getMessage()]
    assert len(messages) == 1 and FILE_NAME in messages[0], messages
    assert before is None or (folder / FILE_NAME).read_bytes() == before
    if held is not None:
        held.close()


def test_the_oldest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(index_cache.time, "time", lambda: next(clock))
    limit = 400_000
    cache = IndexCache(folder, limit)
    values = {str(i): random.Random(i).randbytes(3000 + 97 * (i % 50)) for i in range(300)}
    for name, value in values.items():
        cache.put({name: value})
        assert (folder / FILE_NAME).stat().st_size <= limit + 20_000
    left = [name for name in values if cache.get(name) is not None]
    assert 50 < len(left) < 150
    assert left == [*map(str, range(300 - len(left), 300))]
    assert all(cache.get(name) == values[name] for name in left)
    cache.put({"large": bytes(limit)})
    assert cache.get("large") is None and cache.get("299") == values["299"]


# -- the content's hash ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES - 5])
def test_the_hash_of_a_content(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    pieces = [data[i : i + PIECE_BYTES] for i in range(0, size, PIECE_BYTES)]
    whole = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    want = hashlib.sha256(whole).hexdigest()[:32]
    assert Media(tmp_path / "f").content_id() == Media(data).content_id() == want
    flipped = bytearray(data)
    flipped[size // 2] ^= 1
    assert Media(bytes(flipped)).content_id() != want


def test_remembering_what_a_process_knows_needs_no_second_hash(
    make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    path = make_clip("c.mp4", 40)
    first = learned(path)
    remember_facts(Media(path), None, first)
    monkeypatch.setattr(container, "content_hash", None)
    assert learned(path).content_id == first.content_id
