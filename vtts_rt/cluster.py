"""RolloutCluster: rollout groups on several runtimes, each in a process of its own.

Groups of one video go to one worker, so that its caches hold what they share. A worker that dies
gives its unfinished groups to the others: a group is given out once, whole, by one worker.

The transport is a `Worker` of `vtts_rt.workers`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from vtts_rt.checks import is_whole
from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.sequence import Completion
from vtts_rt.engine.shared_weights import WeightHandles
from vtts_rt.rounds.ask import Ask, Perception
from vtts_rt.rounds.rollouts import RolloutGroup
from vtts_rt.types import SamplingParams, require
from vtts_rt.workers import Worker, WorkerDied

logger = logging.getLogger(__name__)


class RolloutCluster:
    """Samples groups on several workers, as a Runtime does on its own: a `RolloutEngine` takes it.

    A context manager; closing it ends the workers. Whatever is public is for one event loop and
    any threads beside it. bucket_bytes: of tensors that go to the workers at a time; handles of
    `export_weights` go whole. groups_moved: that began anew because their worker died.
    Every call raises WorkerDied once no worker is left.
    """

    def __init__(self, workers: Iterable[Worker], *, bucket_bytes: int = 256 << 20) -> None:
        self._workers = dict(enumerate(workers))  # that are alive
        self._unclosed = list(self._workers.values())
        num = len(self._workers)
        require("RolloutCluster", "workers", num, num >= 1, "at least one")
        ok = is_whole(bucket_bytes) and bucket_bytes >= 1
        require("RolloutCluster", "bucket_bytes", bucket_bytes, ok, "a whole number >= 1")
        self._bucket_bytes = bucket_bytes
        self._load = dict.fromkeys(self._workers, 0)  # groups in work
        self._numbers = itertools.count()
        self.groups_moved = 0
        self._lock = threading.Lock()

    @property
    def num_workers(self) -> int:
        """That are alive."""
        return len(self._workers)

    async def rollouts_async(
        self, ask: Ask, num_answers: int, *, group_id: str = ""
    ) -> RolloutGroup:
        """As `Runtime.rollouts_async`. Its videos are opened by the worker: files, bytes or arrays,
        not open ones. Where a worker dies the group begins anew on another."""
        key = _video_key(ask)
        while True:
            number, worker = self._chosen(key)
            call = next(self._numbers)
            try:
                future = worker.call("rollouts", call, ask, num_answers, group_id)
                members = await asyncio.wrap_future(future)
                return RolloutGroup(group_id, ask, members)
            except asyncio.CancelledError:
                if not future.done():
                    worker.call("abort", call)
                raise
            except WorkerDied:
                self._lost(number)
                self.groups_moved += 1
                logger.warning("group %s begins anew: its worker has died", group_id)
            finally:
                with self._lock:
                    self._load[number] -= 1

    def _chosen(self, key: bytes) -> tuple[int, Worker]:
        """The worker that a video belongs to, unless it has much more to do than the others.

        By the largest hash of video and worker: where one dies only its videos move.
        """
        with self._lock:
            if not self._workers:
                raise WorkerDied("RolloutCluster: no worker is left")
            most = 2 + 2 * sum(self._load[n] for n in self._workers) // len(self._workers)
            ordered = sorted(
                self._workers, key=lambda n: hashlib.blake2b(b"%b%d" % (key, n)).digest()
            )
            number = next((n for n in ordered if self._load[n] < most), ordered[0])
            self._load[number] += 1
            return number, self._workers[number]

    def _lost(self, number: int) -> None:
        with self._lock:
            if self._workers.pop(number, None) is not None:
                logger.warning("worker %d has died, %d are left", number, len(self._workers))

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """The results of a method on every worker that lives; the first error is raised once all
        have ended."""
        calls = [(n, w.call(method, *arguments)) for n, w in list(self._workers.items())]
        results, errors = [], []
        for number, future in calls:
            try:
                results.append(future.result())
            except WorkerDied:
                self._lost(number)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        if not results:
            raise WorkerDied("RolloutCluster: no worker is left")
        return results

    def update_weights(self, tensors: Mapping[str, Tensor], *, finish: bool = True) -> None:
        """As `Runtime.update_weights`, in buckets to all workers; each applies them at once when
        all have all, after its groups in work. Where one refuses, none applies anything; but
        handles, of which no worker keeps a copy, each takes or refuses by itself."""
        if isinstance(tensors, WeightHandles):
            self._all("update_weights", tensors, finish)
            return
        try:
            for bucket in _buckets(tensors, self._bucket_bytes):
                self._all("update_weights", bucket, False)
        except Exception:
            self.discard_staged_weights()
            raise
        if finish:
            versions = self._all("update_weights", {}, True)
            assert len(set(versions)) == 1, versions

    def discard_staged_weights(self) -> None:
        """Drop what `update_weights(..., finish=False)` has kept."""
        self._all("discard_staged_weights")

    def perception(self, perception: Perception | None = None) -> ResolvedPerception:
        """As `Runtime.perception`, of the model that all workers hold."""
        found: ResolvedPerception = self._all("perception", perception)[0]
        return found

    def weights_hash(self) -> str:
        """As `VideoLM.weights_hash`, of the model that all workers hold."""
        found: str = self._all("weights_hash")[0]
        return found

    def sleep(self) -> None:
        """As `Runtime.sleep`, on every worker."""
        self._all("sleep")

    def wake(self) -> None:
        """As `Runtime.wake`, on every worker."""
        self._all("wake")

    def stats(self) -> list[Mapping[str, Mapping[str, int]]]:
        """Of every worker that lives, as `Runtime.stats`."""
        return self._all("stats")

    def generate(self, prompt: str, sampling: SamplingParams) -> list[Completion]:
        """What every worker that lives says, as `Runtime.generate`."""
        return self._all("generate", prompt, sampling)

    def close(self) -> None:
        """End the workers, those that have died too; may be called again."""
        with self._lock:
            workers, self._unclosed, self._workers = self._unclosed, [], {}
        with ExitStack() as stack:
            for worker in workers:
                stack.callback(worker.close)

    def __enter__(self) -> RolloutCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _buckets(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in pieces of at most `most` bytes; a larger one goes alone."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if bucket and size + tensor.nbytes > most:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.detach()
        size += tensor.nbytes
    yield bucket


def _video_key(ask: Ask) -> bytes:
    """What decides where an Ask goes: its videos, by path or content."""
    digest = hashlib.blake2b(digest_size=16)
    for video, _ in ask.timed_videos:
        if isinstance(video, str | os.PathLike):
            digest.update(os.path.realpath(video).encode(errors="surrogateescape"))
        else:
            content: Any = video
            data = content.tobytes() if hasattr(content, "tobytes") else content
            ok = isinstance(data, bytes)
            require("RolloutCluster", "video", video, ok, "a path, bytes or an array")
            digest.update(data)
    return digest.digest()
