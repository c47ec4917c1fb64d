"""The dyadic time grid of one video: cells of 2 / sample_fps * 2^-level seconds from t = 0.

A cell's frame pair is the frame at its start and the frame at its middle; the frame at a time
is the last one that has begun by then. Cells of all levels nest, so the same pairs come up
again in every round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.plan import frame_times
from vtts_rt.types import PairRef, TimeSpan, VideoMetadata

Cells = NDArray[np.int64]

# Seconds: a frame that begins this little after a time counts as begun. Time bases are far
# coarser (1/90000 s), float rounding is far finer.
_EPSILON_SECONDS = 1e-6
_EPSILON_CELLS = 1e-6


class Timeline:
    """Cells, pairs and levels of one video (not an image)."""

    def __init__(self, video: int, metadata: VideoMetadata, sample_fps: float) -> None:
        self.video = video
        self.metadata = metadata
        self.duration_seconds = metadata.duration_seconds
        self._times = frame_times(metadata)
        self._coarse_seconds = 2.0 / sample_fps
        self._frame_seconds = 1.0 / metadata.source_fps

    def cell_seconds(self, level: int) -> float:
        """Length of a cell; finer with growing level, and exact halves of one another."""
        return math.ldexp(self._coarse_seconds, -level)

    def num_cells(self, level: int) -> int:
        """Cells that begin before the end of the video, at least one."""
        cells = self.duration_seconds / self.cell_seconds(level)
        return max(1, math.ceil(cells - _EPSILON_CELLS))

    def resolves(self, level: int) -> bool:
        """Whether start and middle of a cell are at least one source frame apart."""
        return self.cell_seconds(level) / 2 >= self._frame_seconds * (1 - 1e-6)

    def first_level(self, config: ResolvedPerception, max_pairs: int) -> int:
        """Level of a first look: 0, coarser for at most `max_pairs` cells, finer for min_frames.

        Never finer than one cell a source frame, and 0 where finer cells add none.
        """
        level = 0
        while self.num_cells(level) > max_pairs:
            level -= 1
        best = level
        while self.num_cells(best) < config.min_frames // 2:
            level += 1
            if self.cell_seconds(level) < self._frame_seconds * (1 - 1e-6):
                break
            if self.num_cells(level) > max_pairs:
                break
            if self.num_cells(level) > self.num_cells(best):
                best = level
        return best

    def finest_level(self, spans: Sequence[TimeSpan], start_level: int, max_pairs: int) -> int:
        """The finest level from `start_level` on at which the spans touch <= max_pairs cells."""
        level = start_level
        while self.resolves(level + 1):
            if sum(stop - start for start, stop in self._ranges(spans, level + 1)) > max_pairs:
                break
            level += 1
        return level

    def cells(self, spans: Sequence[TimeSpan], level: int) -> Cells:
        """Ascending indices of the cells that the spans touch; an instant touches one."""
        ranges = self._ranges(spans, level)
        return np.concatenate([np.arange(a, b) for a, b in ranges] or [np.arange(0)])

    def _ranges(self, spans: Sequence[TimeSpan], level: int) -> list[tuple[int, int]]:
        """Disjoint half-open ranges of cells; spans are ascending and disjoint."""
        size, num = self.cell_seconds(level), self.num_cells(level)
        ranges: list[tuple[int, int]] = []
        done = 0
        for span in spans:
            start = min(math.floor(span.start_seconds / size + _EPSILON_CELLS), num - 1)
            stop = max(math.ceil(span.end_seconds / size - _EPSILON_CELLS), start + 1)
            start, stop = max(start, done), min(stop, num)
            if start < stop:
                ranges.append((start, stop))
                done = stop
        return ranges

    def pairs(self, cells: Cells, level: int) -> list[PairRef]:
        """The pairs of some cells of one level, in their order."""
        size = self.cell_seconds(level)
        # (cell * coarse) * 2^-level: a moment has the same float at every level.
        starts = np.ldexp(cells * self._coarse_seconds, -level)
        first, second = self._frames_at(starts), self._frames_at(starts + size / 2)
        video_id = self.metadata.video_id
        means = (self._times[first] + self._times[second]) / 2
        return [
            PairRef(self.video, video_id, a, b, time, mean)
            for a, b, time, mean in zip(first, second, starts.tolist(), means.tolist(), strict=True)
        ]

    def _frames_at(self, seconds: NDArray[np.float64]) -> list[int]:
        found = np.searchsorted(self._times, seconds + _EPSILON_SECONDS, side="right") - 1
        indices: list[int] = np.clip(found, 0, len(self._times) - 1).tolist()
        return indices
