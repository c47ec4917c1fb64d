"""A program may end in any way with runtimes in use: no abort, no hang, its own exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ways_to_end import LAUNCHER, PREAMBLE, WAYS, Way

from vtts_rt.video.writer import write_video

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
QUICK = {name: way for name, way in WAYS.items() if way.quick}


@pytest.fixture(scope="module")
def arguments(checkpoint: Path, clips: list[Path], tmp_path_factory: pytest.TempPathFactory):
    """What the programs are called with."""
    vp9 = tmp_path_factory.mktemp("vp9") / "clip.webm"
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    write_video(vp9, frames, source_fps=8.0, codec="libvpx-vp9")
    return [str(checkpoint), str(clips[0]), str(vp9)]


@pytest.fixture(scope="module")
def ended(arguments: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Way -> (status, stdout, stderr) of the quick ones."""
    folder = tmp_path_factory.mktemp("ended")
    bodies = {name: PREAMBLE + way.body for name, way in QUICK.items()}
    (folder / "ways.json").write_text(json.dumps(bodies))
    command = [sys.executable, "-c", LAUNCHER, *arguments, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1500)
    statuses = dict(json.loads(line) for line in done.stdout.splitlines())
    return {
        name: (statuses[name], *((folder / f"{n}.{s}").read_text() for s in ("out", "err")))
        for n, name in enumerate(QUICK)
    }


@pytest.mark.parametrize("name", QUICK)
def test_quick_ways_to_end(ended: dict[str, tuple[int, str, str]], name: str) -> None:
    check(QUICK[name], *ended[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_all_ways_to_end(arguments: list[str], name: str) -> None:
    if "DALI" in name and find_spec("nvidia.dali") is None:
        pytest.skip("needs DALI")
    command = [sys.executable, "-c", PREAMBLE + WAYS[name].body, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    check(WAYS[name], done.returncode, done.stdout, done.stderr)


def check(way: Way, status: int | None, out: str, err: str) -> None:
    lines = err.splitlines()
    assert (status, out.strip()) == (way.status, way.out), err
    assert [line.startswith("Traceback") for line in lines].count(True) == bool(way.err), err
    assert (lines[-1] if lines else "") == way.err, err
