"""RolloutCluster: where groups go, what a worker's death changes, and weights in buckets."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from utils import as_ask, held, told

from vtts_rt import (
    Aborted,
    Ask,
    BadMedia,
    BadRequest,
    EngineConfig,
    RolloutGroup,
    Runtime,
    SamplingParams,
    export_weights,
)
from vtts_rt.cluster import RolloutCluster
from vtts_rt.engine.shared_weights import WeightHandles
from vtts_rt.models.registry import from_config
from vtts_rt.rollout.engine import RolloutEngine
from vtts_rt.workers import LocalWorker, ProcessWorker, RayWorker, RolloutHost, WorkerDied

SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)


def making(checkpoint: Path) -> Callable[[], Runtime]:
    """What a spawned process can unpickle, which does not find this module."""
    return partial(Runtime.from_pretrained, checkpoint, engine=EngineConfig(kv_bytes=1 << 24))


@pytest.fixture(scope="module")
def one(checkpoint: Path) -> Iterator[Runtime]:
    with making(checkpoint)() as runtime:
        yield runtime


@pytest.fixture()
def cluster(checkpoint: Path) -> Iterator[RolloutCluster]:
    workers = [LocalWorker(making(checkpoint)) for _ in range(2)]
    with RolloutCluster(workers, bucket_bytes=20_000) as cluster:
        yield cluster


@pytest.fixture()
def asks(clips: list[Path]) -> list[tuple[str, Ask]]:
    return [
        (f"g{i}", as_ask(clips[i % 2], sampling=SAMPLING, question=f"number {i}?"))
        for i in range(4)
    ]


def run(engine: RolloutEngine, asks: Any, each: Callable[[int], None] = lambda n: None) -> Any:
    async def main() -> Any:
        found: dict[str, Any] = {}
        async with aclosing(engine.run(asks)) as groups:
            async for finished in groups:
                assert finished.group.group_id not in found
                found[finished.group.group_id] = finished.group
                each(len(found))
        return found

    return asyncio.run(main())


def said(groups: dict[str, Any]) -> dict[str, Any]:
    return {name: [told(answer) for answer in group.answers] for name, group in groups.items()}


def test_a_cluster_samples_what_one_runtime_samples(
    one: Runtime, cluster: RolloutCluster, asks: list[tuple[str, Ask]]
) -> None:
    expected = said(run(RolloutEngine(one, 2), asks))
    assert said(run(RolloutEngine(cluster, 2), asks)) == expected
    # A video was decoded on one of them only.
    decoded = [stats["frame_store"]["frames_decoded"] for stats in cluster.stats()]
    assert sum(decoded) == one.stats()["frame_store"]["frames_decoded"]
    broken = run(RolloutEngine(cluster, 2), [("x", Ask("/nowhere.mp4", "which?"))])["x"]
    assert [type(error) for error in broken.errors] == [BadMedia] * 2


def test_weights_go_to_all_workers_in_buckets(
    one: Runtime, cluster: RolloutCluster, asks: list[tuple[str, Ask]]
) -> None:
    others = from_config(one.engine.model.config, 7).export()
    before = said(run(RolloutEngine(cluster, 2), asks[:2]))
    for tensors in (others, export_weights(others)):
        cluster.update_weights(tensors)
        groups = run(RolloutEngine(cluster, 2), asks[:2])
        assert said(groups) != before
        assert {group.weights_version for group in groups.values()} == {1 + (tensors is not others)}
    name, tensor = next(iter(others.items()))
    with pytest.raises(ValueError):
        cluster.update_weights({**others, "no.such.weight": tensor})
    assert [stats["staged_weights"]["tensors"] for stats in cluster.stats()] == [0, 0]
    assert said(run(RolloutEngine(cluster, 2), asks[:2])) == said(groups)
    cluster.update_weights({name: tensor}, finish=False)
    assert [stats["staged_weights"]["tensors"] for stats in cluster.stats()] == [1, 1]
    cluster.sleep()
    cluster.update_weights({})
    cluster.wake()
    assert cluster.perception() == one.perception()


class Mortal(LocalWorker):
    """Dies at a group, as a process does: what it works on is lost."""

    def __init__(self, make: Callable[[], Runtime], deaths: list[int]) -> None:
        super().__init__(make)
        self._deaths, self.begun, self.dead = deaths, 0, False

    def call(self, method: str, *arguments: Any) -> Any:
        self.begun += method == "rollouts"
        self.dead = self.dead or self.begun in self._deaths
        future = super().call(method, *arguments)
        if self.dead:
            future.cancel()
            future = type(future)()
            future.set_exception(WorkerDied("gone"))
        return future


def test_groups_of_a_dead_worker_go_to_the_others(
    one: Runtime, checkpoint: Path, asks: list[tuple[str, Ask]]
) -> None:
    expected = said(run(RolloutEngine(one, 2), asks))
    workers = [Mortal(making(checkpoint), deaths) for deaths in ([2], [2], [])]
    with RolloutCluster(workers) as cluster:
        assert said(run(RolloutEngine(cluster, 2), asks)) == expected
        assert cluster.num_workers == 3 - cluster.groups_moved
    with RolloutCluster([Mortal(making(checkpoint), [1])]) as cluster:
        groups = run(RolloutEngine(cluster, 2), asks[:1])
        assert [type(error) for error in groups["g0"].errors] == [WorkerDied] * 2
        with pytest.raises(WorkerDied, match="no worker is left"):
            cluster.update_weights({})


def test_a_killed_process_loses_no_group(
    one: Runtime, checkpoint: Path, asks: list[tuple[str, Ask]]
) -> None:
    expected = said(run(RolloutEngine(one, 2), asks))
    workers = [ProcessWorker(making(checkpoint)) for _ in range(2)]
    with RolloutCluster(workers) as cluster:
        cluster.update_weights(export_weights(one.engine.model.export()))  # shared memory

        for worker in workers:  # a terminal's interrupt is for the parent
            os.kill(worker.process.pid or 0, signal.SIGINT)

        def kill(ended: int) -> None:
            if ended == 1:
                os.kill(workers[0].process.pid or 0, signal.SIGKILL)

        groups = run(RolloutEngine(cluster, 2, max_groups=2), asks, kill)
        assert said(groups) == expected
        workers[0].process.join(60)
        assert cluster.stats()[0]["frame_store"] and cluster.num_workers == 1
        frames = np.zeros((4, 56, 56, 3), np.uint8)
        own = run(RolloutEngine(cluster, 2), [("a", replace(asks[0][1], videos=[frames], source_fps=2.0))])  # fmt: skip  # noqa: E501
        assert own["a"].errors == []


def test_a_cancelled_group_ends_in_its_worker(
    cluster: RolloutCluster, asks: list[tuple[str, Ask]]
) -> None:
    endless = replace(asks[0][1], sampling=SamplingParams(max_tokens=900, ignore_eos=True))

    async def main() -> None:
        task = asyncio.create_task(cluster.rollouts_async(endless, 2))
        while not any([s["scheduler"]["running"] for s in cluster.stats()]):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while any([s["scheduler"]["running"] for s in cluster.stats()]):
            await asyncio.sleep(0.01)

    with ExitStack() as stack:
        for worker in cluster._workers.values():
            stack.enter_context(held(worker._host.runtime, "token"))  # type: ignore[attr-defined]
        asyncio.run(main())


class Strange(Exception):
    """Cannot be unpickled."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)


class Fake:
    """A runtime whose second member fails."""

    calls = 0

    async def rollouts_async(self, ask: Ask, num_answers: int, *, group_id: str) -> RolloutGroup:
        self.calls += 1
        return RolloutGroup(group_id, ask, (KeyError("x"), Strange("odd", 3)))


def test_a_group_may_be_aborted_before_it_begins() -> None:
    host = RolloutHost(Fake)  # type: ignore[arg-type]
    ask = Ask("clip.mp4", "which?")
    host.abort(5)
    with pytest.raises(Aborted, match="the group was cancelled"):
        host.rollouts(5, ask, 2, "g")
    assert not host.runtime.calls  # type: ignore[attr-defined]
    members = pickle.loads(pickle.dumps(host.rollouts(6, ask, 2, "g")))
    assert [repr(m) for m in members] == ["KeyError('x')", "RuntimeError('Strange: odd')"]


class Endless:
    """A runtime whose groups end when they are aborted."""

    weights_version = closed = 0

    async def rollouts_async(self, ask: Ask, num_answers: int, *, group_id: str) -> RolloutGroup:
        await asyncio.Event().wait()
        raise AssertionError

    def stats(self) -> str:
        return "here"

    def update_weights(self, tensors: Any, finish: bool) -> None:
        for _ in range(3):
            self.seen = {name: tensors[name].tolist() for name in tensors}

    def close(self) -> None:
        self.closed += 1


def test_calls_do_not_wait_for_groups_and_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    worker = LocalWorker(Endless)  # type: ignore[arg-type]
    ask, num = Ask("clip.mp4", "which?"), 80  # more than sample at once
    futures = [worker.call("rollouts", call, ask, 2, "g") for call in range(num)]
    while not futures[0].running():
        time.sleep(0.001)
    for call in (num - 1, 0):  # one waits, one runs
        worker.call("abort", call).result(0)
        assert worker.call("stats").result(10) == "here"
    with pytest.raises(Aborted, match="the group was cancelled"):
        futures[0].result(10)
    worker.close()
    worker.close()
    for future in futures:
        assert isinstance(future.exception(10), Aborted)
    assert worker._host.runtime.closed == 1  # type: ignore[attr-defined]
    assert not worker._host._running and not worker._host._aborted
    assert set(threading.enumerate()) <= before


# An error whose class the other process does not know.
STRANGE = """
from vtts_rt import errors
class Odd(Exception):
    def __init__(self, text, code): super().__init__(text)
Odd.__module__, Odd.__qualname__, errors.Odd = errors.__name__, "Odd", Odd
raise Odd("no card", 3)
"""


@pytest.mark.slow
def test_a_worker_says_why_it_fails_whatever_the_error() -> None:
    with (
        RolloutCluster([ProcessWorker(partial(exec, STRANGE, {}))]) as cluster,  # type: ignore[arg-type]
        pytest.raises(RuntimeError, match="Odd: no card"),
    ):
        cluster.stats()


@pytest.mark.slow
def test_a_worker_that_cannot_load_says_why() -> None:
    with (
        RolloutCluster([ProcessWorker(making(Path("/nowhere")))]) as cluster,
        pytest.raises(Exception, match="nowhere"),
    ):
        cluster.stats()


def test_arguments_of_a_cluster(cluster: RolloutCluster, clips: list[Path], one: Runtime) -> None:
    with pytest.raises(BadRequest, match="^RolloutCluster: workers must be at least one, got 0"):
        RolloutCluster([])
    with pytest.raises(BadRequest, match="bucket_bytes must be a whole number >= 1, got 0"):
        RolloutCluster([LocalWorker(lambda: one)], bucket_bytes=0)
    with one.open(clips[0]) as video, pytest.raises(BadRequest, match="video must be a path"):
        asyncio.run(cluster.rollouts_async(Ask(video, "which?"), 2))


def test_handles_are_opened_in_place(one: Runtime) -> None:
    """On the CPU: shared memory; a write of the trainer shows through them."""
    tensors = one.engine.model.export()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name, whole = next((n, t) for n, t in tensors.items() if t.dim() == 2)
    tensors["part"] = whole[1:, ::2]
    exported = export_weights(tensors)
    data = pickle.dumps(exported)
    assert len(data) < sum(t.nbytes for t in tensors.values()) // 10
    opened = pickle.loads(data)
    assert set(opened) == set(tensors) and len(opened) == len(tensors)
    assert all(opened[n].equal(tensors[n]) for n in tensors)
    whole[1, 0] = 42.0
    assert opened[name][1, 0] == 42.0 == opened["part"][0, 0]
    assert pickle.loads(pickle.dumps(opened))[name].equal(whole)  # handed on


def test_handles_of_cuda_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device: the tensor's own reduction is what is pickled."""
    from vtts_rt.engine import shared_weights

    class OnCuda(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    reduced: list[Any] = []

    def reduce(tensor: torch.Tensor) -> Any:
        reduced.append(tensor)
        return torch.full, ((2,), 7.0)

    monkeypatch.setattr(shared_weights, "reduce_tensor", reduce)
    tensor = torch.zeros(2).as_subclass(OnCuda)
    opened = pickle.loads(pickle.dumps(shared_weights.WeightHandles({"w": tensor})))
    assert reduced == [tensor] or len(reduced) == 1
    assert opened["w"].tolist() == [7.0, 7.0]


OPENED: list[weakref.ref[torch.Tensor]] = []


def opened_handle(value: float) -> torch.Tensor:
    """Stands in for what opens CUDA IPC memory, which is closed once the tensor is gone."""
    tensor = torch.full((2,), value)
    OPENED.append(weakref.ref(tensor))
    return tensor


def test_a_handle_is_opened_once_and_closed_after_the_update() -> None:
    OPENED.clear()
    handles = WeightHandles({})
    handles.__setstate__({name: (opened_handle, (value,)) for name, value in (("a", 1), ("b", 2))})
    assert list(handles) == ["a", "b"] and len(handles) == 2 and not OPENED
    host = RolloutHost(Endless)  # type: ignore[arg-type]
    host.update_weights(handles, True)
    assert host.runtime.seen == {"a": [1, 1], "b": [2, 2]}  # type: ignore[attr-defined]
    assert [opened() for opened in OPENED] == [None, None]
    assert handles["b"].tolist() == [2, 2] and len(OPENED) == 3 and len(handles) == 2
    with pytest.raises(KeyError):
        handles["c"]
    own = WeightHandles({"a": torch.ones(2)})
    host.update_weights(own, True)  # the exporter's stay
    assert own["a"].tolist() == [1, 1]
    host.close()


@pytest.mark.slow
def test_ray_actors(one: Runtime, checkpoint: Path, asks: list[tuple[str, Ask]]) -> None:
    ray = pytest.importorskip("ray")
    paths = [p for p in sys.path if p]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )
    try:
        expected = said(run(RolloutEngine(one, 2), asks))
        workers = [RayWorker(making(checkpoint), num_cpus=1) for _ in range(2)]
        with RolloutCluster(workers) as cluster:
            cluster.update_weights(one.engine.model.export())

            def kill(ended: int) -> None:
                if ended == 1:
                    ray.kill(workers[0]._actor)

            assert said(run(RolloutEngine(cluster, 2, max_groups=2), asks, kill)) == expected
            broken = run(RolloutEngine(cluster, 2), [("x", Ask("/nowhere.mp4", "which?"))])["x"]
            assert [type(error) for error in broken.errors] == [BadMedia] * 2
            assert len(cluster.stats()) == cluster.num_workers == 1
    finally:
        ray.shutdown()
