"""The index cache: what a second process knows of a video, and everything that may go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtts_rt.types import VideoMetadata
from vtts_rt.video import container, index_cache, open_video
from vtts_rt.video.container import Media
from vtts_rt.video.content_hash import PIECE_BYTES, hash_bytes, hash_file
from vtts_rt.video.facts import VideoFacts, learn_facts
from vtts_rt.video.facts_bytes import facts_from_bytes, facts_to_bytes
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
    "c.webm": {
        "codec": "libvpx",
        "gop": 30,
        "encoder_options": {
            "auto-alt-ref": "1",
            "lag-in-frames": "16",
            "deadline": "good",
            "cpu-used": "4",
        },
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and files that count as settled at once."""
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(container, "SETTLE_SECONDS", 0.0)
    forget()
    return tmp_path / "cache"


def forget() -> None:
    """As in a new process."""
    container._hash_memo = container._Memo(container.HASH_MEMO_ENTRIES)
    index_cache._cache_in.cache_clear()


def learned(video: Path | bytes, source_fps: float | None = None) -> VideoFacts:
    media = Media(video)
    with media.open() as opened:
        return learn_facts(media, opened, source_fps)


def fields(facts: VideoFacts) -> dict[str, Any]:
    """By value, arrays with their dtypes."""
    whole = dataclasses.asdict(facts)
    for name, value in whole.pop("index").items():
        is_array = isinstance(value, np.ndarray)
        whole[name] = (value.tobytes(), value.dtype, value.shape) if is_array else value
    return whole


def opened(video: Path) -> tuple[VideoMetadata, bytes]:
    with open_video(video) as source:
        return source.metadata, dict(source.read([7]))[7].tobytes()


def make_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(*arguments: Any) -> Any:
        raise AssertionError("the content is read")

    monkeypatch.setattr(Media, "open", reads)
    monkeypatch.setattr(container, "hash_file", reads)


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
    assert known_facts(Media(path), None) is None and not container._hash_memo._values
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
    folder.mkdir(exist_ok=True)
    if how == "file is a folder":
        file.mkdir()
    elif how == "garbage":
        file.write_bytes(random.Random(0).randbytes(20_000))
    elif how == "text":
        file.write_text("hello")
    elif how == "foreign":
        with sqlite3.connect(file) as db:
            db.execute("CREATE TABLE entries (name TEXT PRIMARY KEY, value BLOB, used INTEGER)")
        db.close()
    elif how == "no table":
        with sqlite3.connect(file) as db:
            db.execute(f"PRAGMA application_id = {index_cache.APPLICATION_ID}")
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
            index_cache._create(db)
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
        "file is a folder",
        "garbage",
        "text",
        "foreign",
        "no table",
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


def test_the_least_recently_used_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(index_cache.time, "time", lambda: next(clock))
    monkeypatch.setattr(index_cache, "USED_SECONDS", 1)
    limit = 400_000
    cache = IndexCache(folder, limit)
    values = {str(i): random.Random(i).randbytes(3000 + 97 * (i % 50)) for i in range(300)}
    for name, value in values.items():
        cache.put({name: value})
        assert cache.get("0") == values["0"]  # in use all the time
        assert (folder / FILE_NAME).stat().st_size <= limit + 20_000
    left = [name for name in values if cache.get(name) is not None]
    assert 50 < len(left) < 150
    assert left == ["0", *map(str, range(300 - len(left) + 1, 300))]
    assert all(cache.get(name) == values[name] for name in left)
    cache.put({"large": bytes(limit)})
    assert cache.get("large") is None and cache.get("0") == values["0"]


# -- damage ---------------------------------------------------------------------------------------


def test_a_mutated_database_never_gives_wrong_facts(
    make_clip: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [make_clip("c.mp4", 40, **KINDS["c.mp4"]), make_clip("c.mkv", 30, gop=6)]
    want = [fields(learned(path)) for path in paths]
    for path in paths:
        opened(path)
    file = folder / FILE_NAME
    whole = file.read_bytes()
    rng = random.Random(1)
    outcomes = {"known": 0, "unknown": 0}
    caplog.set_level(logging.CRITICAL)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        elif rng.random() < 0.2:  # values change places
            at, to = rng.randrange(len(data) - 64), rng.randrange(len(data) - 64)
            data[at : at + 64], data[to : to + 64] = data[to : to + 64], data[at : at + 64]
        for extra in folder.iterdir():
            extra.unlink()
        file.write_bytes(data)
        forget()
        for path, right in zip(paths, want, strict=True):
            known = known_facts(Media(path), None)
            assert known is None or fields(known) == right
            outcomes["unknown" if known is None else "known"] += 1
    assert min(outcomes.values()) > 50, outcomes
    assert opened(paths[0])[0].num_frames == 40


def test_a_name_swap_is_seen(make_clip: Make, folder: Path) -> None:
    paths = [make_clip("c.mp4", 40), make_clip("c.mkv", 30, gop=6)]
    for path in paths:
        opened(path)
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
    names = [r[0] for r in db.execute("SELECT name FROM entries ORDER BY name")]
    assert len(names) == 4
    for kind in ("facts", "file"):
        a, b = (n for n in names if n.startswith(kind))
        db.execute("UPDATE entries SET name = 'x' WHERE name = ?", (a,))
        db.execute("UPDATE entries SET name = ? WHERE name = ?", (a, b))
        db.execute("UPDATE entries SET name = ? WHERE name = 'x'", (b,))
    db.close()
    for path in paths:
        forget()
        assert known_facts(Media(path), None) is None
        assert opened(path)[0].num_frames == (40 if path == paths[0] else 30)
        forget()
        assert known_facts(Media(path), None) is not None  # built anew


def test_bytes_that_contradict_themselves_are_no_facts(make_clip: Make) -> None:
    facts = learned(make_clip("c.webm", 40, **KINDS["c.webm"]))  # with hidden frames
    index = facts.index
    assert index.num_packets > index.num_frames

    def again(**changes: Any) -> VideoFacts | None:
        of_index = {f.name for f in dataclasses.fields(index)}
        inner = {k: v for k, v in changes.items() if k in of_index}
        outer = {k: v for k, v in changes.items() if k not in of_index}
        changed = dataclasses.replace(facts, index=dataclasses.replace(index, **inner), **outer)
        return facts_from_bytes(facts.content_id, facts_to_bytes(changed))

    def edited(array: Any, at: int, value: float) -> np.ndarray:
        copy = np.array(array)
        copy[at] = value
        return copy

    assert again() is not None and fields(again()) == fields(facts)
    times = index.times_seconds
    for changes in (
        {"order": edited(index.order, 3, index.order[4])},
        {"order": edited(index.order, 3, -1)},
        {"order": edited(index.order, 3, index.num_packets)},
        {"frame_of": np.full(index.num_packets, -1)},
        {"keys": edited(index.keys, 0, index.keys[1])},
        {"keyframes": [1]},
        {"keyframes": [0, 5, 5]},
        {"keyframes": [0, index.num_packets]},
        {"times_seconds": edited(times, 0, 1.0)},
        {"times_seconds": edited(times, 5, np.nan)},
        {"times_seconds": edited(times, 5, np.inf)},
        {"times_seconds": edited(times, 5, 0.0)},
        {"source_fps": 0.0},
        {"source_fps": float("nan")},
        {"duration_seconds": -1.0},
        {"duration_seconds": "3"},
        {"key_name": "time_base"},
        {"stored_hw": (0, 64)},
        {"stored_hw": (48, 64, 3)},
        {"stored_hw": (48.0, 64)},
        {"matrix": (1, 0, 0)},
        {"codec": 7},
    ):
        assert again(**changes) is None, changes
    data = facts_to_bytes(facts)
    rng = random.Random(2)
    for _ in range(500):
        mutated = bytearray(data)
        mutated[rng.randrange(len(data))] = rng.randrange(256)
        del mutated[rng.choice([len(data), len(data), rng.randrange(len(data))]) :]
        found = facts_from_bytes(facts.content_id, bytes(mutated))
        if found is not None:  # without the checksum a number may differ, but it holds together
            n = found.index
            assert sorted(n.order) == list(range(n.num_packets))
            np.testing.assert_array_equal(n.frame_of[n.packet_of], np.arange(n.num_frames))
            assert (np.diff(n.times_seconds) >= 0).all()


# -- many processes -------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from vtts_rt.video import container, index_cache, open_video
container.SETTLE_SECONDS = 0.0
for number in range(int(sys.argv[1])):
    for path in sys.argv[2:]:
        container._hash_memo = container._Memo(8)
        with open_video(path) as source:
            print(path, source.metadata.video_id, source.metadata.num_frames, flush=True)
assert index_cache._cache().get("x") is None and index_cache._cache()._usable
"""
DYING = """
import sys, time
from pathlib import Path
from vtts_rt.video import index_cache
class Stuck(index_cache.IndexCache):
    def _evict(self, db):
        print("writing", flush=True)
        time.sleep(600)
Stuck(Path(sys.argv[1])).put({str(i): bytes(100_000) for i in range(20)})
"""


def run(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_it_and_one_is_killed_while_it_writes(
    make_clip: Make, folder: Path
) -> None:
    paths = [make_clip("c.mp4", 10 + i, gop=12) for i in range(6)]
    dying = run(DYING, folder)
    assert dying.stdout is not None and dying.stdout.readline() == "writing\n"
    workers = [run(WORKER, 5, *paths[i:], *paths[:i]) for i in range(4)]
    dying.send_signal(signal.SIGKILL)
    dying.communicate()
    said = set()
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0 and err == "", err
        said.update(out.split("\n"))
    assert len(said - {""}) == len(paths)  # every process says the same of a file
    db = sqlite3.connect(folder / FILE_NAME)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("SELECT count(*) FROM entries").fetchone() == (2 * len(paths),)
    db.close()
    for i, path in enumerate(paths):
        known = known_facts(Media(path), None)
        assert known is not None and known.index.num_frames == 10 + i


def test_a_forked_process_uses_it_too(make_clip: Make) -> None:
    path = make_clip("c.mp4", 40)
    opened(path)
    child = os.fork()
    if child == 0:
        os._exit(0 if known_facts(Media(path), None) is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert known_facts(Media(path), None) is not None


# -- the content's hash ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES - 5])
def test_the_hash_of_a_content(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "f").write_bytes(data)
    pieces = [data[i : i + PIECE_BYTES] for i in range(0, size, PIECE_BYTES)]
    whole = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    want = hashlib.sha256(whole).hexdigest()[:32]
    assert hash_bytes(data) == hash_file(tmp_path / "f", size) == want
    assert Media(tmp_path / "f").content_id() == Media(data).content_id() == want
    flipped = bytearray(data)
    flipped[size // 2] ^= 1
    assert hash_bytes(bytes(flipped)) != want


def test_remembering_what_a_process_knows_needs_no_second_hash(
    make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    path = make_clip("c.mp4", 40)
    first = learned(path)
    remember_facts(Media(path), None, first)
    monkeypatch.setattr(container, "hash_file", None)
    assert learned(path).content_id == first.content_id
