"""Messages between a process and its worker that cannot be unpickled."""

from __future__ import annotations

from typing import Any

import pytest
import torch.multiprocessing

from vtts_rt.workers import ProcessWorker


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
