"""What one `open_video` may take: the bounds of MediaLimits, and the time until a deadline."""

from __future__ import annotations

import math
import time

from vtts_rt.config import MediaLimits
from vtts_rt.errors import BadMedia

MAX_HELD_BYTES = 1 << 30  # of a content that is held in memory: downloads, .npy, WebP


class DeadlinePassed(Exception):
    """Private to vtts_rt.video: `open_video` raises a TimeoutError in its place.

    No OSError, which PyAV's callers take for the end of a file.
    """


def require_video(ok: bool, rule: str, got: str) -> None:
    """`types.require` for the content itself: the rule is a verb phrase, `got` a description."""
    if not ok:
        raise BadMedia(f"open_video: video must {rule}, got {got}")


class Opening:
    """One call of `open_video`. Thread-safe.

    limits: None for the defaults; a video that exceeds one is a BadMedia error that names it.
    deadline_seconds: `time.monotonic()` value; None for none.
    """

    def __init__(
        self, limits: MediaLimits | None = None, deadline_seconds: float | None = None
    ) -> None:
        self.limits = limits or MediaLimits()
        self._deadline = math.inf if deadline_seconds is None else deadline_seconds
        self._end = time.monotonic() + self.limits.max_open_seconds
        self._cancelled = False

    def end(self) -> None:
        """The video is open: frames are read however long after."""
        self._deadline = self._end = math.inf

    def cancel(self) -> None:
        """End what still works for the opening in other threads, at its next `check_time`."""
        self._cancelled = True

    def check_time(self) -> None:
        """DeadlinePassed after the deadline; BadMedia after `max_open_seconds`."""
        now = time.monotonic()
        if now >= self._deadline or self._cancelled:
            raise DeadlinePassed
        most = self.limits.max_open_seconds
        rule = f"open within {most} s (MediaLimits.max_open_seconds)"
        require_video(now < self._end, rule, "more")

    def seconds_left(self) -> float:
        """At least a millisecond, for what takes only more than none."""
        return max(min(self._deadline, self._end) - time.monotonic(), 1e-3)

    def check_pixels(self, height: int, width: int, name: str) -> None:
        got = f"{width} x {height} px in {name}"
        self._check("max_pixels", height * width, "pixels a frame", got)

    def check_frames(self, num_frames: int, name: str) -> None:
        self._check("max_frames", num_frames, "frames", f"{num_frames} or more in {name}")

    def check_packets(self, num_packets: int, name: str) -> None:
        self._check("max_packets", num_packets, "packets", f"{num_packets} or more in {name}")

    def check_counts(self, num_packets: int, num_frames: int, name: str) -> None:
        """Ends an opening that takes too long, or of a stream that is."""
        self.check_time()
        self.check_packets(num_packets, name)
        self.check_frames(num_frames, name)

    def check_bytes(self, num_bytes: int, name: str) -> None:
        self._check("max_bytes", num_bytes, "bytes", f"{num_bytes} in {name}")

    def check_held(self, num_bytes: int, name: str) -> None:
        """`check_bytes` of what is held in memory, at most 1 GiB."""
        self.check_bytes(num_bytes, name)
        rule = f"have at most {MAX_HELD_BYTES} bytes, as it is held in memory"
        require_video(num_bytes <= MAX_HELD_BYTES, rule, f"{num_bytes} in {name}")

    def _check(self, limit: str, value: int, unit: str, got: str) -> None:
        most = getattr(self.limits, limit)
        require_video(value <= most, f"have at most {most} {unit} (MediaLimits.{limit})", got)
