"""FrameStore: decoded frames, kept once for all users, within a byte budget."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from vtts_rt import process
from vtts_rt.types import Frame
from vtts_rt.video.frame_tiers import FrameKey, FrameTier, device_type
from vtts_rt.video.prefetch import Observer, PrefetchQueue, Wanted
from vtts_rt.video.source import FrameSource, distinct_indices, origin_of


class FrameCounts(NamedTuple):
    """What one round cost in frames.

    frames_decoded: frames delivered to the store on behalf of the provider, prefetched ones
        included. frames_codec_decoded: frames the codec had to decode for that.
    frames_reused: distinct frames asked for that were in the store without the provider having
        had them decoded since the last take.
    frames_guessed: frames fetched on a guess before the round began; frames_guessed_used: those
        of them that it asked for.
    """

    frames_decoded: int = 0
    frames_codec_decoded: int = 0
    frames_reused: int = 0
    frames_guessed: int = 0
    frames_guessed_used: int = 0


# A frame that some thread is decoding, for others to wait for; None where it failed.
_Flight: TypeAlias = "Future[Frame | None]"


class _Decoder:
    """What the store knows of a source. turn: one batch at a time from one source, as two would
    send its decoder to and fro. tier: where its frames are kept, the host's until one came."""

    __slots__ = ("tier", "turn")

    def __init__(self, tier: FrameTier) -> None:
        self.turn = threading.Lock()
        self.tier = tier


class FrameStore:
    """Decoded (H, W, 3) uint8 frames by (video id, decoder, frame index), LRU by bytes.

    byte_budget: bytes of frames kept in host memory, >= 0. Frames handed out stay valid after
    eviction; one larger than the budget is handed out and not kept.
    device_byte_budget: the same of frames that a decoder leaves on an accelerator. They are a
    tier of their own and never copied down: decoding one again there costs less than the way.
    Thread-safe. Two threads that ask for the same frame decode it once. In a forked child it is
    empty and can be used.
    By-products (`passing`: frames that a decoder passes on its way to those asked for) are kept
    while there is room: they evict nothing, and are the first to go.
    pinned: ids of videos whose frames are not evicted, one entry a pin.
    Counters: queries, frames_decoded (frames asked for), frames_passing (by-products),
    frames_reused; evictions and bytes are those of `host` and `device`, what is fetched ahead is
    counted by `PrefetchQueue`.
    """

    def __init__(self, byte_budget: int, device_byte_budget: int = 0) -> None:
        self._budgets = byte_budget, device_byte_budget
        self._begin()
        process.after_fork(self, FrameStore._begin)

    def _begin(self) -> None:
        """Empty; so it begins again in a forked child, where its threads are not."""
        byte_budget, device_byte_budget = self._budgets
        self.host = FrameTier("byte_budget", byte_budget)
        self.device = FrameTier("device_byte_budget", device_byte_budget)
        self.pinned: list[str] = []
        self.host.pinned = self.device.pinned = self.pinned
        self.queries = 0
        self.frames_decoded = 0
        self.frames_passing = 0
        self.frames_reused = 0
        self._flights: dict[FrameKey, _Flight] = {}
        self._lock = threading.RLock()  # a garbage collection may close what it collects
        self._decoders: WeakKeyDictionary[FrameSource, _Decoder] = WeakKeyDictionary()
        # Guesses that wait would, once decoded, take at most a quarter of what is kept.
        self.ahead = PrefetchQueue(self._fetch, (byte_budget + device_byte_budget) // 4)

    def __len__(self) -> int:
        return len(self.host) + len(self.device)

    def frames(
        self,
        source: FrameSource,
        frame_indices: Sequence[int],
        observer: Observer | None = None,
        passing: Collection[int] = (),
    ) -> list[Frame]:
        """Read-only frames in the order asked for; only what is not stored is decoded.

        observer: told what is decoded for this call. Errors of the source are raised here.
        """
        indices = distinct_indices(frame_indices, source.metadata.num_frames)
        with self._lock:
            self.queries += len(indices)
        found = self._collect(source, indices, observer, passing)
        return [found[int(i)] for i in frame_indices]

    def absent(self, source: FrameSource, frame_indices: Sequence[int]) -> list[int]:
        """The frames worth fetching ahead, ascending: not stored, and no more than fit."""
        meta = source.metadata
        indices = distinct_indices(frame_indices, meta.num_frames)
        with self._lock:
            room = self._decoder(source).tier.byte_budget // (meta.height * meta.width * 3)
            return [i for i in indices[:room] if not self._holds((*_video(source), i))]

    def budget_for(self, source: FrameSource) -> int:
        """Bytes kept of frames like a source's, where its decoder leaves them."""
        with self._lock:
            return self._decoder(source).tier.byte_budget

    def provider(self, sources: Sequence[FrameSource]) -> StoreProvider:
        """A FrameProvider over a request's videos, in their order, with counters of its own."""
        return StoreProvider(self, sources)

    def clear(self) -> None:
        """Forgets every frame (counted as evictions)."""
        with self._lock:
            self.host.clear()
            self.device.clear()

    def close(self) -> None:
        """Ends fetching ahead (what waits for it is cancelled) and forgets all."""
        self.ahead.close()
        self.clear()

    def stats(self) -> dict[str, int]:
        """The counters, with the number of frames held and the budgets; those of the device tier
        begin with `device_`. queries, hits: frames asked for, and those that were there."""
        with self._lock:
            counts = {
                "queries": self.queries,
                "hits": self.frames_reused,
                **self.host.stats(),
                **{f"device_{name}": value for name, value in self.device.stats().items()},
                "frames_decoded": self.frames_decoded,
                "frames_passing": self.frames_passing,
                "frames_reused": self.frames_reused,
            }
        return counts | self.ahead.stats()

    def check_integrity(self) -> None:
        """AssertionError when the books do not balance."""
        with self._lock:
            self.host.check_integrity()
            self.device.check_integrity()
            stored = [*self.host.keys(), *self.device.keys()]
            assert len(set(stored)) == len(stored), "in both tiers"
            assert not self._flights.keys() & set(stored), "stored and in flight"
        self.ahead.check_integrity()

    # -- internals --------------------------------------------------------------------------

    def _decoder(self, source: FrameSource) -> _Decoder:
        origin = origin_of(source)
        if origin not in self._decoders:
            self._decoders[origin] = _Decoder(self.host)
        return self._decoders[origin]

    def _holds(self, key: FrameKey) -> bool:
        return key in self.host or key in self.device

    def _is_taken(self, key: FrameKey) -> bool:
        return self._holds(key) or key in self._flights

    def _collect(
        self,
        source: FrameSource,
        indices: Sequence[int],
        observer: Observer | None,
        passing: Collection[int],
    ) -> dict[int, Frame]:
        """Every index with its frame: stored, decoded here, or waited for."""
        found: dict[int, Frame] = {}
        missing, first = list(indices), True
        while missing:
            mine: dict[int, _Flight] = {}
            others: dict[int, _Flight] = {}
            with self._lock:
                for i in missing:
                    key = (*_video(source), i)
                    frame = self.host.get(key)
                    if frame is None:
                        frame = self.device.get(key)
                    if frame is not None:
                        found[i] = frame
                        self.frames_reused += first
                    elif key in self._flights:
                        others[i] = self._flights[key]
                    else:
                        mine[i] = self._flights[key] = Future()
                decoder = self._decoder(source)
            if mine:
                with decoder.turn:
                    found.update(self._decode(source, decoder, mine, observer, passing))
            for i, flight in others.items():
                if (frame := flight.result()) is not None:
                    found[i] = frame
            # What another thread failed to decode is tried here, to raise its error here.
            missing, first = [i for i in missing if i not in found], False
        return found

    def _decode(
        self,
        source: FrameSource,
        decoder: _Decoder,
        mine: dict[int, _Flight],
        observer: Observer | None,
        passing: Collection[int],
    ) -> dict[int, Frame]:
        video = _video(source)
        found: dict[int, Frame] = {}
        codec_before = source.frames_codec_decoded
        try:
            by_products = self._with_room(source, decoder.tier, passing, len(mine))
            for i, frame in source.read(list(mine), by_products):
                decoder.tier = self.host if device_type(frame) == "cpu" else self.device
                if isinstance(frame, np.ndarray):
                    frame.flags.writeable = False
                if i in mine:
                    found[i] = frame
                    if observer is not None:
                        observer([i], 0)
                if self._insert((*video, i), frame, decoder.tier, mine.get(i)):
                    self.ahead.arrived(video, [i])
            # A request for a frame that never comes would ask again for ever.
            left_out = mine.keys() - found.keys()
            assert not left_out, f"the source leaves out frames {sorted(left_out)}"
        finally:
            # On an error, requests that wait for the rest wake up and decode by themselves.
            with self._lock:
                for i, flight in mine.items():
                    if not flight.done():
                        self._flights.pop((*video, i), None)
                        flight.set_result(None)
            if observer is not None:
                observer([], source.frames_codec_decoded - codec_before)
        return found

    def _insert(self, key: FrameKey, frame: Frame, tier: FrameTier, flight: _Flight | None) -> bool:
        """A frame asked for, or without a flight a by-product; whether it has come."""
        with self._lock:
            if flight is not None:
                self.frames_decoded += 1
                del self._flights[key]
                tier.put(key, frame)
                flight.set_result(frame)
            elif not self._is_taken(key):
                self.frames_passing += tier.put(key, frame, beside=True)
            return flight is not None or self._holds(key)

    def _with_room(
        self, source: FrameSource, tier: FrameTier, passing: Collection[int], num_wanted: int
    ) -> list[int]:
        """The first by-products that are not there yet, as many as fit beside the wanted."""
        meta = source.metadata
        video = _video(source)
        with self._lock:
            free = tier.byte_budget - tier.bytes
            room = max(0, free // (meta.height * meta.width * 3) - num_wanted)
            return [i for i in passing if not self._is_taken((*video, i))][:room]

    def _fetch(self, wanted: Wanted, indices: list[int]) -> None:
        """Decodes what is neither stored nor in flight; a prefetch neither waits nor counts."""
        video = _video(wanted.source)
        with self._lock:
            absent = [i for i in indices if not self._is_taken((*video, i))]
        self._collect(wanted.source, absent, wanted.observer, wanted.passing)


def _video(source: FrameSource) -> tuple[str, str]:
    return source.metadata.video_id, source.metadata.decoder


class _Counted:
    """The counts of one round; apart from its provider, which what counts must not keep alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._delivered: set[FrameKey] = set()
        self._asked: set[FrameKey] = set()
        self._num_decoded = self._num_codec_decoded = 0

    def observe(
        self, video: tuple[str, str], indices: Sequence[int], num_codec_decoded: int
    ) -> None:
        with self._lock:
            self._num_decoded += len(indices)
            self._num_codec_decoded += num_codec_decoded
            self._delivered.update((*video, i) for i in indices)

    def asked(self, frames: Iterable[FrameKey]) -> None:
        with self._lock:
            self._asked.update(frames)

    def take(self, guessed: int, used: int) -> FrameCounts:
        with self._lock:
            counts = FrameCounts(
                frames_decoded=self._num_decoded,
                frames_codec_decoded=self._num_codec_decoded,
                frames_reused=len(self._asked - self._delivered),
                frames_guessed=guessed,
                frames_guessed_used=used,
            )
            self._begin()
            return counts


class StoreProvider:
    """The FrameProvider of one request (vtts_rt.types): its sources, through a shared store.

    sources: the request's videos in order. Counters run from one `take_counts` to the next.
    """

    def __init__(self, store: FrameStore, sources: Sequence[FrameSource]) -> None:
        self._store = store
        self._sources = list(sources)
        self._counted = _Counted()
        self._wanted = [
            Wanted(source, partial(self._counted.observe, _video(source))) for source in sources
        ]
        self._of_all_rounds = list(self._wanted)

    def fresh(self) -> StoreProvider:
        """Another provider of the same frames, with counters of its own: one a round."""
        other = StoreProvider(self._store, self._sources)
        self._of_all_rounds += other._wanted
        other._of_all_rounds = self._of_all_rounds
        return other

    def passing(self, video: int, frame_indices: Collection[int]) -> None:
        """Name frames worth keeping where a decoder passes them, the likeliest first."""
        self._wanted[video].passing = frame_indices

    def prefetch(self, video: int, frame_indices: Sequence[int]) -> None:
        wanted = self._wanted[video]
        self._store.ahead.asked(wanted, frame_indices)
        self._store.ahead.need(wanted, self._store.absent(wanted.source, frame_indices))

    def guess(self, video: int, frame_indices: Sequence[int]) -> None:
        """Fetch frames that the round of this provider is likely to ask for; returns at once.

        What an earlier guess named beyond these is cancelled if it is not being decoded.
        """
        wanted = self._wanted[video]
        absent = self._store.absent(wanted.source, frame_indices)
        self._store.ahead.guess(wanted, frame_indices, absent)

    def keep_guesses(self, frames: Mapping[int, Collection[int]]) -> None:
        """What the round will show is known, video -> frame indices: cancel the other guesses."""
        for video, wanted in enumerate(self._wanted):
            self._store.ahead.cancel(wanted, keep=frames.get(video, ()))

    def cancel(self) -> None:
        """The request has ended: what this provider and those of its other rounds still wait
        for is left to others that want it."""
        for wanted in self._of_all_rounds:
            self._store.ahead.cancel(wanted)

    def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
        return not self._store.ahead.on_their_way(self._wanted[video], frame_indices)

    def frames(self, video: int, frame_indices: Sequence[int]) -> list[Frame]:
        wanted = self._wanted[video]
        self._store.ahead.asked(wanted, frame_indices)
        found = self._store.frames(wanted.source, frame_indices, wanted.observer, wanted.passing)
        self._counted.asked((*wanted.video, int(i)) for i in frame_indices)
        return found

    def take_counts(self) -> FrameCounts:
        """The counts since the last take, and a fresh start."""
        return self._counted.take(*self._store.ahead.take_counts(self._wanted))
