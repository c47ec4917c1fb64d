"""Ahead: order, bounds, errors, and an end without leftovers."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.data.ahead import Ahead, Stopped, Ticket


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.none() | st.integers(0, 30), max_size=30),
    num_threads=st.integers(1, 4),
    max_jobs=st.integers(1, 6),
    max_bytes=st.integers(1, 50),
)
def test_results_come_in_order_within_bounds(
    sizes: list[int | None], num_threads: int, max_jobs: int, max_bytes: int
) -> None:
    """A job without a size fails before it asks for room."""
    made = threading.Event()

    def work(job: int, ticket: Ticket) -> int:
        made.wait()
        if (num_bytes := sizes[job]) is None:
            raise KeyError(job)
        ticket.reserve(num_bytes)
        with ahead._changed:
            assert ahead._held[job] == num_bytes
            filled = [size for size in ahead._held.values() if size]
            assert sum(filled) <= max_bytes or len(filled) == 1
            assert len(ahead._queue) <= max_jobs
        return job

    ahead = Ahead(
        iter(range(len(sizes))), work, num_threads=num_threads, max_jobs=max_jobs,
        max_bytes=max_bytes,
    )  # fmt: skip
    made.set()
    for job, num_bytes in enumerate(sizes):
        if num_bytes is None:
            with pytest.raises(KeyError, match=str(job)):
                next(ahead)
        else:
            assert next(ahead) == (job, job)
    assert next(ahead, None) is None
    assert ahead.close() == [] and not ahead._held


def test_two_threads_work_at_once() -> None:
    together = threading.Barrier(2, timeout=30)
    ahead = Ahead(
        iter(range(2)), lambda job, _: (together.wait(), job)[1], num_threads=2, max_jobs=2,
        max_bytes=1,
    )  # fmt: skip
    assert [result for _, result in ahead] == [0, 1]
    ahead.close()


def test_nothing_is_begun_beyond_what_may_wait() -> None:
    begun = threading.Semaphore(0)
    ahead = Ahead(
        iter(range(100)), lambda job, _: (begun.release(), job)[1], num_threads=4, max_jobs=3,
        max_bytes=1,
    )  # fmt: skip
    assert all(begun.acquire(timeout=30) for _ in range(3))
    assert not begun.acquire(timeout=0.1)
    assert next(ahead) == (0, 0)
    assert begun.acquire(timeout=30)
    assert not begun.acquire(timeout=0.1)
    assert ahead.close() == [1, 2, 3]
    assert not begun.acquire(blocking=False)


def test_an_error_is_raised_in_its_turn() -> None:
    def work(job: int, ticket: Ticket) -> int:
        if job == 1:
            raise KeyError("one")
        return job

    ahead = Ahead(iter(range(3)), work, num_threads=3, max_jobs=3, max_bytes=1)
    assert next(ahead) == (0, 0)
    with pytest.raises(KeyError, match="one"):
        next(ahead)
    ahead.close()


def test_closing_ends_threads_that_wait_for_room() -> None:
    waiting = threading.Semaphore(0)
    stopped: list[int] = []

    def work(job: int, ticket: Ticket) -> int:
        waiting.release()
        try:
            ticket.reserve(10)
        except Stopped:
            stopped.append(job)
            raise
        return job

    before = threading.active_count()
    ahead = Ahead(iter(range(9)), work, num_threads=3, max_jobs=9, max_bytes=10)
    assert all(waiting.acquire(timeout=30) for _ in range(4))  # one done, three wait
    assert ahead.close() == [0]
    assert sorted(stopped) == [1, 2, 3]
    assert threading.active_count() == before


def test_a_job_that_fails_before_it_reserves_blocks_no_other() -> None:
    failed = threading.Event()

    def work(job: int, ticket: Ticket) -> int:
        if job == 0:
            failed.set()
            raise KeyError("zero")
        assert failed.wait(timeout=30)
        ticket.reserve(1)
        return job

    ahead = Ahead(iter(range(3)), work, num_threads=2, max_jobs=3, max_bytes=1)
    with pytest.raises(KeyError, match="zero"):
        next(ahead)
    assert [result for _, result in ahead] == [1, 2]
    ahead.close()


def test_the_end_of_the_main_thread_is_no_end_of_the_jobs() -> None:
    sized = threading.Event()

    def work(job: int, ticket: Ticket) -> int:
        ticket.reserve(10)
        sized.set()
        return job

    ahead = Ahead(iter(range(9)), work, num_threads=1, max_jobs=3, max_bytes=10)
    assert sized.wait(timeout=30)
    ahead._stop()  # job 1 waits for room, job 2 for the thread
    assert next(ahead) == (0, 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ended"):
            next(ahead)
    assert ahead.close() == [] and next(ahead, None) is None
