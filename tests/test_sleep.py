"""Pins and sleep: what stays in memory, and what leaves it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from utils import LOOK, request, told

from vtts_rt import (
    Aborted,
    BadRequest,
    EngineConfig,
    PerceptionConfig,
    Runtime,
    RuntimeConfig,
    SamplingParams,
)

APPEND = PerceptionConfig(strategy="append", **LOOK)


@pytest.fixture()
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


# -- pins -----------------------------------------------------------------------------------------


def small(checkpoint: Path, clip: Path) -> tuple[Runtime, dict[str, int]]:
    """A runtime with room for one look and a half, and what a look takes."""
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 22)) as runtime:
        cost = runtime.plan(clip, "which?", perception=APPEND)
        frame_bytes = 96 * 128 * 3 * cost["rounds"][0]["frames"]
        row = runtime.engine.model.feature_dim * 4
        need = {"frames": frame_bytes, "features": row * cost["rounds"][0]["vision_tokens"]}
        engine = EngineConfig(kv_bytes=1 << 26, vision_cache_bytes=need["features"] * 3 // 2)
        config = RuntimeConfig(frame_store_bytes=need["frames"] * 3 // 2, speculative_fetch=False)
        model, tokenizer = runtime.engine.model, runtime.engine.tokenizer
    return Runtime(model, tokenizer, engine=engine, config=config), need


def test_a_pinned_video_is_not_evicted(checkpoint: Path, clips: list[Path]) -> None:
    small_runtime, need = small(checkpoint, clips[0])
    one_round = PerceptionConfig(strategy="append", max_rounds=1, **LOOK)

    def look(video: Any) -> tuple[int, int]:
        small_runtime.engine.prefix_tree.clear()
        reuse = small_runtime.ask(**request(video, perception=one_round)).rounds[0].reuse
        return reuse.frames_decoded, reuse.pairs_encoded

    with small_runtime as runtime, runtime.open(clips[0]) as video:
        look(video)
        look(clips[1])
        assert look(video) > (0, 0)  # the other took its place
        release = runtime.pin(video, one_round)
        assert look(video) == (0, 0)
        for _ in range(2):
            assert look(clips[1])[1] > 0
            assert look(video) == (0, 0)
        runtime.engine.check_integrity()
        runtime._resources.store.check_integrity()
        with runtime.open(clips[1]) as other:
            message = f"^pin: video must be of a first look that fits: {need['frames'] // 2} bytes"
            with pytest.raises(BadRequest, match=message):
                runtime.pin(other, one_round)
            release.close()
            with runtime.pin(other, one_round):
                look(other)
                assert look(video)[1] > 0
                assert look(other) == (0, 0)
        look(video)
        assert look(clips[1])[1] > 0 and look(video)[1] > 0  # nothing is pinned any more
        with pytest.raises(BadRequest, match="^pin: video must be an open Video, got"):
            runtime.pin(clips[0])  # type: ignore[arg-type]


# -- sleep ----------------------------------------------------------------------------------------


def test_sleep_frees_the_caches_and_wake_takes_them_again(
    runtime: Runtime, clips: list[Path]
) -> None:
    expected = runtime.ask(**request(clips[0]))
    state = runtime.engine.model.export()
    assert not runtime.engine.is_asleep
    runtime.sleep()
    runtime.sleep()
    assert runtime.engine.is_asleep and runtime.engine.pool.pages.numel() == 0
    stats = runtime.stats()
    for cache, counter in (
        ("frame_store", "bytes"),
        ("vision_cache", "bytes"),
        ("kv", "bytes_used"),
    ):
        assert stats[cache][counter] == 0
    asked: tuple[Any, ...] = (
        lambda: runtime.ask(**request(clips[0])),
        lambda: runtime.generate("hello"),
        lambda: runtime.score("hello", [1]),
        lambda: runtime.chat([{"role": "user", "content": "which?"}]),
        lambda: runtime.score(expected.rounds[0].transcript, videos=clips[0]),
        lambda: runtime.features(expected.rounds[0].transcript, videos=clips[0]),
    )
    for function in asked:
        with pytest.raises(RuntimeError, match="^Runtime: it is asleep; call wake"):
            function()
    assert runtime.plan(**_asked(clips[0]))["rounds"]  # needs no device
    runtime.wake()
    runtime.wake()
    again = runtime.ask(**request(clips[0]))
    assert told(again) == told(expected)
    assert again.rounds[0].reuse.frames_decoded == expected.rounds[0].reuse.frames_decoded > 0
    assert again.rounds[0].reuse.pairs_reused == 0
    runtime.engine.check_integrity()
    name = "model.language_model.norm.weight"
    runtime.sleep()
    runtime.update_weights({name: -state[name]})
    runtime.wake()
    changed = runtime.ask(**request(clips[0]))
    assert told(changed) != told(expected) and changed.weights_version == 1


def _asked(clip: Path) -> dict[str, Any]:
    return {"video": clip, "question": "which?", "perception": APPEND}


def test_sleep_lets_requests_end_or_aborts_them(runtime: Runtime, clips: list[Path]) -> None:
    expected = runtime.ask(**request(clips[0]))
    begun, answers = threading.Event(), []
    arguments = request(clips[0], on_event=lambda event: begun.set())
    thread = threading.Thread(target=lambda: answers.append(runtime.ask(**arguments)))
    thread.start()
    assert begun.wait(60)
    runtime.sleep()
    thread.join()
    assert told(answers[0]) == told(expected)
    runtime.wake()
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    stream = runtime.stream(**request(clips[0], sampling=long))
    while next(stream).type != "token":
        pass
    runtime.sleep(in_flight="abort")
    with pytest.raises(Aborted, match="aborted for sleep"):
        list(stream)
    with pytest.raises(BadRequest, match="^sleep: in_flight must be drain or abort"):
        runtime.sleep(in_flight="now")  # type: ignore[arg-type]


def test_weights_leave_the_device_and_come_back(runtime: Runtime) -> None:
    """What `sleep` moves and drops, on a device that is none."""
    engine = runtime.engine
    moved: list[torch.device] = []
    to = engine.model.to
    engine.model.to = lambda device: (moved.append(device), to("cpu"))[1]  # type: ignore[method-assign]
    engine._home = torch.device("meta")
    engine.sleep()
    engine.wake()
    assert moved == [torch.device("cpu"), torch.device("meta")]
    assert not engine.is_asleep and engine.pool.pages.numel() > 0
