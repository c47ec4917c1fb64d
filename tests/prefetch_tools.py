"""Frames that fail on request, and a queue whose batches run where a test says so."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from vtts_rt.video import FrameStore
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.prefetch import PrefetchQueue, Wanted

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


def by_hand(store: FrameStore, most_guessed: int = NUM_FRAMES) -> FrameStore:
    """The store, fetching ahead only where `store.ahead.serve` is called."""
    store.ahead = PrefetchQueue(store._fetch, most_guessed * FRAME_BYTES, num_workers=0)
    return store
