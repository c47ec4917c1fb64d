"""The index cache, damaged, swapped, written by many and killed while it writes."""

from __future__ import annotations

import dataclasses
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
from index_cache_tools import fields, forget, learned, opened, own_cache
from video.zoo import encoded, hide_vp8, remux

from vtts_rt.video.container import Media
from vtts_rt.video.facts import VideoFacts
from vtts_rt.video.index_cache import FILE_NAME, known_facts

Make = Callable[..., Path]
Code = Callable[[np.ndarray], int]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path / "cache", monkeypatch)


# -- damage ---------------------------------------------------------------------------------------


def test_a_mutated_database_never_gives_wrong_facts(
    make_clip: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [make_clip("c.mp4", 40, gop=12, b_frames=3), make_clip("c.mkv", 30, gop=6)]
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


def test_facts_with_hidden_packets_come_back(tmp_path: Path) -> None:
    clip = encoded(count=40, codec="libvpx")
    remux(clip, tmp_path / "c.webm", lambda packets: hide_vp8(packets, 3, 20))
    facts = learned(tmp_path / "c.webm")
    assert facts.index.num_packets > facts.index.num_frames
    for keys in (facts.index.keys, None):
        told = dataclasses.replace(facts, index=dataclasses.replace(facts.index, keys=keys))
        again = VideoFacts.from_bytes(facts.content_id, told.to_bytes())
        assert fields(again) == fields(told)


# -- many processes -------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from vtts_rt.video import container, index_cache, open_video
container.SETTLE_SECONDS = 0.0
for number in range(int(sys.argv[1])):
    for path in sys.argv[2:]:
        container._hashes.clear()
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
