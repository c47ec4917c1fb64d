"""Ahead: threads that work ahead of their consumer, in order, within a number and in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

from vtts_rt import process

Job = TypeVar("Job")
Result = TypeVar("Result")


class Stopped(Exception):
    """The consumer has gone: give up what is in work."""


class Ticket:
    """What a job in work asks of its `Ahead`."""

    def __init__(self, reserve: Callable[[int], None], check: Callable[[], None]) -> None:
        self.reserve = reserve
        self.check = check


class Ahead(Generic[Job, Result]):
    """The results of `work` for every job, in the order of the jobs.

    jobs: taken one by one, under a lock. work: called with a job and a Ticket on one of
    `num_threads` threads. It says how many bytes the result will hold (`ticket.reserve`, once)
    before it makes them, and may ask whether to go on (`ticket.check`); both raise Stopped. An
    exception of `work` is raised to the consumer when it is that job's turn.
    max_jobs: most jobs in work or waiting for the consumer. max_bytes: most bytes reserved by
    them; a job that alone needs more waits until nothing else is held. Room is given in the
    order of the jobs, so the one that the consumer waits for is never behind a later one.
    A result belongs to the consumer, and no longer counts, once it is handed over.
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
        self._jobs = jobs
        self._work = work
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._num_begun = 0
        self._num_admitted = 0  # jobs 0 .. this-1 have their room
        self._num_taken = 0
        self._ended = False  # no job is left
        self._stopped = False
        self._held: dict[int, int] = {}  # job -> bytes
        self._done: dict[int, tuple[Job, Result | None, BaseException | None]] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"ahead-{n}", daemon=True)
            for n in range(min(num_threads, max_jobs))
        ]
        for thread in self._threads:
            thread.start()
        process.at_exit(self, Ahead.close)

    def __iter__(self) -> Iterator[tuple[Job, Result]]:
        return self

    def __next__(self) -> tuple[Job, Result]:
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._num_taken in self._done
                    or (self._ended and self._num_taken == self._num_begun)
                )
            )
            if self._num_taken not in self._done:
                raise StopIteration
            job, result, error = self._done.pop(self._num_taken)
            self._held.pop(self._num_taken, None)
            self._num_taken += 1
            self._changed.notify_all()
        if error is not None:
            raise error
        assert result is not None
        return job, result

    def close(self) -> list[Result]:
        """Ends the threads, at once or after the step they are in; results nobody has taken."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        left = [result for _, result, _ in self._done.values() if result is not None]
        self._done.clear()
        self._held.clear()
        return left

    def _run(self) -> None:
        while (begun := self._begin()) is not None:
            number, job = begun
            result: Result | None = None
            failure: BaseException | None = None
            try:
                result = self._work(job, Ticket(partial(self._reserve, number), self._check))
                self._reserve(number, 0)  # for a job that has not asked
            except Stopped:
                return
            except BaseException as error:
                failure = error
            with self._changed:
                self._done[number] = (job, result, failure)
                self._changed.notify_all()
            del begun, job, result, failure  # the consumer's, while this thread waits

    def _begin(self) -> tuple[int, Job] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or self._ended
                    or self._num_begun - self._num_taken < self._max_jobs
                )
            )
            if self._stopped or self._ended:
                return None
            for job in self._jobs:
                self._num_begun += 1
                return self._num_begun - 1, job
            self._ended = True
            self._changed.notify_all()
            return None

    def _reserve(self, number: int, num_bytes: int) -> None:
        def has_room() -> bool:
            held = sum(self._held.values())
            return number == self._num_admitted and (
                held == 0 or held + num_bytes <= self._max_bytes
            )

        with self._changed:
            if number < self._num_admitted:
                return
            self._changed.wait_for(lambda: self._stopped or has_room())
            self._check()
            self._held[number] = num_bytes
            self._num_admitted += 1
            self._changed.notify_all()

    def _check(self) -> None:
        if self._stopped:
            raise Stopped
