"""Requests that share a store: what is fetched ahead for one, and what that does to others."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from prefetch_tools import (
    FRAME_BYTES,
    NUM_FRAMES,
    PATIENCE_SECONDS,
    FaultySource,
    by_hand,
    pixels,
)

from vtts_rt.video import FrameStore


def test_what_one_gives_up_another_still_gets_and_once() -> None:
    store, reads = by_hand(FrameStore(10**6)), list[int]()
    sources = [FaultySource(0, reads) for _ in range(3)]
    a, b, c = (store.provider([source]) for source in sources)
    for provider in (a, b, c):
        provider.guess(0, [1, 2, 3])
    a.cancel()
    sources[0].close()
    assert a.ready(0, [1]) and not b.ready(0, [1])
    assert store.ahead.serve() and not store.ahead.serve()  # c's frames are b's too
    assert sorted(reads) == [1, 2, 3] and b.ready(0, [1, 2, 3])
    for provider in (b, c):
        np.testing.assert_array_equal(provider.frames(0, [2])[0], pixels(0)[2])
    assert sorted(reads) == [1, 2, 3]
    counts = store.stats()
    assert counts["frames_cancelled"] == 3 and counts["frames_guessed"] == 9
    assert counts["frames_guessed_used"] == 2 and counts["frames_guessed_late"] == 0
    # One of them had it decoded, for the other it was there.
    assert sorted(p.take_counts()[:3] for p in (b, c)) == [(0, 0, 1), (3, 0, 0)]


def test_a_frame_that_comes_while_it_is_guessed_again_is_not_cancelled() -> None:
    store = by_hand(FrameStore(10**6))
    a, b = (store.provider([FaultySource(0, [])]) for _ in range(2))
    for provider in (b, a):  # the newest is served first
        provider.guess(0, [1, 2, 3])
    arrived = store.ahead.arrived

    def late(video: tuple[str, str], indices: Collection[int]) -> None:
        if 2 in indices:  # it is stored, and no request knows
            b.guess(0, [2, 4])
        arrived(video, indices)

    store.ahead.arrived = late  # type: ignore[method-assign]
    assert store.ahead.serve()
    assert store.ahead.frames_cancelled == 1  # frame 3, which b names no more
    b.frames(0, [2, 3])
    assert store.ahead.frames_guessed_used == 1 and store.ahead.frames_guessed == 3 + 4
    store.check_integrity()


def test_a_frame_is_ready_and_counted_before_the_rest_of_its_batch() -> None:
    store = by_hand(FrameStore(10**6))
    a, b = (store.provider([FaultySource(0, [])]) for _ in range(2))
    for provider in (b, a):
        provider.prefetch(0, [1, 2])
    ready: list[tuple[bool, bool]] = []
    decoded: list[int] = []
    arrived = store.ahead.arrived

    def noted(video: tuple[str, str], indices: Collection[int]) -> None:
        arrived(video, indices)
        ready.extend((p.ready(0, [1]), p.ready(0, [2])) for p in (a, b))
        decoded.append(sum(p.take_counts().frames_decoded for p in (a, b)))

    store.ahead.arrived = noted  # type: ignore[method-assign]
    assert store.ahead.serve() and not store.ahead.serve()
    assert ready == [(True, False)] * 2 + [(True, True)] * 2 and decoded == [1, 1]


def test_a_closed_source_costs_only_its_own_request() -> None:
    store, reads = by_hand(FrameStore(10**6)), list[int]()
    sources = [FaultySource(0, reads) for _ in range(2)]
    a, b = (store.provider([source]) for source in sources)
    a.prefetch(0, [1, 2])
    b.prefetch(0, [1, 2])
    sources[0].close()
    assert store.ahead.serve() and reads == [] and not b.ready(0, [1])
    assert store.ahead.serve() and sorted(reads) == [1, 2] and b.ready(0, [1])
    with pytest.raises(RuntimeError, match="no such frame"):
        a.frames(0, [3])


def test_a_cancelled_frame_is_decoded_when_it_is_asked_for() -> None:
    store, reads = by_hand(FrameStore(10**6)), list[int]()
    provider = store.provider([FaultySource(0, reads)])
    later = provider.fresh()
    later.guess(0, [1, 2, 3])
    later.keep_guesses({0: [3]})
    assert later.ready(0, [1, 2]) and not later.ready(0, [3])
    later.prefetch(0, [1, 3])
    assert not later.ready(0, [1]) and reads == []
    np.testing.assert_array_equal(later.frames(0, [1, 2])[1], pixels(0)[2])
    assert sorted(reads) == [1, 2] and later.ready(0, [1, 2])
    assert store.ahead.serve() and sorted(reads) == [1, 2, 3]
    counts = later.take_counts()
    assert (counts.frames_guessed, counts.frames_guessed_used) == (3, 1)
    assert (counts.frames_decoded, counts.frames_reused) == (3, 0)
    later.prefetch(0, [7])
    provider.guess(0, [8])
    provider.cancel()  # of all rounds
    assert later.ready(0, [7]) and provider.ready(0, [8]) and not store.ahead.serve()
    assert store.stats()["frames_cancelled"] == 2 + 2


def test_by_products_end_the_wait_for_them() -> None:
    store, reads = by_hand(FrameStore(10**6)), list[int]()
    a, b = (store.provider([FaultySource(0, reads)]) for _ in range(2))
    b.guess(0, [4])
    a.passing(0, [4])
    a.frames(0, [6])
    assert sorted(reads) == [4, 6] and b.ready(0, [4]) and not store.ahead.serve()
    store.check_integrity()


def test_guesses_wait_for_a_quarter_of_the_budgets_and_fit_the_store() -> None:
    store = FrameStore(8 * FRAME_BYTES, 4 * FRAME_BYTES)
    provider = store.provider([FaultySource(0, [])])
    store.ahead._num_workers = 0  # no thread takes anything meanwhile
    provider.guess(0, range(NUM_FRAMES))
    assert store.ahead.frames_guessed == 8 and store.ahead.frames_dropped == 5
    store.close()


def test_a_store_left_open_is_dropped_with_its_frames_and_threads() -> None:
    store, reads = FrameStore(10**6), list[int]()
    provider = store.provider([FaultySource(0, reads)])
    provider.prefetch(0, range(NUM_FRAMES))
    while not provider.ready(0, range(NUM_FRAMES)) or store.ahead._working:
        assert not threading.Event().wait(0.001)
    assert sorted(reads) == [*range(NUM_FRAMES)]
    provider.guess(0, [1])  # there already: no thread starts for it
    assert store.ahead._working == 0
    (worker,) = store.ahead._pool._threads
    dropped = weakref.ref(store)
    del store, provider
    gc.collect()
    worker.join(PATIENCE_SECONDS)
    assert dropped() is None and not worker.is_alive()


def test_a_thread_that_cannot_start_leaves_frames_to_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store = FrameStore(10**6)
    provider = store.provider([FaultySource(0, [])])
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            provider.prefetch(0, [1, 2])
    np.testing.assert_array_equal(provider.frames(0, [1])[0], pixels(0)[1])
    assert provider.ready(0, [1])
    provider.prefetch(0, [3])  # the next one starts, and serves what was left
    store.close()


def test_a_source_that_leaves_a_frame_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: FaultySource, indices: Sequence[int], passing: object) -> Any:
        return iter([(i, pixels(0)[i].copy()) for i in indices if i != 2])

    monkeypatch.setattr(FaultySource, "read", forgetful)
    store = by_hand(FrameStore(10**6))
    provider = store.provider([FaultySource(0, [])])
    with pytest.raises(AssertionError, match="2"):
        provider.frames(0, [1, 2, 3])
    np.testing.assert_array_equal(provider.frames(0, [3])[0], pixels(0)[3])
    store.check_integrity()
