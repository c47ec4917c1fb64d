"""Fetching ahead in any order: right pixels, right counts, and no wait without an end."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prefetch_tools import (
    FRAME_BYTES,
    NUM_FRAMES,
    PATIENCE_SECONDS,
    FaultySource,
    by_hand,
    pixels,
)

from vtts_rt.video import FrameStore, StoreProvider
from vtts_rt.video.prefetch import PrefetchQueue

REQUESTS = st.integers(0, 2)
VIDEOS = st.integers(0, 1)
INDICES = st.lists(st.integers(0, NUM_FRAMES - 1), max_size=12)


class Interleavings(RuleBasedStateMachine):
    """Three requests over the same two videos; what should be counted is told from what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.store = by_hand(FrameStore(10 * FRAME_BYTES), most_guessed=7)
        self.reads: list[list[int]] = [[], []]
        self.broken: list[set[int]] = [set(), set()]
        self.requests = [self.opened() for _ in range(3)]
        self.unproven: dict[tuple[int, int], set[int]] = {}
        self.expected = dict.fromkeys(self.store.ahead.stats(), 0)

    def opened(self) -> tuple[StoreProvider, list[FaultySource]]:
        sources = [FaultySource(v, self.reads[v], self.broken[v]) for v in range(2)]
        return self.store.provider(sources), sources

    def waiting(self) -> set[tuple[int, int, int]]:
        """(request, video, frame) of all that is on its way."""
        return {
            (r, v, i)
            for r, (provider, _) in enumerate(self.requests)
            for v in range(2)
            for i in range(NUM_FRAMES)
            if not provider.ready(v, [i])
        }

    def stored(self, video: int) -> set[int]:
        meta = self.requests[0][1][video].metadata
        keys = (meta.video_id, meta.decoder)
        return {i for i in range(NUM_FRAMES) if self.store._holds((*keys, i))}

    def guesses_of(self, request: int, video: int) -> set[int]:
        return self.unproven.setdefault((request, video), set())

    def ask_for(self, request: int, video: int, indices: Collection[int]) -> None:
        used = self.guesses_of(request, video) & set(indices)
        late = sum((request, video, i) in self.waiting() for i in used)
        self.unproven[request, video] -= used
        self.expected["frames_guessed_used"] += len(used)
        self.expected["frames_guessed_late"] += late

    @rule(request=REQUESTS, video=VIDEOS, indices=INDICES)
    def prefetch(self, request: int, video: int, indices: list[int]) -> None:
        before = self.waiting()
        self.ask_for(request, video, indices)
        self.requests[request][0].prefetch(video, indices)
        absent = set(sorted(set(indices))[:10]) - self.stored(video)
        assert self.waiting() == before | {(request, video, i) for i in absent}

    @rule(request=REQUESTS, video=VIDEOS, indices=INDICES)
    def guess(self, request: int, video: int, indices: list[int]) -> None:
        before = self.waiting()
        named = set(sorted(set(indices))[:10]) - self.stored(video)
        unproven = self.guesses_of(request, video)
        cancelled = {
            (r, v, i)
            for r, v, i in before
            if (r, v) == (request, video) and i in unproven - set(indices)
        }
        new = {i for i in named if (request, video, i) not in before}
        self.requests[request][0].guess(video, indices)
        self.expected["frames_cancelled"] += len(cancelled)
        self.expected["frames_guessed"] += len(new - unproven)
        unproven |= new
        dropped = (before - cancelled | {(request, video, i) for i in new}) - self.waiting()
        self.expected["frames_dropped"] += len(dropped)
        for r, v, i in cancelled | dropped:
            self.unproven[r, v].remove(i)  # nothing but a guess is ever dropped

    @rule(request=REQUESTS, video=VIDEOS, kept=INDICES)
    def settle(self, request: int, video: int, kept: list[int]) -> None:
        gone = {
            (r, v, i)
            for r, v, i in self.waiting()
            if r == request and (v != video or i not in kept)
        }
        self.requests[request][0].keep_guesses({video: kept})
        self.give_up(gone)

    def give_up(self, gone: set[tuple[int, int, int]]) -> None:
        self.expected["frames_cancelled"] += len(gone)
        for r, v, i in gone:
            self.guesses_of(r, v).discard(i)
        assert not gone & self.waiting()

    @rule(request=REQUESTS)
    def end(self, request: int) -> None:
        gone = {(r, v, i) for r, v, i in self.waiting() if r == request}
        provider, sources = self.requests[request]
        for source in sources:
            source.close()
        provider.cancel()
        self.give_up(gone)
        self.requests[request] = self.opened()
        for video in range(2):
            self.unproven[request, video] = set()

    @rule(request=REQUESTS, video=VIDEOS, indices=INDICES)
    def ask(self, request: int, video: int, indices: list[int]) -> None:
        self.ask_for(request, video, indices)
        missing = set(indices) - self.stored(video)
        provider = self.requests[request][0]
        if missing & self.broken[video]:
            with pytest.raises(RuntimeError, match="no such frame"):
                provider.frames(video, indices)
            return
        for i, frame in zip(indices, provider.frames(video, indices), strict=True):
            np.testing.assert_array_equal(frame, pixels(video)[i])
        assert provider.ready(video, indices)

    @rule(video=VIDEOS, index=st.integers(0, NUM_FRAMES - 1))
    def damage_or_mend(self, video: int, index: int) -> None:
        self.broken[video] ^= {index}

    @rule()
    def forget(self) -> None:
        self.store.clear()

    @rule()
    def serve(self) -> None:
        before = self.waiting()
        assert self.store.ahead.serve() == bool(before)
        assert self.waiting() < before or not before

    @rule()
    def serve_all(self) -> None:
        while self.store.ahead.serve():
            pass
        assert self.waiting() == set()

    @invariant()
    def books_balance(self) -> None:
        self.store.check_integrity()
        assert self.store.ahead.stats() == self.expected
        assert self.store.frames_decoded == sum(map(len, self.reads))


Interleavings.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestInterleavings = Interleavings.TestCase


@pytest.mark.parametrize("seed", range(6))
def test_threads_in_any_order_end_and_see_right_pixels(seed: int) -> None:
    plan = random.Random(seed)
    budget = plan.choice((0, 3, 12, 10**4)) * FRAME_BYTES
    store = FrameStore(budget)
    store.ahead = PrefetchQueue(store._fetch, budget // 2, num_workers=plan.choice((1, 2, 4)))
    reads: list[list[int]] = [[], []]
    broken = [set(plan.sample(range(NUM_FRAMES), 2)) if seed % 2 else set[int]() for _ in range(2)]
    wrong: list[object] = []

    def ask(name: int) -> None:
        rng = random.Random(100 * seed + name)
        for _ in range(12):
            sources = [FaultySource(v, reads[v], broken[v]) for v in range(2)]
            request = store.provider(sources)
            for _ in range(rng.randint(1, 8)):
                video = rng.randint(0, 1)
                indices = rng.sample(range(NUM_FRAMES), rng.randint(1, 10))
                action = rng.choice(("guess", "guess", "prefetch", "keep", "ask", "ask"))
                if action == "guess":
                    request.guess(video, indices)
                elif action == "prefetch":
                    request.prefetch(video, indices)
                elif action == "keep":
                    request.keep_guesses({video: indices})
                else:
                    check(request, video, indices)
            request.cancel()
            for source in sources:
                source.close()

    def check(request: StoreProvider, video: int, indices: list[int]) -> None:
        try:
            frames = request.frames(video, indices)
        except RuntimeError as error:
            if not broken[video] & set(indices):
                wrong.append(error)
            return
        for i, frame in zip(indices, frames, strict=True):
            if not np.array_equal(frame, pixels(video)[i]):
                wrong.append((video, i))

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a wait without an end"
    assert wrong == []
    store.check_integrity()
    counts = store.stats()
    assert counts["frames_decoded"] == sum(map(len, reads))
    if budget >= 2 * NUM_FRAMES * FRAME_BYTES and not seed % 2:  # nothing evicted, nothing broken
        assert all(len(set(found)) == len(found) for found in reads), "decoded twice"
    store.close()
    assert len(store) == 0 and not any(thread.is_alive() for thread in store.ahead._pool._threads)
