"""Asks as values, videos that are opened once, kinds of errors, and the bound on the queue."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from utils import as_ask, held, request, told

from vtts_rt import (
    Aborted,
    Answerer,
    Ask,
    BadMedia,
    BadRequest,
    EngineConfig,
    Overloaded,
    Runtime,
    RuntimeConfig,
    SamplingParams,
    Video,
    open_video,
)
from vtts_rt.rounds.results import RoundEvent

ENDLESS = SamplingParams(max_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    engine = EngineConfig(kv_bytes=1 << 26, max_sequences=2)
    config = RuntimeConfig(max_queued_requests=1)
    with Runtime.from_pretrained(checkpoint, engine=engine, config=config) as runtime:
        yield runtime


@pytest.fixture()
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was opened that was not open."""
    opened: list[Any] = []

    def noted(video: Any, **more: Any) -> Any:
        if not isinstance(video, Video):
            opened.append(video)
        return open_video(video, **more)

    monkeypatch.setattr("vtts_rt.rounds.prepare.open_video", noted)
    return opened


# -- asks -----------------------------------------------------------------------------------------


def test_every_function_takes_an_ask(runtime: Runtime, clips: list[Path]) -> None:
    ask = as_ask(clips[0])
    expected = runtime.ask(**request(clips[0]))
    answerer: Answerer = runtime
    answers = [
        runtime.ask(ask),
        *runtime.ask_batch([ask]),
        *runtime.ask_batch([pickle.loads(pickle.dumps(ask))]),
        asyncio.run(answerer.ask_async(ask)),
    ]
    *_, last = runtime.stream(ask)
    answers.append(last.answer)  # type: ignore[union-attr]
    assert all(told(answer) == told(expected) for answer in answers)
    group = runtime.rollouts(ask, 2)
    assert told(group.answers[1]) == told(runtime.ask(replace(ask, member=1)))
    cost = runtime.plan(ask)
    assert cost == runtime.plan(clips[0], "which?", max_tokens=6, **_kept(ask))
    assert cost != runtime.plan(replace(ask, sampling=None))


def _kept(ask: Ask) -> dict[str, Any]:
    return {"perception": ask.perception, "options": ask.options}


def test_an_ask_checks_itself_and_holds_all(runtime: Runtime, clips: list[Path]) -> None:
    ask = as_ask(clips[0])
    assert ask.videos == (clips[0],) and replace(ask).clues == ask.clues
    with pytest.raises(BadRequest, match="^Ask: videos must be at least one video or image, got"):
        Ask([], "which?")
    with pytest.raises(BadRequest, match="^Ask: member must be a whole number in"):
        replace(ask, member=-1)
    with pytest.raises(AttributeError):
        ask.question = "else"  # type: ignore[misc]
    for more in ({"context": "x"}, {"question": "else?"}):
        with pytest.raises(TypeError, match="^ask: an Ask holds the question and its options"):
            runtime.ask(ask, **more)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="^ask: question must be a text that is not blank, got ''"):
        runtime.ask(clips[0])


# -- open videos ----------------------------------------------------------------------------------


def test_a_group_opens_its_videos_once(
    runtime: Runtime, clips: list[Path], opened: list[Any]
) -> None:
    videos = [clips[0], str(clips[0]), clips[1]]
    runtime.clear_caches()
    expected = [runtime.ask(**request(videos, member=i, start_seconds=1.0)) for i in range(3)]
    opened.clear()
    runtime.clear_caches()
    group = runtime.rollouts(as_ask(videos, start_seconds=1.0), 3).answers
    assert opened == [clips[0], clips[1]]
    assert [told(answer) for answer in group] == [told(answer) for answer in expected]
    spent = [[sum(r.reuse.frames_decoded for r in a.rounds) for a in x] for x in (expected, group)]
    assert sum(spent[1]) == spent[0][0] > 0  # as one alone
    with pytest.raises(BadMedia):
        runtime.rollouts(as_ask("/nowhere.mp4"), 2)
    with pytest.raises(TimeoutError, match="passed before the video was open"):
        runtime.rollouts(as_ask(clips[0], timeout_seconds=1e-9), 2)


def test_an_open_video_is_opened_once(
    runtime: Runtime, clips: list[Path], opened: list[Any]
) -> None:
    expected = runtime.ask(**request(clips[0]))
    clipped = runtime.ask(**request(clips[0], start_seconds=1.0))
    opened.clear()
    with runtime.open(clips[0]) as video:
        assert video.metadata == expected.videos[0]
        group = runtime.rollouts(as_ask(video), 3).answers
        assert told(runtime.ask(**request([video]))) == told(expected)
        assert told(runtime.ask(**request(video, start_seconds=1.0))) == told(clipped)
        with runtime.open(video) as again:
            assert again.metadata == video.metadata
        stream = runtime.stream(**request(video))
        next(stream)
    assert opened == [clips[0]] and len(group) == 3
    *_, last = stream  # it goes on, and closes the source
    assert told(last.answer) == told(expected)  # type: ignore[union-attr]
    with pytest.raises(BadRequest, match="^open_video: video must be open, got 'a closed one'"):
        runtime.ask(**request(video))
    with pytest.raises(BadRequest, match="^open_video: timestamps_seconds must be None"):
        open_video(Video(open_video(clips[0])), timestamps_seconds=[0.0])


def test_the_last_to_close_closes_the_source(clips: list[Path]) -> None:
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    closed: list[int] = []
    source = open_video(frames, source_fps=2.0)
    source.close = lambda: closed.append(1)  # type: ignore[method-assign]
    video = Video(source)
    shared = open_video(video, start_seconds=0.5)
    assert shared.metadata.num_frames == 3
    video.close()
    video.close()
    assert not closed and len(list(shared.read([0, 2]))) == 2
    shared.close()
    assert closed == [1]


def test_open_takes_the_times_of_an_array(runtime: Runtime) -> None:
    frames, times = np.zeros((3, 56, 56, 3), np.uint8), [0.0, 0.5, 2.0]
    with runtime.open(frames, timestamps_seconds=times) as video:
        assert video.metadata.timestamps_seconds.tolist() == times  # type: ignore[union-attr]
    with pytest.raises(BadRequest, match="^open: video must be one video or image, got"):
        runtime.open([frames])  # type: ignore[arg-type]


def test_a_question_cancelled_while_it_opens_closes_what_it_opens(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def late(*arguments: Any, **more: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return open_video(*arguments, **more)

    async def main(video: Video) -> None:
        task = asyncio.create_task(runtime.ask_async(**request(video)))
        assert await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    with runtime.open(clips[0]) as video:
        monkeypatch.setattr("vtts_rt.rounds.prepare.open_video", late)
        asyncio.run(main(video))  # waits for its threads
        assert video._shared.num_open == 1
    assert not runtime._driver._admitted


def test_opening_says_what_is_wrong(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="^open: unexpected argument 'fps'"):
        runtime.open("a.mp4", fps=3)  # type: ignore[call-arg]
    with pytest.raises(BadRequest, match="^open: end_seconds must be greater than start_seconds"):
        runtime.open("a.mp4", start_seconds=2.0, end_seconds=1.0)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for video in ("/nowhere.mp4", tmp_path / "a.mp4", b"", np.zeros((2, 2), np.uint8)):
        with pytest.raises(BadMedia, match="^open_video: video must "):
            runtime.open(video)


# -- errors ---------------------------------------------------------------------------------------


def test_one_request_too_many_is_refused(
    runtime: Runtime, clips: list[Path], opened: list[Any]
) -> None:
    streams = [runtime.stream(**request(clips[0], sampling=ENDLESS)) for _ in range(3)]
    with held(runtime):
        for stream in streams:
            next(stream)
        opened.clear()
        _are_refused(runtime, clips)
        assert not opened  # refused before any work
        for stream in streams:
            stream.close()
    assert len(runtime.ask(**request(clips[0])).rounds) == 3


def _are_refused(runtime: Runtime, clips: list[Path]) -> None:
    for call in (
        lambda: runtime.ask(**request(clips[0])),
        lambda: runtime.generate("hello"),
        lambda: asyncio.run(runtime.ask_async(**request(clips[0]))),
        lambda: runtime.ask_batch([request(clips[0])]),
    ):
        with pytest.raises(Overloaded, match="3 requests are in work or wait") as error:
            call()
        assert 0.1 <= error.value.retry_after_seconds <= 60.0
    assert pickle.loads(pickle.dumps(error.value)).retry_after_seconds > 0


def test_places_come_back_however_a_request_ends(runtime: Runtime, clips: list[Path]) -> None:
    endless = request(clips[0], sampling=ENDLESS)

    async def first(events: AsyncIterator[RoundEvent]) -> str:
        return (await anext(events)).type

    for _ in range(4):
        loop, events = asyncio.new_event_loop(), runtime.stream_async(**endless)
        assert loop.run_until_complete(first(events)) == "round_started"
        loop.close()  # nothing of `events` is run any more
        del events
        while runtime._driver._deliver:
            pass
    aborts = runtime._driver._aborts.qsize()
    for _ in range(4):
        for wrong in (request("/nowhere.mp4"), request(clips[0], context="words " * 99_999)):
            with pytest.raises(BadRequest):
                runtime.ask(**wrong)
    assert not runtime._driver._admitted and runtime._driver._aborts.qsize() == aborts


def test_a_batch_larger_than_the_queue_is_no_overload(runtime: Runtime, clips: list[Path]) -> None:
    answers = runtime.ask_batch([request(clips[i % 2]) for i in range(5)])
    assert [len(answer.rounds) for answer in answers] == [3] * 5


def test_requests_that_the_runtime_ends_are_aborted(checkpoint: Path, clips: list[Path]) -> None:
    runtime = Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26))
    for end in (lambda: runtime.update_weights({}, in_flight="abort"), runtime.close):
        stream = runtime.stream(**request(clips[0], sampling=ENDLESS))
        with held(runtime):
            next(stream)
            end()
        with pytest.raises(Aborted):
            list(stream)
