"""FrameStore: decoded frames, kept once for everybody, within a byte budget."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from vtts_rt.types import VideoMetadata, require
from vtts_rt.video.source import FrameSource, distinct_indices

logger = logging.getLogger(__name__)

# (video id, decoder, frame index). The colour conversion is part of the video id.
FrameKey = tuple[str, str, int]
# Frames a prefetch takes at a time, so that a blocking read never waits for more than these.
PREFETCH_BATCH = 8


class FrameCounts(NamedTuple):
    """What one round cost in frames.

    frames_decoded: frames delivered to the store on behalf of the provider, prefetched ones
        included. frames_codec_decoded: frames the codec had to decode for that.
    frames_reused: distinct frames asked for that were in the store without the provider having
        had them decoded since the last take. decode_ms: wall-clock ms that `frames` blocked.
    """

    frames_decoded: int = 0
    frames_codec_decoded: int = 0
    frames_reused: int = 0
    decode_ms: float = 0.0


# Told about every batch: the keys delivered, and the frames the codec decoded for them.
Observer = Callable[[Sequence[FrameKey], int], None]


class _Flight:
    """A frame that some thread is decoding; others wait for `done`."""

    __slots__ = ("done", "frame")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.frame: np.ndarray | None = None


class FrameStore:
    """Decoded (H, W, 3) uint8 frames by (video id, decoder, frame index), LRU by bytes.

    byte_budget: bytes of frames kept, >= 0. Frames handed out stay valid after eviction; one
        larger than the budget is handed out and not kept.
    Thread-safe. Two threads that ask for the same frame decode it once.
    By-products (`passing`: frames that a decoder passes on its way to those asked for) are kept
    while there is room: they evict nothing, and are the first to go.
    Counters: queries, frames_decoded (frames asked for), frames_passing (by-products),
    frames_reused, evictions, bytes.
    """

    def __init__(self, byte_budget: int) -> None:
        require("FrameStore", "byte_budget", byte_budget, byte_budget >= 0, ">= 0")
        self.byte_budget = int(byte_budget)
        self.bytes = 0
        self.queries = 0
        self.frames_decoded = 0
        self.frames_passing = 0
        self.frames_reused = 0
        self.evictions = 0
        self._entries: OrderedDict[FrameKey, np.ndarray] = OrderedDict()
        self._flights: dict[FrameKey, _Flight] = {}
        self._lock = threading.Lock()
        # One batch at a time from one source: two would send its decoder to and fro.
        self._turns: WeakKeyDictionary[FrameSource, threading.Lock] = WeakKeyDictionary()
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._worker: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    def frames(
        self,
        source: FrameSource,
        frame_indices: Sequence[int],
        observer: Observer | None = None,
        passing: Collection[int] = (),
    ) -> list[np.ndarray]:
        """Read-only frames in the order asked for; only what is not stored is decoded.

        Errors of the source are raised here.
        """
        indices = distinct_indices(frame_indices, source.metadata.num_frames)
        with self._lock:
            self.queries += len(indices)
        found = self._collect(source, indices, observer, passing)
        return [found[int(i)] for i in frame_indices]

    def prefetch(
        self,
        source: FrameSource,
        frame_indices: Sequence[int],
        observer: Observer | None = None,
        done: Callable[[Sequence[int]], None] | None = None,
        passing: Collection[int] = (),
    ) -> list[int]:
        """Has frames decoded by a background thread and returns at once: which frames.

        At most as many as fit the budget. Errors are left to the `frames` call that asks for
        the same frames. done: called by that thread with indices that are no longer on their
        way, decoded or not.
        """
        meta = source.metadata
        indices = distinct_indices(frame_indices, meta.num_frames)
        room = self.byte_budget // (meta.height * meta.width * 3)
        indices = indices[:room]
        for at in range(0, len(indices), PREFETCH_BATCH):
            self._enqueue(source, indices[at : at + PREFETCH_BATCH], observer, done, passing)
        return indices

    def provider(self, sources: Sequence[FrameSource]) -> StoreProvider:
        """A FrameProvider over a request's videos, in their order, with counters of its own."""
        return StoreProvider(self, sources)

    def clear(self) -> None:
        """Forgets every frame (counted as evictions)."""
        with self._lock:
            self.evictions += len(self._entries)
            self._entries.clear()
            self.bytes = 0

    def close(self) -> None:
        """Ends the background thread (what it was told to prefetch is dropped) and forgets all."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if worker is not None:
            self._queue.put(None)
            worker.join()
        self.clear()

    def stats(self) -> dict[str, int]:
        """The counters, with the number of frames held and the budget. queries, hits: frames
        asked for, and those that were there."""
        with self._lock:
            return {
                "queries": self.queries,
                "hits": self.frames_reused,
                "frames": len(self._entries),
                "bytes": self.bytes,
                "byte_budget": self.byte_budget,
                "frames_decoded": self.frames_decoded,
                "frames_passing": self.frames_passing,
                "frames_reused": self.frames_reused,
                "evictions": self.evictions,
            }

    def check_integrity(self) -> None:
        """AssertionError when the books do not balance."""
        with self._lock:
            assert self.bytes == sum(f.nbytes for f in self._entries.values()), "bytes"
            assert self.bytes <= self.byte_budget, "over budget"
            assert not self._entries.keys() & self._flights.keys(), "stored and in flight"
            for key, frame in self._entries.items():
                assert frame.dtype == np.uint8 and frame.ndim == 3, key
                assert not frame.flags.writeable and frame.base is None, key

    # -- internals --------------------------------------------------------------------------

    def _collect(
        self,
        source: FrameSource,
        indices: Sequence[int],
        observer: Observer | None,
        passing: Collection[int],
    ) -> dict[int, np.ndarray]:
        """Every index with its frame: stored, decoded here, or waited for."""
        meta = source.metadata
        found: dict[int, np.ndarray] = {}
        missing, first = list(indices), True
        while missing:
            mine: dict[int, _Flight] = {}
            others: dict[int, _Flight] = {}
            with self._lock:
                for i in missing:
                    key = (meta.video_id, meta.decoder, i)
                    if key in self._entries:
                        self._entries.move_to_end(key)
                        found[i] = self._entries[key]
                        self.frames_reused += first
                    elif key in self._flights:
                        others[i] = self._flights[key]
                    else:
                        mine[i] = self._flights[key] = _Flight()
                turn = self._turns.setdefault(source, threading.Lock())
            if mine:
                with turn:
                    found.update(self._decode(source, mine, observer, passing))
            for i, flight in others.items():
                flight.done.wait()
                if flight.frame is not None:
                    found[i] = flight.frame
            # What another thread failed to decode is tried here, to raise its error here.
            missing, first = [i for i in missing if i not in found], False
        return found

    def _decode(
        self,
        source: FrameSource,
        mine: dict[int, _Flight],
        observer: Observer | None,
        passing: Collection[int],
    ) -> dict[int, np.ndarray]:
        meta = source.metadata
        found: dict[int, np.ndarray] = {}
        codec_before = source.frames_codec_decoded
        try:
            for i, frame in source.read(list(mine), self._with_room(meta, passing, len(mine))):
                frame.flags.writeable = False
                key = (meta.video_id, meta.decoder, i)
                if i in mine:
                    found[i] = frame
                    self._insert(key, frame, mine[i])
                else:
                    self._insert_passing(key, frame)
        finally:
            # On an error, whoever waits for the rest wakes up and tries by itself.
            with self._lock:
                for i, flight in mine.items():
                    if flight.frame is None:
                        self._flights.pop((meta.video_id, meta.decoder, i), None)
                        flight.done.set()
            if observer is not None:
                keys = [(meta.video_id, meta.decoder, i) for i in found]
                observer(keys, source.frames_codec_decoded - codec_before)
        return found

    def _insert(self, key: FrameKey, frame: np.ndarray, flight: _Flight) -> None:
        with self._lock:
            self.frames_decoded += 1
            del self._flights[key]
            if frame.nbytes <= self.byte_budget:
                self._entries[key] = frame
                self.bytes += frame.nbytes
                while self.bytes > self.byte_budget:
                    _, evicted = self._entries.popitem(last=False)
                    self.bytes -= evicted.nbytes
                    self.evictions += 1
            flight.frame = frame
            flight.done.set()

    def _with_room(
        self, meta: VideoMetadata, passing: Collection[int], num_wanted: int
    ) -> list[int]:
        """The first by-products that are not there yet, as many as fit beside the wanted."""
        with self._lock:
            taken = self._entries.keys() | self._flights.keys()
            free = self.byte_budget - self.bytes
        room = max(0, free // (meta.height * meta.width * 3) - num_wanted)
        return [i for i in passing if (meta.video_id, meta.decoder, i) not in taken][:room]

    def _insert_passing(self, key: FrameKey, frame: np.ndarray) -> None:
        with self._lock:
            taken = key in self._entries or key in self._flights
            if not taken and self.bytes + frame.nbytes <= self.byte_budget:
                self._entries[key] = frame
                self._entries.move_to_end(key, last=False)
                self.bytes += frame.nbytes
                self.frames_passing += 1

    def _enqueue(
        self,
        source: FrameSource,
        indices: list[int],
        observer: Observer | None,
        done: Callable[[Sequence[int]], None] | None,
        passing: Collection[int],
    ) -> None:
        def work() -> None:
            try:
                if not self._closed:
                    self._collect_absent(source, indices, observer, passing)
            except Exception as error:
                logger.debug("prefetch of frames %s failed: %s", indices, error)
            finally:
                if done is not None:
                    done(indices)

        with self._lock:
            if not self._closed:
                if self._worker is None:
                    worker = threading.Thread(target=self._work, name="prefetch", daemon=True)
                    worker.start()
                    self._worker = worker
                self._queue.put(work)
                return
        if done is not None:
            done(indices)

    def _collect_absent(
        self,
        source: FrameSource,
        indices: list[int],
        observer: Observer | None,
        passing: Collection[int],
    ) -> None:
        """Decodes what is neither stored nor in flight; a prefetch neither waits nor counts."""
        meta = source.metadata
        with self._lock:
            taken = self._entries.keys() | self._flights.keys()
        absent = [i for i in indices if (meta.video_id, meta.decoder, i) not in taken]
        self._collect(source, absent, observer, passing)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


class StoreProvider:
    """The FrameProvider of one request (vtts_rt.types): its sources, through a shared store.

    sources: the request's videos in order. Counters run from one `take_counts` to the next.
    """

    def __init__(self, store: FrameStore, sources: Sequence[FrameSource]) -> None:
        self._store = store
        self._sources = list(sources)
        self._lock = threading.RLock()  # a closed store is done with a prefetch at once
        self._on_their_way: list[Counter[int]] = [Counter() for _ in sources]
        self._passing: list[Collection[int]] = [()] * len(sources)
        self._delivered: set[FrameKey] = set()
        self._asked: set[FrameKey] = set()
        self._num_decoded = 0
        self._num_codec_decoded = 0
        self._blocked_seconds = 0.0

    def fresh(self) -> StoreProvider:
        """Another provider of the same frames, with counters of its own: one a round."""
        return StoreProvider(self._store, self._sources)

    def passing(self, video: int, frame_indices: Collection[int]) -> None:
        """Name frames worth keeping where a decoder passes them, the likeliest first."""
        self._passing[video] = frame_indices

    def prefetch(self, video: int, frame_indices: Sequence[int]) -> None:
        coming = self._on_their_way[video]

        def done(indices: Sequence[int]) -> None:
            with self._lock:
                coming.subtract(indices)

        source = self._sources[video]
        with self._lock:
            # Noted before the first of them can be done, so that a count never ends below zero.
            passing = self._passing[video]
            coming.update(self._store.prefetch(source, frame_indices, self._observe, done, passing))

    def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
        with self._lock:
            coming = self._on_their_way[video]
            return all(coming[index] <= 0 for index in frame_indices)

    def frames(self, video: int, frame_indices: Sequence[int]) -> list[np.ndarray]:
        began = time.perf_counter()
        source = self._sources[video]
        try:
            found = self._store.frames(source, frame_indices, self._observe, self._passing[video])
        finally:
            with self._lock:
                self._blocked_seconds += time.perf_counter() - began
        meta = source.metadata
        with self._lock:
            self._asked.update((meta.video_id, meta.decoder, int(i)) for i in frame_indices)
        return found

    def take_counts(self) -> FrameCounts:
        """The counts since the last take, and a fresh start."""
        with self._lock:
            counts = FrameCounts(
                frames_decoded=self._num_decoded,
                frames_codec_decoded=self._num_codec_decoded,
                frames_reused=len(self._asked - self._delivered),
                decode_ms=self._blocked_seconds * 1e3,
            )
            self._num_decoded = self._num_codec_decoded = 0
            self._blocked_seconds = 0.0
            self._asked, self._delivered = set(), set()
            return counts

    def _observe(self, keys: Sequence[FrameKey], num_codec_decoded: int) -> None:
        with self._lock:
            self._num_decoded += len(keys)
            self._num_codec_decoded += num_codec_decoded
            self._delivered.update(keys)
