"""FrameTier: decoded frames in one memory, least recently used out first, by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, KeysView

import numpy as np

from vtts_rt.checks import is_whole
from vtts_rt.types import Frame, require

# (video id, decoder, frame index). The colour conversion is part of the video id.
FrameKey = tuple[str, str, int]


def device_type(frame: Frame) -> str:
    """Where a frame lies: "cpu" for an array, a tensor's own device type otherwise."""
    return "cpu" if isinstance(frame, np.ndarray) else frame.device.type


class FrameTier:
    """Frames under a budget. Not thread-safe: callers hold a lock.

    byte_budget: bytes of frames kept, >= 0; a frame larger than that is not kept. An evicted
    frame is forgotten, not copied elsewhere. pinned: ids of videos whose frames are not evicted;
    where they fill the budget, others are not kept.
    """

    def __init__(self, name: str, byte_budget: int) -> None:
        ok = is_whole(byte_budget) and byte_budget >= 0
        require("FrameStore", name, byte_budget, ok, "a whole number of bytes >= 0")
        self.byte_budget = int(byte_budget)
        self.pinned: Collection[str] = ()
        self.bytes = 0
        self.evictions = 0
        self._frames: OrderedDict[FrameKey, Frame] = OrderedDict()

    def __len__(self) -> int:
        return len(self._frames)

    def __contains__(self, key: FrameKey) -> bool:
        return key in self._frames

    def keys(self) -> KeysView[FrameKey]:
        return self._frames.keys()

    def get(self, key: FrameKey) -> Frame | None:
        """The frame, which counts as used now."""
        frame = self._frames.get(key)
        if frame is not None:
            self._frames.move_to_end(key)
        return frame

    def put(self, key: FrameKey, frame: Frame, beside: bool = False) -> bool:
        """Keep a frame at the cost of those not used for longest; whether it is kept.

        beside: only if it costs no other its place, and as the first to go.
        """
        if frame.nbytes + (self.bytes if beside else 0) > self.byte_budget:
            return False
        self._frames[key] = frame
        self._frames.move_to_end(key, last=not beside)
        self.bytes += frame.nbytes
        while self.bytes > self.byte_budget:
            victim = next((k for k in self._frames if k[0] not in self.pinned), key)
            self.bytes -= self._frames.pop(victim).nbytes
            self.evictions += 1
        return True

    def clear(self) -> None:
        """Forget every frame (counted as evictions)."""
        self.evictions += len(self._frames)
        self._frames.clear()
        self.bytes = 0

    def stats(self) -> dict[str, int]:
        return {
            "frames": len(self._frames),
            "bytes": self.bytes,
            "byte_budget": self.byte_budget,
            "evictions": self.evictions,
        }

    def check_integrity(self) -> None:
        """AssertionError when the books do not balance, or a frame keeps more memory than its
        own, or could be written to (tensors have no such switch)."""
        assert self.bytes == sum(f.nbytes for f in self._frames.values()), "bytes"
        assert self.bytes <= self.byte_budget, "over budget"
        for key, frame in self._frames.items():
            assert frame.ndim == 3 and str(frame.dtype).endswith("uint8"), key
            if isinstance(frame, np.ndarray):
                assert not frame.flags.writeable, key
                whole = frame.base if isinstance(frame.base, np.ndarray) else frame
                assert whole.nbytes == frame.nbytes, key
            else:
                assert frame.untyped_storage().nbytes() == frame.nbytes, key
