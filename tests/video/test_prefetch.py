"""PrefetchQueue: who goes first, who gives way, who is counted; and nothing waits for ever."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vtts_rt.video import FrameStore, StoreProvider
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.prefetch import PREFETCH_BATCH, PrefetchQueue, Wanted

NUM_FRAMES = 24
FRAME_BYTES = 2 * 3 * 3
PATIENCE_SECONDS = 30


def pixels(video: int) -> np.ndarray:
    return np.random.default_rng(video).integers(0, 256, (NUM_FRAMES, 2, 3, 3), np.uint8)


class FaultySource(ArraySource):
    """24 frames; some of them cannot be read, none once it is closed. reads: what was, shared by
    the sources of one video."""

    def __init__(self, video: int, reads: list[int], broken: Collection[int] = ()) -> None:
        super().__init__(pixels(video), source_fps=2.0)
        self.reads, self.broken, self.closed = reads, broken, False

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        passed = [i for i in passing if i < max(frame_indices, default=0)]
        for i, frame in super().read([*frame_indices, *passed]):
            if self.closed or i in self.broken:
                raise RuntimeError("no such frame")
            self.reads.append(i)
            yield i, frame

    def close(self) -> None:
        self.closed = True


class Log:
    """A queue without threads, and the batches that it decoded."""

    def __init__(self, most_guessed: int = NUM_FRAMES) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.names: dict[Wanted, int] = {}
        self.queue = PrefetchQueue(self.decode, most_guessed * FRAME_BYTES, num_workers=0)

    def decode(self, wanted: Wanted, indices: list[int]) -> None:
        self.batches.append((self.names[wanted], indices))
        self.queue.arrived(wanted.video, indices)

    def wanted(self, name: int, video: int | None = None) -> Wanted:
        source = FaultySource(name if video is None else video, [])
        found = Wanted(source, lambda *_: None)
        self.names[found] = name
        return found

    def serve_all(self) -> list[tuple[int, list[int]]]:
        while self.queue.serve():
            self.queue.check_integrity()
        batches, self.batches = self.batches, []
        return batches


# -- order and bounds -------------------------------------------------------------------------


def test_needed_frames_go_first_and_in_turn_then_the_newest_guess() -> None:
    log = Log()
    a, b, c, d = (log.wanted(i) for i in range(4))
    log.queue.guess(c, [1, 2])
    log.queue.guess(d, [3])
    log.queue.need(a, [9, *range(8)])
    log.queue.need(b, [5])
    assert log.serve_all() == [
        (0, [9, *range(PREFETCH_BATCH - 1)]),
        (0, [7]),
        (1, [5]),
        (3, [3]),
        (2, [1, 2]),
    ]


def test_the_oldest_guesses_give_way_and_needed_frames_never() -> None:
    log = Log(most_guessed=5)
    a, b, c = (log.wanted(i) for i in range(3))
    log.queue.need(a, range(NUM_FRAMES))  # whatever the bound
    log.queue.guess(b, [1, 2, 3])
    log.queue.guess(c, [4, 5, 6])
    assert log.queue.frames_dropped == 1
    assert not log.queue.on_their_way(b, [3]) and log.queue.on_their_way(b, [2])
    log.queue.guess(a, [])
    log.queue.guess(c, range(4, 12))  # more than there is room for: the first ones stay
    assert log.queue.frames_dropped == 1 + 2 + 3
    log.queue.check_integrity()
    batches = log.serve_all()
    assert [i for name, batch in batches if name == 0 for i in batch] == [*range(NUM_FRAMES)]
    assert batches[3:] == [(2, [4, 5, 6, 7, 8])]
    assert log.queue.frames_guessed == 11 and log.queue.frames_cancelled == 0


def test_a_new_guess_takes_the_place_of_the_last() -> None:
    log = Log()
    a = log.wanted(0)
    log.queue.guess(a, [1, 2, 3])
    log.queue.guess(a, [2, 3, 4, 5])
    assert (log.queue.frames_guessed, log.queue.frames_cancelled) == (5, 1)
    log.queue.cancel(a, keep=[3, 4])
    assert log.queue.frames_cancelled == 3
    assert log.serve_all() == [(0, [3, 4])]
    # What was decoded and has been forgotten since is fetched again and counted once.
    log.queue.guess(a, [3])
    assert log.serve_all() == [(0, [3])] and log.queue.frames_guessed == 5


def test_a_guess_that_is_needed_stops_being_one() -> None:
    log = Log(most_guessed=2)
    a, b = log.wanted(0), log.wanted(1)
    log.queue.guess(a, [1, 2])
    log.queue.asked(a, [2, 9])
    log.queue.need(a, [2, 9])
    log.queue.guess(b, [5, 6])  # takes the room of frame 1, cannot take that of frame 2
    counts = log.queue.stats()
    assert (counts["frames_guessed_used"], counts["frames_guessed_late"]) == (1, 1)
    assert counts["frames_dropped"] == 1
    assert log.serve_all() == [(0, [2, 9]), (1, [5, 6])]
    log.queue.asked(b, [5])
    log.queue.asked(b, [5])
    assert log.queue.take_counts([a, b]) == (4, 2)
    assert log.queue.take_counts([a, b]) == (0, 0)
    assert log.queue.frames_guessed_late == 1  # 5 was there


def test_a_closed_queue_takes_nothing_and_has_nothing() -> None:
    log = Log()
    a = log.wanted(0)
    log.queue.need(a, [1])
    log.queue.guess(a, [2])
    log.queue.close()
    log.queue.close()
    log.queue.need(a, [3])
    log.queue.guess(a, [4])
    assert not log.queue.on_their_way(a, range(NUM_FRAMES)) and not log.queue.serve(wait=True)
    assert (log.queue.frames_cancelled, log.queue.frames_guessed) == (2, 1)
    log.queue.check_integrity()


# -- threads ----------------------------------------------------------------------------------


def test_videos_are_decoded_side_by_side_and_one_video_by_one_thread() -> None:
    both = threading.Barrier(2)
    inside: dict[tuple[str, str], int] = {}
    crowded: list[Wanted] = []

    def decode(wanted: Wanted, indices: list[int]) -> None:
        inside[wanted.video] = inside.get(wanted.video, 0) + 1
        crowded.extend([wanted] * (inside[wanted.video] > 1))
        if 0 in indices:
            both.wait(PATIENCE_SECONDS)  # passed only by two at a time
        inside[wanted.video] -= 1
        queue.arrived(wanted.video, indices)

    queue = PrefetchQueue(decode, 10**6, num_workers=2)
    log = Log()
    first, second, other = log.wanted(0), log.wanted(1, video=0), log.wanted(2)
    queue.need(first, range(NUM_FRAMES))
    queue.need(second, range(1, NUM_FRAMES))
    queue.need(other, range(NUM_FRAMES))
    everything = range(NUM_FRAMES)
    done = threading.Event()
    while any(queue.on_their_way(w, everything) for w in (first, second, other)):
        assert not done.wait(0.001)
    queue.close()
    assert crowded == []


def test_an_error_costs_its_own_batch_alone() -> None:
    calls: list[list[int]] = []

    def decode(wanted: Wanted, indices: list[int]) -> None:
        calls.append(indices)
        raise OSError("disk gone")

    queue = PrefetchQueue(decode, 10**6, num_workers=0)
    wanted = Log().wanted(0)
    queue.need(wanted, range(10))
    assert queue.serve() and not queue.on_their_way(wanted, range(8))
    assert queue.serve() and not queue.serve() and calls == [[*range(8)], [8, 9]]
    queue.check_integrity()


# -- requests that share a store --------------------------------------------------------------


def by_hand(store: FrameStore, most_guessed: int = NUM_FRAMES) -> FrameStore:
    """The store, fetching ahead only where `store.ahead.serve` is called."""
    store.ahead = PrefetchQueue(store._fetch, most_guessed * FRAME_BYTES, num_workers=0)
    return store


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
    with store.ahead._changed:  # no thread takes anything meanwhile
        provider.guess(0, range(NUM_FRAMES))
        assert store.ahead.frames_guessed == 8 and store.ahead.frames_dropped == 5
    store.close()


# -- any interleaving -------------------------------------------------------------------------

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
            (r, v, i) for r, v, i in before if (r, v) == (request, video) and i in unproven - named
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
        assert not thread.is_alive(), "somebody waits for ever"
    assert wrong == []
    store.check_integrity()
    counts = store.stats()
    assert counts["frames_decoded"] == sum(map(len, reads))
    if budget >= 2 * NUM_FRAMES * FRAME_BYTES and not seed % 2:  # nothing evicted, nothing broken
        assert all(len(set(found)) == len(found) for found in reads), "decoded twice"
    store.close()
    assert len(store) == 0 and not any(worker.is_alive() for worker in store.ahead._workers)
