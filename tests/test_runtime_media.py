"""What a runtime hands on to the opening of videos: times of arrays, limits, timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feed_tools import make_manifest, rows_of, write_clip
from utils import request

from vtts_rt import EngineConfig, MediaLimits, RolloutDataFeed, Runtime, RuntimeConfig
from vtts_rt.data.rows import BadRows
from vtts_rt.rounds.results import Answer

SIZE = (96, 128)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


def ask(runtime: Runtime, clip: Any, strategy: str, **more: Any) -> Answer:
    return runtime.ask(**request(clip, strategy, **more))


def test_a_timeout_counts_from_the_call(runtime: Runtime, clip: Path) -> None:
    sentence = r"^Runtime: timeout_seconds \(1e-09\) passed before the video was open"
    with pytest.raises(TimeoutError, match=sentence):
        ask(runtime, clip, "append", timeout_seconds=1e-9)
    with pytest.raises(TimeoutError, match=sentence):
        asyncio.run(runtime.ask_async(clip, "which?", timeout_seconds=1e-9))
    with pytest.raises(TimeoutError, match=sentence):
        runtime.plan(clip, "which?", timeout_seconds=1e-9)
    assert len(ask(runtime, clip, "append").rounds) == 3


def test_arrays_with_times(runtime: Runtime) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, *SIZE, 3), dtype=np.uint8)
    times = np.cumsum([0.0, *np.linspace(0.3, 0.9, 11)])
    answer = ask(runtime, frames, "append", timestamps_seconds=times)
    assert answer.videos[0].duration_seconds == pytest.approx(times[-1] * 12 / 11)
    plan = runtime.plan([frames, frames[0]], "which?", timestamps_seconds=[times, None])
    alone = runtime.plan(frames, "which?", timestamps_seconds=times)
    assert plan["rounds"][0]["frames"] == alone["rounds"][0]["frames"] + 1 > 2  # the image
    with pytest.raises(ValueError, match="timestamps_seconds must be a list of 2, one entry"):
        runtime.plan([frames, frames], "which?", timestamps_seconds=[times])


def test_media_limits_of_a_runtime_and_of_a_question(checkpoint: Path, clip: Path) -> None:
    config = RuntimeConfig(media_limits=MediaLimits(max_frames=79))
    engine = EngineConfig(kv_bytes=1 << 26)
    with Runtime.from_pretrained(checkpoint, engine=engine, config=config) as runtime:
        with pytest.raises(ValueError, match="MediaLimits.max_frames"):
            ask(runtime, clip, "append")
        assert len(ask(runtime, clip, "append", limits=MediaLimits()).rounds) == 3
    with pytest.raises(ValueError, match="^RuntimeConfig: media_limits must be"):
        RuntimeConfig(media_limits=3)  # type: ignore[arg-type]


def test_media_limits_of_a_feed(tmp_path: Path) -> None:
    write_clip(tmp_path / "0.mp4", 0)
    manifest = make_manifest(tmp_path, rows_of([1]))
    feed = RolloutDataFeed(manifest, frames=2, limits=MediaLimits(max_bytes=100))
    with pytest.raises(BadRows, match=r"line 1: row: media is unreadable: .*MediaLimits.max_bytes"):
        list(feed)
