"""Random access to the frames of a file through PyAV (FFmpeg).

Shape letters: H height, W width (px).

Frames are found by the presentation times of the packet index, never by counting what a decoder
gives: the index names the packet of a frame, decoding starts at the keyframe before it, and the
decoder carries the packet's ordinal over to the frame.

Pixels: converted to RGB by swscale with the colour matrix and range that FFmpeg takes from the
stream (BT.601 limited where it says nothing), alpha dropped, 10 bits and more rounded to 8. The
display matrix is applied (rotations by multiples of 90 degrees and mirroring, so that H and W
are those of the picture as shown); the sample aspect ratio is not: pixels stay as stored. Tested:
yuv420p yuvj420p yuv422p yuv444p yuv420p10le gray rgb24 bgr24 rgba yuva420p nv12 gbrp pal8 (GIF);
others work as far as swscale knows them. A stream that changes its size is scaled to the first
frame's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtts_rt import process
from vtts_rt.types import VideoMetadata
from vtts_rt.video.container import Media
from vtts_rt.video.facts import VideoFacts
from vtts_rt.video.index import decode_tagged
from vtts_rt.video.packets import PacketReader
from vtts_rt.video.pixels import orient, to_rgb
from vtts_rt.video.references import is_disposable
from vtts_rt.video.source import derive_id, distinct_indices

logger = logging.getLogger(__name__)

DECODER = "pyav"
# Part of the video id, as caches of features hold what this conversion made.
CONVERSION = "swscale rgb24"
# Decoding on costs less than a seek over so few packets.
SEEK_GAP_PACKETS = 8
# Decoders that are not told to skip: libdav1d looks at skip_frame only when it is opened, and would
# never give such frames again; FFmpeg's VP8 lets what it skipped show in damaged frames behind it.
NEVER_SKIPPED = ("libdav1d", "vp8")
# Codecs reorder by at most 16 frames; a frame not seen that long after its turn is lost.
REORDER_FRAMES = 16


@dataclass(slots=True, eq=False)
class _Cursor:
    """What a running decoder was given and gave since the reader's last start.

    latest: (frame index, av frame) of the last frame that came out.
    expected: wanted frames whose packet was fed and that have not come out.
    ended: the decoder was drained, so only a seek revives it.
    """

    latest: tuple[int, Any] | None = None
    expected: set[int] = field(default_factory=set)
    ended: bool = False


class PyavSource:
    """The first video stream of a file or of bytes (cover art is not video).

    media: what to open; facts: what is known of its content.
    A packet of which no frame can be decoded (a corrupt file) is served by the nearest earlier
    frame that can be, else by the next later one, counted in `frames_substituted` and logged
    once per source. index, matrix: the packet index, and the display matrix of the first frame.
    `read` raises RuntimeError when the file changed since, or after `close`.
    """

    def __init__(self, media: Media, facts: VideoFacts) -> None:
        self.media = media
        self._closed = False
        self._begin()
        process.after_fork(self, PyavSource._begin)
        self._stand_ins: dict[int, int] = {}
        self.frames_codec_decoded = 0
        self.frames_substituted = 0
        self.index = index = facts.index
        self._packets = PacketReader(media, index)
        self.matrix, self._stored_hw = facts.matrix, facts.stored_hw
        height, width = orient(np.empty((*self._stored_hw, 0), np.uint8), self.matrix).shape[:2]
        self.metadata = VideoMetadata(
            video_id=derive_id(facts.content_id, DECODER, CONVERSION),
            num_frames=index.num_frames,
            source_fps=index.source_fps,
            duration_seconds=index.duration_seconds,
            height=height,
            width=width,
            decoder=DECODER,
            timestamps_seconds=index.times_seconds,
        )

    def _begin(self) -> None:
        """Decode from nothing, as a forked child does."""
        self._lock = threading.Lock()
        self._holder = 0  # the thread that holds it
        self._cursor: _Cursor | None = None

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        indices = distinct_indices(frame_indices, self.index.num_frames)
        by_products = set(distinct_indices(passing, self.index.num_frames))
        self._check_usable()
        return self._deliver(indices, by_products.difference(indices, self._stand_ins))

    def close(self) -> None:
        self._closed = True
        if self._holder == threading.get_ident():
            return  # collected as garbage in the middle of a step, which then drops the cursor
        with self._lock:
            self._drop_cursor()

    def __enter__(self) -> PyavSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- reading ----------------------------------------------------------------------------

    def _deliver(self, indices: list[int], passing: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of frames that one decoder passes on its way, one after another.

        The lock is held per step, never while the caller has a frame in hand.
        """
        runs = self._runs(indices)
        for n, run in enumerate(runs):
            pending = dict.fromkeys(run)
            while pending:
                with self._lock:
                    self._check_usable()
                    self._holder = threading.get_ident()
                    try:
                        delivered = self._step(pending, passing, drain=n + 1 < len(runs))
                    finally:
                        self._holder = 0
                        if self._closed:
                            self._drop_cursor()
                for i, frame in delivered:
                    pending.pop(i, None)
                    passing.discard(i)
                    yield i, frame

    def _runs(self, indices: list[int]) -> list[list[int]]:
        """Ascending frames split where seeking on beats decoding on."""
        runs: list[list[int]] = []
        fed = 0
        for i in indices:
            if not runs or self.index.start_for(i) > fed + SEEK_GAP_PACKETS:
                runs.append([])
            runs[-1].append(i)
            fed = max(fed, int(self.index.packet_of[i]) + 1)
        return runs

    def _step(
        self, pending: dict[int, None], passing: set[int], drain: bool
    ) -> list[tuple[int, np.ndarray]]:
        """Decodes until at least one pending frame is there; with it, the by-products so far."""
        target = next(iter(pending))
        if target in self._stand_ins:
            return self._stand_in(target)
        found, before, after = self._decode(target, pending, passing, drain)
        if found:
            return found
        self._lose(target, pending, before, after)
        return self._stand_in(target)

    def _decode(
        self, target: int, pending: dict[int, None], passing: set[int], drain: bool
    ) -> tuple[list[tuple[int, np.ndarray]], int | None, int | None]:
        """As `_decode_until`, from other starts too if `target` does not come out."""
        start = self.index.start_for(target)
        runs_on = self._reaches(target, start)
        if not runs_on:
            self._start_at(start)
        found, before, after = self._decode_until(target, pending, passing, drain)
        # What a broken or wrongly marked keyframe spoils, the one before it may still give; and a
        # decoder that ran past a broken packet knows nothing of the frames around it.
        again = self.index.keyframe_before(start)
        if again is None and runs_on:
            again = start
        if not found and again is not None:
            self._start_at(again)
            found, before, after = self._decode_until(target, pending, passing, drain)
        if not found:
            # A broken packet behind it may have thrown it out of a decoder that still held it.
            self._start_at(start)
            found, _, _ = self._decode_until(target, {target: None}, set(), drain=True)
        return found, before, after

    def _reaches(self, target: int, start: int) -> bool:
        """Whether the running decoder gets to `target` without a seek."""
        cursor = self._cursor
        if cursor is None or cursor.ended or self._packets.start > start:
            return False
        if target in cursor.expected:
            return True
        ahead = int(self.index.packet_of[target]) >= self._packets.next
        return ahead and start <= self._packets.next + SEEK_GAP_PACKETS

    def _decode_until(
        self, target: int, pending: dict[int, None], passing: set[int], drain: bool
    ) -> tuple[list[tuple[int, np.ndarray]], int | None, int | None]:
        """Feeds packets until a pending frame comes out or `target` is past due.

        drain: end the decoder once it holds all of `pending`, as a seek comes next anyway.
        Returns (frames, nearest frame seen before the target, nearest seen after it).
        """
        cursor = self._cursor
        assert cursor is not None
        last = max(int(self.index.packet_of[i]) for i in pending)
        before = cursor.latest[0] if cursor.latest and cursor.latest[0] < target else None
        after: int | None = None
        delivered: list[tuple[int, np.ndarray]] = []
        while not cursor.ended:
            frames = self._feed(cursor, pending, passing, end=drain and self._packets.next > last)
            found = False
            for i, frame in frames:
                cursor.latest = (i, frame)
                cursor.expected.discard(i)
                self.frames_codec_decoded += 1
                if i in pending or (
                    i in passing and self._packets.start <= self.index.start_for(i)
                ):
                    delivered.append((i, self._pixels(frame)))
                    found = found or i in pending
                if i < target:
                    before = i if before is None else max(before, i)
                elif i > target:
                    after = i if after is None else min(after, i)
            if found:
                return delivered, before, after
            if cursor.latest is not None and cursor.latest[0] > target + REORDER_FRAMES:
                break
        return [], before, after

    def _feed(
        self, cursor: _Cursor, pending: dict[int, None], passing: set[int], end: bool
    ) -> list[tuple[int, Any]]:
        """Gives the decoder its next packet (or the end); what came out, by frame index."""
        taken = None if end else self._packets.take()
        index, stream = self.index, self._packets.stream
        if taken is None:
            cursor.ended = True
            frames = decode_tagged(stream, None, 0)
        else:
            ordinal, packet = taken
            shown = int(index.frame_of[ordinal])
            wanted = shown in pending
            if wanted:
                cursor.expected.add(shown)
            # Frames that nothing refers to need no decoding unless asked for: with 2 B-frames,
            # 30 of 600 frames took 379 decoded frames instead of 552, the same pixels.
            kept = wanted or shown in passing or stream.codec_context.name in NEVER_SKIPPED
            if not kept and is_disposable(stream.codec_context, packet):
                return []
            stream.codec_context.skip_frame = "DEFAULT" if kept else "NONREF"
            frames = decode_tagged(stream, packet, ordinal)
        known = [(int(index.frame_of[f.pts]), f) for f in frames if 0 <= f.pts < index.num_packets]
        return [(i, f) for i, f in known if i >= 0]

    # -- frames that cannot be decoded ------------------------------------------------------

    def _lose(
        self, target: int, pending: dict[int, None], before: int | None, after: int | None
    ) -> None:
        """Notes which frame stands in for `target` and for the pending ones lost with it."""
        nearest = before if before is not None else after
        if nearest is None:
            self._check_usable()
            raise RuntimeError(
                f"no frame near frame {target} of the video {self.media.name} can be decoded: "
                "repair or re-encode the file"
            )
        if not self._stand_ins:
            logger.warning(
                "%s: frame %d cannot be decoded, frame %d stands in for it (the count of such "
                "frames is in frames_substituted)",
                self.media.name,
                target,
                nearest,
            )
        gap_ends = after if after is not None else self.index.num_frames
        for i in pending:
            if target <= i < gap_ends:
                self._stand_ins[i] = nearest

    def _stand_in(self, target: int) -> list[tuple[int, np.ndarray]]:
        nearest = self._stand_ins[target]
        found, _, _ = self._decode(nearest, {nearest: None}, set(), drain=True)
        if not found:
            raise RuntimeError(
                f"frame {target} of the video {self.media.name} cannot be decoded, nor frame "
                f"{nearest} beside it: repair or re-encode the file"
            )
        self.frames_substituted += 1
        return [(target, found[0][1])]

    # -- the decoder ------------------------------------------------------------------------

    def _start_at(self, ordinal: int) -> None:
        """Puts the decoder at a keyframe packet."""
        self._cursor = None
        self._packets.start_at(ordinal)
        self._cursor = _Cursor()

    def _drop_cursor(self) -> None:
        self._packets.close()
        self._cursor = None

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError(f"the video {self.media.name} was closed: open it again")
        self.media.check_unchanged()

    def _pixels(self, frame: Any) -> np.ndarray:
        height, width = self._stored_hw
        return to_rgb(frame, height, width, self.matrix, self.media.name)
