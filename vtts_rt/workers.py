"""Workers, which hold a runtime each and are called by a `cluster.RolloutCluster`: `ProcessWorker`
(multiprocessing), `LocalWorker` (this process) and `RayWorker` (an actor; needs `vtts_rt[ray]`)."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch.multiprocessing
from torch import Tensor

from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.sequence import Completion
from vtts_rt.engine.shared_weights import WeightHandles
from vtts_rt.errors import Aborted
from vtts_rt.rounds.ask import Ask, Perception
from vtts_rt.rounds.results import Answer
from vtts_rt.rounds.rollouts import RolloutGroup
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams

# Groups that one worker samples at once; more wait in it. Other calls wait for none of them.
_MAX_GROUPS = 64
_MAX_OTHERS = 8
_CANCELLED = "RolloutCluster: the group was cancelled"


class WorkerDied(RuntimeError):
    """The process of a worker has ended."""


class Worker(Protocol):
    """Calls methods of a `RolloutHost` somewhere. `call` returns at once; its future raises what
    the method raises, and WorkerDied where the worker is gone."""

    def call(self, method: str, *arguments: Any) -> Future[Any]: ...
    def close(self) -> None: ...


def _begun() -> Future[Any]:
    """A future that cannot be cancelled: its worker sets it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _portable(error: Exception) -> Exception:
    """The error, or its sentence where it cannot be unpickled: a class whose arguments are not
    those that it hands on."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _packed(value: object) -> bytes:
    """By multiprocessing's rules: tensors as handles. A message holds these bytes beside the number
    of the call, which can then be read where its arguments or result cannot be unpickled."""
    return bytes(ForkingPickler.dumps(value))


def _unpacked(data: bytes, what: str) -> Any:
    """RuntimeError with one sentence for what cannot be unpickled here."""
    try:
        return pickle.loads(data)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise RuntimeError(f"RolloutCluster: {what} cannot be unpickled ({told:.300})") from error


class RolloutHost:
    """What runs in a worker: a runtime. Thread-safe as that is. make: may be pickled."""

    def __init__(self, make: Callable[[], Runtime] | bytes) -> None:
        self.runtime: Runtime = (pickle.loads(make) if isinstance(make, bytes) else make)()
        self._loop = asyncio.new_event_loop()
        name = "vtts_rt worker's loop"
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._running: dict[int, Future[RolloutGroup]] = {}
        self._aborted: set[int] = set()  # before their call, or after its end
        self._closed = False
        self._lock = threading.Lock()

    def rollouts(
        self, call: int, ask: Ask, num_answers: int, group_id: str
    ) -> tuple[Answer | Exception, ...]:
        """The members of a group. call: a number by which it can be aborted."""
        with self._lock:
            if self._closed or call in self._aborted:
                self._aborted.discard(call)
                raise Aborted(_CANCELLED)
            sampled = self.runtime.rollouts_async(ask, num_answers, group_id=group_id)
            self._running[call] = future = asyncio.run_coroutine_threadsafe(sampled, self._loop)
        try:
            members = future.result().members
        except CancelledError:
            raise Aborted(_CANCELLED) from None
        finally:
            with self._lock:
                del self._running[call]
        return tuple(_portable(m) if isinstance(m, Exception) else m for m in members)

    def abort(self, call: int) -> None:
        """End a group, also one whose call comes later, as calls run beside each other. Does not
        wait for anything."""
        with self._lock:
            future = self._running.get(call)
            if future is None:
                self._aborted.add(call)
        if future is not None:
            future.cancel()

    def update_weights(self, tensors: Mapping[str, Tensor], finish: bool) -> int:
        try:
            self.runtime.update_weights(tensors, finish=finish)
        finally:
            if isinstance(tensors, WeightHandles):
                tensors.close()
        return self.runtime.weights_version

    def discard_staged_weights(self) -> None:
        self.runtime.discard_staged_weights()

    def perception(self, perception: Perception | None) -> ResolvedPerception:
        return self.runtime.perception(perception)

    def weights_hash(self) -> str:
        return self.runtime.engine.model.weights_hash()

    def sleep(self) -> None:
        self.runtime.sleep()

    def wake(self) -> None:
        self.runtime.wake()

    def stats(self) -> Mapping[str, Mapping[str, int]]:
        return self.runtime.stats()

    def generate(self, prompt: str, sampling: SamplingParams) -> Completion:
        return self.runtime.generate(prompt, sampling)

    def close(self) -> None:
        """Fail what runs, and end the loop and its threads; may be called again."""
        with self._lock:
            was_open, self._closed = not self._closed, True
        if was_open:
            self.runtime.close()
            asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _end_tasks() -> None:
    """Cancel the other tasks of this loop, and end its threads."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


class LocalWorker:
    """A runtime of this process."""

    def __init__(self, make: Callable[[], Runtime] | bytes) -> None:
        self._host = RolloutHost(make)
        self._groups = ThreadPoolExecutor(_MAX_GROUPS, thread_name_prefix="vtts_rt groups")
        self._others = ThreadPoolExecutor(_MAX_OTHERS, thread_name_prefix="vtts_rt worker")

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        if method == "abort":  # at once, whatever the threads do
            done = _begun()
            self._host.abort(*arguments)
            done.set_result(None)
            return done
        pool = self._groups if method == "rollouts" else self._others
        return pool.submit(getattr(self._host, method), *arguments)

    def close(self) -> None:
        """Fail what runs and waits; no thread is left."""
        self._host.close()
        self._groups.shutdown()
        self._others.shutdown()


class ProcessWorker:
    """A spawned process. make: can be pickled, as arguments and answers must be; tensors go through
    shared memory."""

    def __init__(self, make: Callable[[], Runtime]) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(_packed(make), theirs), daemon=True)
        self.process.start()
        theirs.close()  # or the end of the process would not be seen
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # of `_calls`
        # Of writes, which wait until the process reads: results are taken meanwhile.
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future, packed = _begun(), _packed(arguments)  # raises for what cannot be pickled
        number = next(self._numbers)
        with self._lock:
            self._calls[number] = future
        with self._sending:
            try:
                self._pipe.send((number, method, packed))
            except OSError:  # it has died
                self._fail([number])
        return future

    def _read(self) -> None:
        try:
            while True:
                number, packed = self._pipe.recv()
                with self._lock:
                    future = self._calls.pop(number)
                try:
                    result, error = _unpacked(packed, "the result of a call")
                except RuntimeError as problem:
                    result, error = None, problem
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            pass
        finally:
            with self._sending:
                self._pipe.close()
            self._fail(list(self._calls))

    def _fail(self, numbers: Iterable[int]) -> None:
        """Fail those calls that are pending."""
        with self._lock:
            found = [self._calls.pop(number, None) for number in numbers]
        for future in found:
            if future is not None:
                future.set_exception(WorkerDied("RolloutCluster: the worker's process has ended"))

    def close(self) -> None:
        """End the process; what runs in it is lost."""
        self.process.terminate()
        self.process.join()
        self._reader.join()


def _serve(make: bytes, pipe: Any) -> None:
    """A worker's process: until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: our parent says what it means
    lock = threading.Lock()

    def reply(number: int, result: object, error: Exception | None) -> None:
        if error is not None:
            error = _portable(error)
        try:
            packed = _packed((result, error))
        except Exception as problem:
            packed = _packed((None, RuntimeError(f"RolloutCluster: no result: {problem}")))
        with lock:
            try:
                pipe.send((number, packed))
            except OSError:
                os._exit(0)  # the parent has ended

    def ended(number: int, future: Future[Any]) -> None:
        error: Any = future.exception()
        reply(number, future.result() if error is None else None, error)

    worker: LocalWorker | None
    try:
        worker = LocalWorker(make)
    except Exception as error:
        worker, failure = None, error
    while True:
        try:
            number, method, packed = pipe.recv()
        except (EOFError, OSError):  # OSError: the parent has ended with results unread
            os._exit(0)
        if worker is None:  # every call says why
            reply(number, None, failure)
            continue
        try:
            arguments = _unpacked(packed, f"an argument of {method}, in the worker's process,")
        except RuntimeError as error:
            reply(number, None, error)
            continue
        worker.call(method, *arguments).add_done_callback(partial(ended, number))
        del packed, arguments  # weights, say


class RayWorker:
    """A Ray actor; `ray.init` was called. options: of the actor, {"num_gpus": 1} for example."""

    def __init__(self, make: Callable[[], Runtime], **options: Any) -> None:
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                "RayWorker: ray is not installed: pip install 'vtts_rt[ray]'"
            ) from error
        self._ray = ray
        # As the pools of a LocalWorker; those that are in no group have threads of their own.
        groups = {"rollouts": _MAX_GROUPS, "abort": 1}
        actor = ray.remote(concurrency_groups=groups)(RolloutHost)
        actor = actor.options(max_concurrency=_MAX_OTHERS, **options)
        self._actor = actor.remote(pickle.dumps(make))  # ray's own pickles methods by value

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future = _begun()
        remote = getattr(self._actor, method)
        if method in ("rollouts", "abort"):
            remote = remote.options(concurrency_group=method)
        reply = remote.remote(*arguments).future()

        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            elif isinstance(error, self._ray.exceptions.RayActorError):
                future.set_exception(WorkerDied(f"RolloutCluster: {error}"))
            else:
                # Ray's own class holds the error of the method.
                future.set_exception(getattr(error, "cause", None) or error)

        reply.add_done_callback(ended)
        return future

    def close(self) -> None:
        self._ray.kill(self._actor)
