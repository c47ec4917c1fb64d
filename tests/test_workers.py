"""Messages between a process and its workers: unreadable, large, left unread, not needed."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.multiprocessing

from vtts_rt import Ask
from vtts_rt.cluster import RolloutCluster
from vtts_rt.workers import ProcessWorker, _serve


class Unreadable:
    """What cannot be unpickled."""

    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


class Speaking:
    """Stands in for a runtime: its statistics cannot be unpickled once."""

    def __init__(self) -> None:
        self.said: list[object] = [Unreadable()]

    def stats(self) -> Any:
        return self.said.pop() if self.said else "here"


def test_a_message_that_cannot_be_unpickled_fails_its_call_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = torch.multiprocessing.get_context("fork")  # starts at once, and knows this module
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    worker = ProcessWorker(Speaking)  # type: ignore[arg-type]
    message = r"^RolloutCluster: {} cannot be unpickled \(ZeroDivisionError: division by zero\)$"
    asked = "an argument of rollouts, in the worker's process,"
    try:
        with pytest.raises(RuntimeError, match=message.format(asked)):
            worker.call("rollouts", 0, Unreadable(), 2, "g").result(60)
        with pytest.raises(RuntimeError, match=message.format("the result of a call")):
            worker.call("stats").result(60)
        with pytest.raises(Exception, match="pickle"):
            worker.call("stats", lambda: None)
        assert worker.call("stats").result(60) == "here" and worker.process.is_alive()
    finally:
        worker.close()
    lost = ProcessWorker(Unreadable())  # type: ignore[arg-type]
    try:
        with pytest.raises(ZeroDivisionError):
            lost.call("stats").result(60)
    finally:
        lost.close()


class Peer:
    """Stands in for a worker's process: answers its first call only once the second one is being
    written, and reads that one only after the first was taken."""

    taken = threading.Event()

    def __init__(self, target: object, args: Any, daemon: bool) -> None:
        pipe = args[1]
        pipe = type(pipe)(os.dup(pipe.fileno()))  # as a process has its own copy
        self.thread = threading.Thread(target=self.serve, args=(pipe,), daemon=True)
        self.start, self.join = self.thread.start, self.thread.join

    def serve(self, pipe: Any) -> None:
        with pipe:
            first, *_ = pipe.recv()
            pipe.poll(30)
            pipe.send((first, pickle.dumps(("one", None))))
            if self.taken.wait(60):
                second, *_ = pipe.recv()
                pipe.send((second, pickle.dumps(("two", None))))

    def terminate(self) -> None:
        self.taken.set()


def test_a_result_is_taken_while_a_call_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    context = torch.multiprocessing.get_context("spawn")
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(context, "Process", Peer)
    worker = ProcessWorker(Speaking)  # type: ignore[arg-type]
    first = worker.call("stats")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(worker.call, "rollouts", bytes(8 << 20))  # more than a pipe holds
        try:
            assert first.result(30) == "one"
        finally:
            Peer.taken.set()
        assert second.result(30).result(30) == "two"
    worker.close()


def test_a_worker_ends_where_its_parent_has_left_results_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system then says "connection reset", not that the file is at its end."""
    ours, theirs = torch.multiprocessing.get_context("spawn").Pipe()
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", ended)
    ours.send((0, "stats", b""))

    def leave() -> None:
        ours.poll(60)
        ours.close()

    leaver = threading.Thread(target=leave)
    leaver.start()
    with pytest.raises(SystemExit) as end:
        _serve(pickle.dumps(Unreadable()), theirs)  # fails every call
    assert end.value.code == 0
    leaver.join()


@pytest.mark.parametrize(("state", "aborted"), [("waits", 0), ("runs", 1), ("has ended", 0)])
def test_only_a_group_that_runs_is_aborted(state: str, aborted: int) -> None:
    """A worker would keep the numbers of the others for ever."""
    methods = []

    class Worker:
        def call(self, method: str, *arguments: Any) -> Future[Any]:
            methods.append(method)
            future: Future[Any] = Future()
            if state != "waits":
                future.set_running_or_notify_cancel()
            if state == "has ended":
                future.set_result(())
            return future

        def close(self) -> None: ...

    async def main() -> None:
        ask = Ask("clip.mp4", "which?")
        task = asyncio.create_task(RolloutCluster([Worker()]).rollouts_async(ask, 2))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert methods == ["rollouts", *["abort"] * aborted]
