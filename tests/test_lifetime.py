"""What an ended request keeps: nothing, without the cycle collector; and what an end waits for."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_driver import Busy
from utils import as_ask, request

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.video.pyav import PyavSource

ENDLESS = SamplingParams(max_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


# -- memory -----------------------------------------------------------------------------------


def closed_early(runtime: Runtime, clip: Path) -> None:
    stream = runtime.stream(**request(clip, sampling=ENDLESS))
    while next(stream).type != "token":
        pass
    stream.close()


def failed(runtime: Runtime, clip: Path) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("disk gone")

    runtime.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtts_rt.engine.encoder._frames", broken)
        with pytest.raises(OSError, match="disk gone") as caught:
            runtime.ask(**request(clip))
        del caught


def failed_batch(runtime: Runtime, clip: Path) -> None:
    with pytest.raises(ValueError, match="open_video") as caught:
        runtime.ask_batch([request(clip), request("/nowhere.mp4")])
    del caught


def closed_coroutine(runtime: Runtime, clip: Path) -> None:
    async def main() -> None:
        async with aclosing(runtime.stream_async(**request(clip, sampling=ENDLESS))) as stream:
            while (await anext(stream)).type != "token":
                pass

    asyncio.run(main())


def out_of_time(runtime: Runtime, clip: Path) -> None:
    for seconds in (0.2, 2, 20):  # a busy machine may take the first of them to open the video
        with suppress(TimeoutError):
            runtime.ask(**request(clip, sampling=ENDLESS, timeout_seconds=seconds))
            return


WAYS: dict[str, Callable[[Runtime, Path], Any]] = {
    "answered": lambda runtime, clip: runtime.ask(**request(clip)),
    "group": lambda runtime, clip: runtime.rollouts(as_ask(clip), 2),
    "out of time": out_of_time,
    "closed early": closed_early,
    "failed": failed,
    "failed in a batch": failed_batch,
    "coroutine": lambda runtime, clip: asyncio.run(runtime.ask_async(**request(clip))),
    "coroutine closed early": closed_coroutine,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_ended_request_leaves_no_reference_cycle(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    sources: list[weakref.ref[PyavSource]] = []
    init = PyavSource.__init__

    def noted(self: PyavSource, *arguments: Any) -> None:
        init(self, *arguments)
        sources.append(weakref.ref(self))

    monkeypatch.setattr(PyavSource, "__init__", noted)
    ours: list[type] = [PagedKVPool]
    while PagedKVPool in ours:  # the runtime of an earlier test ended meanwhile
        ours = kinds_of_garbage(runtime, lambda: WAYS[way](runtime, clips[0]), sources)
    assert ours == []


def kinds_of_garbage(
    runtime: Runtime, ask: Callable[[], Any], sources: list[weakref.ref[PyavSource]]
) -> list[type]:
    """Of our objects that only the cycle collector frees once `ask` has ended."""
    gc.collect()
    gc.disable()
    try:
        ask()
        runtime._driver.call(lambda: None)  # aborts are served
        with runtime._resources.store.ahead._lock:
            busy = {id(wanted.source) for wanted in runtime._resources.store.ahead._busy.values()}
        left = [source() for source in sources]
        assert sources and all(source is None or id(source) in busy for source in left)
        del left
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [type(item) for item in gc.garbage if type(item).__module__.startswith("vtts_rt")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_open_files_stay_few(runtime: Runtime, clips: list[Path]) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    counts = []
    gc.collect()
    gc.disable()
    try:
        for number in range(12):
            way = closed_early if number % 3 == 0 else WAYS["answered"]
            way(runtime, clips[number % 2])
            runtime._driver.call(lambda: None)
            counts.append(sum(1 for _ in folder.iterdir()))
    finally:
        gc.enable()
    assert max(counts[4:]) <= max(counts[:4])


def test_an_unreferenced_runtime_ends_its_thread(checkpoint: Path, clips: list[Path]) -> None:
    runtime = Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26))
    runtime.ask(**request(clips[0]))
    thread, engine = runtime._driver._thread, weakref.ref(runtime.engine)
    assert thread is not None
    del runtime
    thread.join(60)
    del thread
    gc.collect()
    assert engine() is None


# -- closing ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncio's own
def test_closing_ends_all_waits_whatever_became_of_event_loops(
    checkpoint: Path, clips: list[Path]
) -> None:
    runtime = Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26))
    outcomes: dict[str, BaseException] = {}

    def ask(name: str) -> None:
        try:
            runtime.ask(**request(clips[0], sampling=ENDLESS))
        except RuntimeError as error:
            outcomes[name] = error

    in_work = threading.Thread(target=ask, args=("in work",))
    in_work.start()
    while not runtime.stats()["scheduler"]["running"]:
        pass
    with Busy(runtime):
        loops = [asyncio.new_event_loop() for _ in range(2)]

        async def ask_until_queued() -> None:
            before = runtime._driver._calls.qsize()
            asyncio.ensure_future(runtime.ask_async(**request(clips[0])))
            while runtime._driver._calls.qsize() == before:
                await asyncio.sleep(0.001)

        for loop in loops:
            loop.run_until_complete(ask_until_queued())
        loops[0].close()  # the other one never runs again
        queued = threading.Thread(target=ask, args=("queued",))
        before = runtime._driver._calls.qsize()
        queued.start()
        while runtime._driver._calls.qsize() == before:
            pass
        closers = [threading.Thread(target=runtime.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        while not runtime._driver._closed:
            pass
    for thread in (in_work, queued, *closers):
        thread.join(60)
        assert not thread.is_alive()
    assert all("closed" in str(outcomes[name]) for name in ("in work", "queued"))
    runtime.close()
    for task in asyncio.all_tasks(loops[1]):
        task.cancel()
    loops[1].run_until_complete(asyncio.sleep(0.01))
    loops[1].close()
    del loop, loops
    gc.collect()  # the coroutines of the first one, while the warning is ignored


def test_closing_on_the_drivers_own_thread(checkpoint: Path, clips: list[Path]) -> None:
    runtime = Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26))
    stream = runtime.stream(**request(clips[0], sampling=ENDLESS))
    next(stream)
    runtime._driver.call(runtime.close)
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    assert runtime._driver._thread is not None
    runtime._driver._thread.join(60)
    assert not runtime._driver._scheduler.has_work


# -- time -------------------------------------------------------------------------------------


def test_time_runs_from_the_call_and_while_the_driver_is_busy(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = False
    submit = runtime._driver.submit

    def noted(*arguments: Any) -> Any:
        nonlocal late
        late = True
        return submit(*arguments)

    def monotonic() -> float:
        return time.monotonic() + (1e6 if late else 0.0)

    arguments = request(clips[0], timeout_seconds=1000)
    ways: list[Callable[[], Any]] = [
        lambda: runtime.ask(**arguments),
        lambda: runtime.ask_batch([arguments])[0],
        lambda: asyncio.run(runtime.ask_async(**arguments)),
    ]
    clock = SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter)
    with Busy(runtime), monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "weights_version", 7)
        patch.setattr(runtime._driver, "submit", noted)
        patch.setattr("vtts_rt.rounds.streams.time", clock)
        for way in ways:
            late = False
            answer = way()
            assert (answer.stop_reason, answer.rounds) == ("timeout", [])
            assert answer.weights_version == 7
    stream = runtime.stream(**request(clips[0], timeout_seconds=0.001))
    threading.Event().wait(0.01)  # what the caller does in between counts, too
    with pytest.raises(TimeoutError, match="passed before the video was open"):
        next(stream)
    assert len(runtime.ask(**request(clips[0])).rounds) == 3


# -- size -------------------------------------------------------------------------------------


def test_a_request_that_is_too_large_is_refused_by_its_size_alone(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("ids are built")

    monkeypatch.setattr("vtts_rt.rounds.prepare.encode_prompt", none)
    huge = [
        {"context": "many words " * 1_000_000},
        {"context": "w" * 5_000_000},
        {"context": "\u4e16\u754c\u3002" * 2_000_000},
        *(
            {"perception": _perception(strategy, min_pixels=10**9, total_pixels=10**10)}
            for strategy in ("official", "grid", "refresh", "append")
        ),
    ]
    with Busy(runtime):  # the driver has no part in it
        for more in huge:
            with pytest.raises(ValueError, match="plus max_tokens must be <= .* got at least"):
                runtime.ask(**request(clips[0], **more))
        with pytest.raises(
            ValueError, match="generate: prompt plus max_tokens must be <= .* got at least"
        ):
            runtime.generate("many words " * 1_000_000)


def _perception(strategy: str, **budget: int) -> Any:
    return PerceptionConfig(strategy=strategy, **budget)  # type: ignore[arg-type]
