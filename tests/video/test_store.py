"""FrameStore: one decode per frame, a budget that holds, counters that add up."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.video import FrameStore, Video, open_video
from vtts_rt.video.arrays import ArraySource

FRAME_BYTES = 4 * 6 * 3


class CountedSource(ArraySource):
    """16 frames of 72 bytes; notes what is read, can be made slow or broken."""

    def __init__(self, seed: int = 0) -> None:
        frames = np.random.default_rng(seed).integers(0, 256, (16, 4, 6, 3), np.uint8)
        super().__init__(frames, source_fps=2.0)
        self.pixels = frames
        self.reads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[int] = set()

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        # As of one group of pictures: what lies before the last wanted frame is passed.
        passed = [i for i in passing if i < max(frame_indices, default=0)]
        for i, frame in super().read([*frame_indices, *passed]):
            assert self.gate.wait(10)
            if i in self.broken:
                raise RuntimeError("broken frame")
            self.reads.append(i)
            yield i, frame


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened for 10 s"
        time.sleep(0.001)


def test_each_frame_is_decoded_once_and_read_only() -> None:
    store, source = FrameStore(10**6), CountedSource()
    got = store.frames(source, [3, 1, 3])
    assert [np.array_equal(f, source.pixels[i]) for f, i in zip(got, [3, 1, 3], strict=True)] == [
        True
    ] * 3
    assert got[0] is got[2] and not got[0].flags.writeable
    store.frames(source, [1, 2, 3])
    assert sorted(source.reads) == [1, 2, 3]
    assert store.stats() == {
        "queries": 5,
        "hits": 2,
        "frames": 3,
        "bytes": 3 * FRAME_BYTES,
        "byte_budget": 10**6,
        "evictions": 0,
        "device_frames": 0,
        "device_bytes": 0,
        "device_byte_budget": 0,
        "device_evictions": 0,
        "frames_decoded": 3,
        "frames_passing": 0,
        "frames_reused": 2,
        "frames_guessed": 0,
        "frames_guessed_used": 0,
        "frames_guessed_late": 0,
        "frames_cancelled": 0,
        "frames_dropped": 0,
    }
    store.check_integrity()
    with pytest.raises(ValueError, match="0..15"):
        store.frames(source, [16])


def test_two_videos_never_share_and_two_sources_of_one_do() -> None:
    store, a, same, b = FrameStore(10**6), CountedSource(0), CountedSource(0), CountedSource(1)
    first = store.frames(a, [5])[0]
    assert store.frames(same, [5])[0] is first and same.reads == []
    np.testing.assert_array_equal(store.frames(b, [5])[0], b.pixels[5])


def test_least_recently_used_goes_first() -> None:
    store, source = FrameStore(3 * FRAME_BYTES), CountedSource()
    store.frames(source, [0, 1, 2])
    store.frames(source, [0])
    store.frames(source, [3])  # 1 is the oldest now
    source.reads.clear()
    store.frames(source, [0, 2, 3])
    assert source.reads == [] and store.host.evictions == 1
    store.frames(source, [1])
    assert source.reads == [1]
    store.check_integrity()


@pytest.mark.parametrize("budget", [0, FRAME_BYTES - 1, FRAME_BYTES])
def test_small_budgets_still_deliver(budget: int) -> None:
    store, source = FrameStore(budget), CountedSource()
    for i, frame in enumerate(store.frames(source, range(16))):
        np.testing.assert_array_equal(frame, source.pixels[i])
    assert store.host.bytes == (FRAME_BYTES if budget >= FRAME_BYTES else 0)
    store.check_integrity()


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(0, 6),
    asks=st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 15), max_size=6))),
)
def test_any_sequence_of_asks(budget: int, asks: list[tuple[int, list[int]]]) -> None:
    store, sources = FrameStore(budget * FRAME_BYTES), [CountedSource(0), CountedSource(1)]
    for video, indices in asks:
        for i, frame in zip(indices, store.frames(sources[video], indices), strict=True):
            np.testing.assert_array_equal(frame, sources[video].pixels[i])
        store.check_integrity()
    assert store.frames_decoded == sum(len(s.reads) for s in sources)


def test_threads_that_ask_for_the_same_decode_once() -> None:
    store, source = FrameStore(10**6), CountedSource()
    source.gate.clear()
    wrong: list[int] = []

    def ask() -> None:
        frames = store.frames(source, range(16))
        wrong.extend(i for i, f in enumerate(frames) if not np.array_equal(f, source.pixels[i]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    source.gate.set()
    for t in threads:
        t.join(20)
    assert wrong == [] and sorted(source.reads) == list(range(16))
    store.check_integrity()


def test_an_open_video_is_read_by_one_at_a_time() -> None:
    source = CountedSource()
    videos = [Video(source), open_video(Video(source), start_seconds=0.5)]
    store, passes = FrameStore(1 << 20), []
    second_began = threading.Event()
    read = source.read

    def noted(*arguments: Any) -> Iterator[tuple[int, np.ndarray]]:
        passes.append("begin")
        if len(passes) > 1:
            second_began.set()
        second_began.wait(0.2)  # only a second reader ends it early
        yield from read(*arguments)
        passes.append("end")

    source.read = noted  # type: ignore[method-assign, assignment]
    threads = [threading.Thread(target=store.frames, args=(video, [1])) for video in videos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert passes == ["begin", "end"] * 2


def test_an_error_reaches_every_waiting_request_and_leaves_nothing_behind() -> None:
    store, source = FrameStore(10**6), CountedSource()
    source.broken = {4}
    errors: list[str] = []

    def ask() -> None:
        try:
            store.frames(source, [3, 4, 5])
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert errors == ["broken frame"] * 3
    store.check_integrity()
    source.broken = set()
    assert len(store.frames(source, [3, 4, 5])) == 3


def test_prefetch_returns_at_once_and_is_found() -> None:
    store, source = FrameStore(10**6), CountedSource()
    provider = store.provider([source])
    source.gate.clear()
    provider.prefetch(0, range(12))  # would block here if it were not in the background
    assert source.reads == []
    source.gate.set()
    wait_for(lambda: len(store) == 12)
    provider.frames(0, range(12))
    assert sorted(source.reads) == list(range(12))
    store.close()
    store.close()
    provider.prefetch(0, [15])
    assert 15 not in source.reads and provider.ready(0, [15])


def test_prefetch_keeps_to_the_budget_and_swallows_errors() -> None:
    store, source = FrameStore(4 * FRAME_BYTES), CountedSource()
    store.provider([source]).prefetch(0, range(16))
    wait_for(lambda: len(store) == 4)
    store.close()
    assert sorted(source.reads) == [0, 1, 2, 3]
    store, source = FrameStore(10**6), CountedSource()
    provider = store.provider([source])
    source.broken = {2}
    provider.prefetch(0, [2])
    wait_for(lambda: provider.ready(0, [2]))
    provider.prefetch(0, [9])
    wait_for(lambda: len(store) == 1)
    with pytest.raises(RuntimeError, match="broken frame"):
        provider.frames(0, [2])
    store.close()


def test_provider_counts_by_round() -> None:
    store, a, b = FrameStore(10**6), CountedSource(0), CountedSource(1)
    provider = store.provider([a, b])
    provider.frames(0, [0, 1, 1])
    provider.frames(1, [0])
    provider.frames(0, [0])  # decoded in this very round: not a reuse
    counts = provider.take_counts()
    assert (counts.frames_decoded, counts.frames_reused) == (3, 0)
    provider.prefetch(0, [1, 2])
    wait_for(lambda: len(store) == 4)
    provider.frames(0, [0, 1, 2])
    counts = provider.take_counts()
    assert (counts.frames_decoded, counts.frames_reused) == (1, 2)
    assert provider.take_counts() == (0, 0, 0, 0, 0)
    other = store.provider([a])
    other.frames(0, [0, 1])
    assert other.take_counts()[:3] == (0, 0, 2)
    store.close()


def test_ready_says_whether_a_frame_is_on_its_way() -> None:
    store, source = FrameStore(10**6), CountedSource()
    provider = store.provider([source])
    assert provider.ready(0, [3])  # not being fetched: reading it would not wait
    source.gate.clear()
    provider.prefetch(0, [3, 4])
    provider.prefetch(0, [4])
    assert not provider.ready(0, [3]) and not provider.ready(0, [7, 4])
    assert provider.ready(0, [7]) and provider.fresh().ready(0, [3])
    source.gate.set()
    wait_for(lambda: provider.ready(0, [3, 4]))
    source.broken = {5}
    provider.prefetch(0, [5])
    wait_for(lambda: provider.ready(0, [5]))  # it failed: `frames` will say how
    store.close()
    provider.prefetch(0, [6])
    assert provider.ready(0, [6])


def test_bad_budget() -> None:
    with pytest.raises(ValueError, match="byte_budget must be a whole number of bytes >= 0"):
        FrameStore(-1)


def test_by_products_are_counted_apart() -> None:
    store, source = FrameStore(10**6), CountedSource()
    provider = store.provider([source])
    provider.passing(0, [2, 4, 6, 9])
    provider.frames(0, [3, 7])
    assert sorted(source.reads) == [2, 3, 4, 6, 7]
    assert provider.take_counts()[:3] == (2, 0, 0)
    assert (store.frames_decoded, store.frames_passing, len(store)) == (2, 3, 5)
    for i, frame in zip([2, 4, 6], provider.frames(0, [2, 4, 6]), strict=True):
        np.testing.assert_array_equal(frame, source.pixels[i])
    assert provider.take_counts()[:3] == (0, 0, 3) and len(source.reads) == 5
    provider.passing(0, [9, 10])
    provider.prefetch(0, [12])
    wait_for(lambda: provider.ready(0, [12]))
    assert sorted(source.reads[5:]) == [9, 10, 12] and store.frames_passing == 5
    store.check_integrity()
    store.close()


def test_by_products_take_only_room_that_is_left_and_go_first() -> None:
    store, source = FrameStore(4 * FRAME_BYTES), CountedSource()
    store.frames(source, [0])
    store.frames(source, [15], passing=[5, 6, 7, 8])  # room for two beside frame 15
    assert sorted(source.reads) == [0, 5, 6, 15] and store.host.evictions == 0
    store.frames(source, [14], passing=[9])
    assert store.host.evictions == 1 and 9 not in source.reads
    store.frames(source, [13])
    assert store.host.evictions == 2
    source.reads.clear()
    store.frames(source, [0, 13, 14, 15])
    assert source.reads == []
    store.check_integrity()


# -- frames that stay on a device -------------------------------------------------------------


class TensorSource(CountedSource):
    """Hands frames out as tensors: of the host, or of a device that this machine need not have
    ("meta" tensors have sizes and no pixels)."""

    def __init__(self, device: str, seed: int = 0, whole_batch: bool = False) -> None:
        super().__init__(seed)
        self.device, self.whole_batch = device, whole_batch

    def read(  # type: ignore[override]
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for i, frame in super().read(frame_indices, passing):
            tensor = torch.from_numpy(frame).to(self.device, copy=True)
            yield i, torch.stack([tensor, tensor])[0] if self.whole_batch else tensor


def test_frames_of_a_device_have_a_budget_of_their_own() -> None:
    store = FrameStore(2 * FRAME_BYTES, 3 * FRAME_BYTES)
    there, host = TensorSource("meta"), CountedSource(1)
    store.frames(host, [0, 1])
    for frame in store.frames(there, [0, 1, 2, 3]):
        assert isinstance(frame, torch.Tensor) and frame.device.type == "meta"
    store.check_integrity()
    stats = store.stats()
    assert (stats["frames"], stats["bytes"], stats["evictions"]) == (2, 2 * FRAME_BYTES, 0)
    assert (stats["device_frames"], stats["device_bytes"]) == (3, 3 * FRAME_BYTES)
    assert (stats["device_byte_budget"], stats["device_evictions"]) == (3 * FRAME_BYTES, 1)
    store.frames(host, [2, 3])
    store.frames(there, [1, 2, 3])
    assert there.reads == [0, 1, 2, 3] and store.stats()["evictions"] == 2
    store.frames(there, [0])  # it was dropped, not moved to the host
    assert there.reads == [0, 1, 2, 3, 0] and len(store.host) == 2
    store.clear()
    assert len(store) == 0 and store.stats()["device_evictions"] == 2 + 3


def test_tensors_of_the_host_are_frames_of_the_host() -> None:
    store, source = FrameStore(2 * FRAME_BYTES, 10**6), TensorSource("cpu")
    frames = store.frames(source, [3, 4])
    for i, frame in zip([3, 4], frames, strict=True):
        np.testing.assert_array_equal(frame, source.pixels[i])
    assert store.frames(source, [4])[0] is frames[1] and source.reads == [3, 4]
    assert len(store.host) == 2 and len(store.device) == 0
    store.check_integrity()


def test_a_device_without_a_budget_still_delivers() -> None:
    store, source = FrameStore(10**6), TensorSource("meta")
    assert len(store.frames(source, [0, 1])) == 2 and len(store) == 0
    store.check_integrity()


def test_what_is_fetched_ahead_fits_the_tier_of_its_source() -> None:
    store, source = FrameStore(10**6, 3 * FRAME_BYTES), TensorSource("meta")
    provider = store.provider([source])
    provider.frames(0, [15])
    provider.passing(0, range(8))
    provider.prefetch(0, range(1, 12))
    wait_for(lambda: provider.ready(0, range(12)))
    assert sorted(source.reads) == [1, 2, 3, 15] and len(store.device) == 3
    store.frames(source, [14])
    store.clear()
    provider.frames(0, [10])  # two by-products fit beside it
    assert sorted(source.reads[5:]) == [0, 1, 10] and store.frames_passing == 2
    store.check_integrity()
    store.close()


def test_a_frame_that_keeps_a_whole_batch_alive_is_found_out() -> None:
    store = FrameStore(10**6, 10**6)
    store.frames(TensorSource("meta", whole_batch=True), [0])
    with pytest.raises(AssertionError):
        store.check_integrity()


def test_bad_device_budget() -> None:
    with pytest.raises(ValueError, match="device_byte_budget must be a whole number of bytes >= 0"):
        FrameStore(0, -1)
