"""Two videos never share a key: what was decoded of one is never shown for another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils import tiny_checkpoint

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.rounds.results import Answer
from vtts_rt.video import open_video
from vtts_rt.video.writer import write_video

LOOK = PerceptionConfig(
    strategy="append", max_rounds=1, sample_fps=1.0, min_pixels=3136, total_pixels=60_000
)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    with Runtime.from_pretrained(folder, engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


def frames(seed: int = 0, num: int = 40) -> Iterator[np.ndarray]:
    still = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return (np.roll(still, 2 * i, 1) for i in range(num))


def ask(runtime: Runtime, video: Any, **more: Any) -> Answer:
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    return runtime.ask(video, "which?", perception=LOOK, sampling=sampling, **more)


def reused(answer: Answer) -> int:
    (look,) = answer.rounds
    assert look.reuse.pairs_encoded + look.reuse.pairs_reused == len(look.plan.segments) > 0
    return look.reuse.pairs_reused + look.reuse.frames_reused


def test_the_same_content_is_the_same_video(runtime: Runtime, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames(10), source_fps=8.0)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(content)
    assert reused(ask(runtime, tmp_path / "a.mp4")) == 0
    for again in (tmp_path / "a.mp4", tmp_path / "b.mp4", content):
        assert reused(ask(runtime, again)) > 0


def test_a_path_that_is_overwritten(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    for seed in (1, 2, 3):
        write_video(path, frames(seed), source_fps=8.0)
        assert reused(ask(runtime, path)) == 0


def test_equal_size_and_head_and_other_content(runtime: Runtime, tmp_path: Path) -> None:
    """Raw frames, so that one byte far behind the head is one pixel of one frame."""
    path = tmp_path / "v.avi"
    write_video(path, frames(4), source_fps=8.0, codec="rawvideo", pixel_format="bgr24")
    content = bytearray(path.read_bytes())
    assert reused(ask(runtime, path)) == 0
    kept = path.stat()
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert path.stat().st_size == kept.st_size
    assert reused(ask(runtime, path)) == 0


def test_the_same_frames_in_another_codec(runtime: Runtime, tmp_path: Path) -> None:
    ids = set()
    for name, codec, pixels in (
        ("a.mp4", "libx264", "yuv420p"),
        ("b.webm", "libvpx-vp9", "yuv420p"),
        ("c.avi", "mjpeg", "yuvj420p"),
    ):
        write_video(tmp_path / name, frames(5), source_fps=8.0, codec=codec, pixel_format=pixels)
        assert reused(ask(runtime, tmp_path / name)) == 0
        with open_video(tmp_path / name) as source:
            ids.add(source.metadata.video_id)
    assert len(ids) == 3


def test_ranges_and_rates_are_videos_of_their_own(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, frames(6, num=64), source_fps=8.0)
    ranges: list[dict[str, float]] = [
        {},
        {"start_seconds": 2.0},
        {"end_seconds": 5.0},
        {"start_seconds": 2.0, "end_seconds": 5.0},
    ]
    for part in ranges:
        assert reused(ask(runtime, path, **part)) == 0
    array = np.stack(list(frames(7)))
    assert reused(ask(runtime, array, source_fps=8.0)) == 0
    assert reused(ask(runtime, array, source_fps=8.0)) > 0
    other = array.copy()
    other[20, 0, 0, 0] ^= 1
    assert reused(ask(runtime, other, source_fps=8.0)) == 0
