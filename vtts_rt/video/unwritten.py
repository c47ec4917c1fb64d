"""Parts of HEVC pictures that no slice wrote.

Most damage of HEVC ends a slice early without an error (H.265, 7.3.8.1:
end_of_slice_segment_flag). FFmpeg then leaves the rest of the picture as its memory was: zeros
where it is new, grey where it stood for a missing reference, else an earlier picture. Of 10 files
of 640x360 with one or two flipped bits, 3 had frames that depended on the way of reading. Here
memory is cleared before it is used again, so that unwritten parts show in decoded frames.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

# Coding tree blocks have at least 16 pixels a side, coding blocks 8 (H.265, 7.4.3.2.1): of each 16,
# 8 are looked at, by their corners, and the last 8 of the picture.
TREE_PX, BLOCK_PX = 16, 8
# Pictures that came out this long ago are no longer references: x265's keep for at most 9 (of the
# largest pictures of a level a stream may keep 6, of the smallest 16; H.265, A.4.2).
HELD_FRAMES = 12


class UnwrittenParts:
    """Looks for unwritten parts in the pictures of one decoder, and clears their memory.

    A part is unwritten if Y, U and V are all 0, which is no colour, or all exactly mid-grey.
    Flat grey of that kind, and black in RGB or grey video, are taken for damage too, which only
    costs the time of the exact way.
    """

    def __init__(self) -> None:
        self._held: deque[Any] = deque()

    def are_in(self, frame: Any) -> bool:
        """Whether a part of an `av.VideoFrame` was not written."""
        planes = _planes(frame)
        rows, columns = _corners(frame.height), _corners(frame.width)
        grey = 1 << (frame.format.components[0].bits - 1)
        first = planes[0][rows[0]][:, columns[0]]
        for blank in (0, grey):
            at = (first == blank).nonzero()
            for row, column in ((r, c) for r in rows for c in columns):
                if not at[0].size:
                    break
                y, x = row[at[0]], column[at[1]]
                same = np.ones(y.shape, bool)
                for plane, size in zip(planes, frame.planes, strict=True):
                    y_at, x_at = y * size.height // frame.height, x * size.width // frame.width
                    same &= plane[y_at, x_at] == blank
                at = at[0][same], at[1][same]
            if at[0].size:
                return True
        return False

    def recycle(self, frames: list[Any]) -> None:
        """Takes frames that were looked at; clears the oldest and gives them back."""
        self._held.extend(frames)
        while len(self._held) > HELD_FRAMES:
            frame = self._held.popleft()
            frame.make_writable()  # a copy, where it still is a reference
            for plane in _planes(frame):
                plane.fill(0)

    def forget(self) -> None:
        """Drop all frames, as their decoder is closed."""
        self._held.clear()


def _planes(frame: Any) -> list[np.ndarray]:
    """The planes, uint8 or uint16 (height, line)."""
    dtype = np.uint8 if frame.format.components[0].bits <= 8 else np.uint16
    return [np.frombuffer(plane, dtype).reshape(plane.height, -1) for plane in frame.planes]


def _corners(length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last pixels of the blocks along one axis of a picture."""
    last = (length - 1) // BLOCK_PX * BLOCK_PX
    first = np.append(np.arange(0, last, TREE_PX), last)
    return first, np.minimum(first + BLOCK_PX - 1, length - 1)
