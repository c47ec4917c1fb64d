"""Ahead: results of jobs in their order, made ahead by threads, within a number and in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from vtts_rt import process

Job = TypeVar("Job")
Result = TypeVar("Result")


class Stopped(Exception):
    """The consumer has left: give up the job."""


class Ticket:
    """What a running job asks of its `Ahead`."""

    def __init__(self, ahead: Ahead[Any, Any], number: int) -> None:
        self._ahead, self._number = ahead, number

    def reserve(self, num_bytes: int) -> None:
        """Wait for room for the result, once and before it is made. Raises Stopped."""
        self._ahead._reserve(self._number, num_bytes)

    def check(self) -> None:
        """Raises Stopped once the consumer has left."""
        if self._ahead._stopped:
            raise Stopped


class Ahead(Generic[Job, Result]):
    """The results of `work` for every job, in the order of the jobs; one consumer.

    work: called with a job and its Ticket on one of `num_threads` threads. Its exception is raised
    to the consumer when it is that job's turn; RuntimeError once the main thread has ended.
    max_jobs: most jobs running or waiting for the consumer. max_bytes: most bytes reserved by them;
    a job that alone needs more waits until no other holds any. Room is given in the order of the
    jobs, so the one that the consumer waits for is never behind a later one; a job that has ended
    waits for none. A result no longer counts once the consumer has it.
    """

    def __init__(
        self,
        jobs: Iterator[Job],
        work: Callable[[Job, Ticket], Result],
        *,
        num_threads: int,
        max_jobs: int,
        max_bytes: int,
    ) -> None:
        self._jobs = enumerate(jobs)
        self._work = work
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ahead")
        self._queue: deque[tuple[int, Job, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._unsized: set[int] = set()  # jobs that may still reserve
        self._held: dict[int, int] = {}  # job -> bytes
        process.before_exit(self, Ahead._stop)
        for _ in range(max_jobs):
            self._submit()

    def __iter__(self) -> Iterator[tuple[Job, Result]]:
        return self

    def __next__(self) -> tuple[Job, Result]:
        if not self._queue:
            raise StopIteration
        number, job, future = self._queue[0]
        try:
            stopped = isinstance(future.exception(), Stopped)
        except CancelledError:
            stopped = True
        if stopped:
            raise RuntimeError("nothing is read ahead any more: closed, or the main thread ended")
        self._queue.popleft()
        with self._changed:
            self._held.pop(number, None)
            self._changed.notify_all()
        self._submit()
        return job, future.result()

    def close(self) -> list[Result]:
        """Ends the threads, at once or after the step they are in; the results not taken."""
        self._stop()
        done = [future for *_, future in self._queue if not future.cancelled()]
        self._queue.clear()
        self._held.clear()
        return [future.result() for future in done if future.exception() is None]

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        for number, job in self._jobs:
            future: Future[Result] = Future()
            with self._changed:
                if self._stopped:
                    future.cancel()
                else:
                    self._unsized.add(number)
                    future = self._pool.submit(self._run, number, job)
            self._queue.append((number, job, future))
            return

    def _run(self, number: int, job: Job) -> Result:
        try:
            return self._work(job, Ticket(self, number))
        finally:
            with self._changed:
                self._unsized.discard(number)
                self._changed.notify_all()

    def _reserve(self, number: int, num_bytes: int) -> None:
        def has_room() -> bool:
            held = sum(self._held.values())
            return number == min(self._unsized) and (
                held == 0 or held + num_bytes <= self._max_bytes
            )

        with self._changed:
            self._changed.wait_for(lambda: self._stopped or has_room())
            if self._stopped:
                raise Stopped
            self._unsized.remove(number)
            self._held[number] = num_bytes
            self._changed.notify_all()
