"""How questions end: asking, ending, closing and new weights while the driver is busy, timeouts."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from utils import choose_by, request

from vtts_rt import EngineConfig, Runtime, SamplingParams


@pytest.fixture()
def runtime(exact_runtime: Runtime) -> Runtime:
    return exact_runtime


class Busy:
    """Keeps a runtime's driver from its next step, as a long pass does, until it is left."""

    def __init__(self, runtime: Runtime) -> None:
        self.entered, self.left = threading.Event(), threading.Event()

        def occupy() -> None:
            self.entered.set()
            self.left.wait(60)

        self.thread = threading.Thread(target=lambda: runtime._driver.call(occupy))

    def __enter__(self) -> Busy:
        self.thread.start()
        assert self.entered.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self.left.set()
        self.thread.join(60)


def test_a_request_during_close_fails(checkpoint: Path, clips: list[Path]) -> None:
    runtime = Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26))
    errors: list[BaseException | None] = []
    closer = threading.Thread(target=runtime.close)
    with ThreadPoolExecutor(1) as pool:
        with Busy(runtime):
            asked = pool.submit(runtime.ask, **request(clips[0]))
            while runtime._driver._calls.empty():
                time.sleep(0.001)
            closer.start()
            while not runtime._driver._closed:
                time.sleep(0.001)
        errors.append(asked.exception(60))
    closer.join(60)
    assert "closed" in str(errors[0])


def test_cancelling_before_the_driver_takes_a_question(runtime: Runtime, clips: list[Path]) -> None:
    async def main() -> None:
        task = asyncio.create_task(runtime.ask_async(**request(clips[0])))
        while runtime._driver._calls.empty():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Busy(runtime):
        asyncio.run(main())
    assert runtime._driver.call(lambda: runtime._driver._scheduler.has_work) is False


def test_a_stream_that_is_closed_does_not_hold_up_new_weights(
    runtime: Runtime, clips: list[Path]
) -> None:
    endless = SamplingParams(max_tokens=3000, ignore_eos=True)
    stream = runtime.stream(**request(clips[0], sampling=endless))
    while next(stream).type != "token":
        pass
    update = threading.Thread(target=lambda: runtime.update_weights({}))
    update.start()
    stream.close()
    update.join(60)
    assert not update.is_alive()
    assert len(runtime.ask(**request(clips[0])).rounds) == 3


def test_an_update_that_does_not_fit_disturbs_no_request(
    runtime: Runtime, clips: list[Path]
) -> None:
    runtime.ask(**request(clips[0]))
    stream = runtime.stream(**request(clips[1]))
    while next(stream).type != "token":
        pass
    with pytest.raises(ValueError, match="named as in the checkpoint"):
        runtime.update_weights({"nothing.weight": torch.zeros(1)}, in_flight="abort")
    *_, last = stream
    assert last.type == "answer"
    assert runtime.ask(**request(clips[0])).rounds[0].reuse.tokens_reused > 0


def test_a_timeout_keeps_what_might_have_become_a_stop_text(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runtime.engine.tokenizer.encode("<answer>dark blue")
    late = False

    def choose(logits: Any, params: Any, *, position: int, **_: Any) -> tuple[int, float]:
        nonlocal late
        late = position == len(script) - 1
        return script[position], -0.5

    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + (1e6 if late else 0.0), perf_counter=time.perf_counter
    )
    choose_by(monkeypatch, choose)
    monkeypatch.setattr("vtts_rt.engine.engine.time", clock)
    sampling = SamplingParams(stop=("</answer>",))
    answer = runtime.ask(**request(clips[0], sampling=sampling, options=(), timeout_seconds=1000))
    assert (answer.stop_reason, answer.text) == ("timeout", "dark blue")
