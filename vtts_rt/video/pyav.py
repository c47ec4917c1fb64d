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
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np

from vtts_rt import process
from vtts_rt.types import VideoMetadata
from vtts_rt.video.container import Media
from vtts_rt.video.facts import VideoFacts
from vtts_rt.video.packets import SEEK_GAP_PACKETS
from vtts_rt.video.pixels import orient, to_rgb
from vtts_rt.video.runs import REORDER_FRAMES, Damaged, Run
from vtts_rt.video.source import FrameSource, derive_id, distinct_indices

logger = logging.getLogger(__name__)

DECODER = "pyav"
# Part of the video id, as caches of features hold what this conversion made.
CONVERSION = "swscale rgb24"
# Keyframes to go back where one does not show itself.
MAX_KEYFRAMES_BACK = 3
# Codecs whose damage shows: decoders report it, or Run finds it. Videos of others are only read in
# the one exact way.
REPORTING = frozenset({"h264", "hevc", "vp9", "av1"})


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the pixels of a frame come from: an exact run from `start` on. cut: the packet
    behind which the decoder is drained, None where the frame comes out by itself."""

    frame: int
    start: int
    cut: int | None = None


@dataclass(slots=True)
class _Survey:
    """What an exact run from one start is known to give: which of the frames before `settled`
    come out, and of which the packet does not decode."""

    settled: int
    frames: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)


class PyavSource(FrameSource):
    """The first video stream of a file or of bytes (cover art is not video).

    media: what to open; facts: what is known of its content.
    What a frame shows depends on the file alone, not on what else is read, the number of threads
    or chance: it is what a decoder of one thread gives from the keyframe before it on. More
    threads, skipped frames and seeks give the same pixels of a sound file; where there is
    damage, the group of pictures is decoded again in that one way. A packet of which no frame can
    be decoded so is served by the nearest earlier frame that can be, else by the next later one,
    counted in `frames_substituted` and logged once per source.
    index, matrix: the packet index, and the display matrix of the first frame.
    `read` raises RuntimeError when the file changed since, or after `close`.
    """

    # Not by its module, which may be gone when the interpreter ends and what is open is freed.
    _this_thread = staticmethod(threading.get_ident)

    def __init__(self, media: Media, facts: VideoFacts) -> None:
        self.media = media
        self._closed = False
        self.index = index = facts.index
        self.matrix = facts.matrix
        h, w = facts.stored_hw
        pixels = partial(to_rgb, height=h, width=w, matrix=facts.matrix, name=media.name)
        self._fast = Run(media, index, False, pixels)
        self._exact = Run(media, index, True, pixels)
        self._begin()
        process.after_fork(self, PyavSource._begin)
        self._reports = facts.codec in REPORTING
        self._damaged = self._fast.exact_groups  # starts of groups that only the exact run reads
        self._surveys: dict[int, _Survey] = {}
        self._places: dict[int, _Place | None] = {}
        self._stand_ins: dict[int, int] = {}
        height, width = orient(np.empty((h, w, 0), np.uint8), self.matrix).shape[:2]
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
        self._fast.ended = self._exact.ended = True

    @property
    def frames_codec_decoded(self) -> int:
        return self._fast.num_decoded + self._exact.num_decoded

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        indices = distinct_indices(frame_indices, self.index.num_frames)
        by_products = set(distinct_indices(passing, self.index.num_frames))
        self.media.check_usable(self._closed)
        return self._deliver(indices, by_products.difference(indices))

    def close(self) -> None:
        self._closed = True
        if self._holder == self._this_thread():
            return  # collected as garbage in the middle of a step, which then closes the runs
        with self._lock:
            self._close_runs()

    # -- reading ----------------------------------------------------------------------------

    def _deliver(self, indices: list[int], passing: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Runs of frames that one decoder passes on its way, one after another.

        The lock is held per step, never while the caller has a frame in hand.
        """
        runs = self._runs(indices)
        for n, run in enumerate(runs):
            pending = dict.fromkeys(run)
            while pending:
                thread = self._this_thread()
                with self._lock:
                    self._holder = thread
                    try:
                        self.media.check_usable(self._closed)
                        delivered = self._step(pending, passing, drain=n + 1 < len(runs))
                    finally:
                        if self._closed:
                            self._close_runs()
                        self._holder = 0
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
        start = self.index.start_for(target)
        if self._reports and start not in self._damaged:
            try:
                return self._read_fast(target, start, pending, passing, drain)
            except Damaged:
                self._fast.close()
                self._damaged.add(start)
        return self._read_damaged(target, pending, passing)

    def _read_fast(
        self, target: int, start: int, pending: dict[int, None], passing: set[int], drain: bool
    ) -> list[tuple[int, np.ndarray]]:
        """drain: end the decoder once it holds all of `pending`, as a seek comes next anyway."""
        run, index = self._fast, self.index
        if not run.reaches(target):
            run.start_at(start)
        last = max(int(index.packet_of[i]) for i in pending)
        wanted = pending.keys() | passing
        delivered: list[tuple[int, np.ndarray]] = []
        found = False

        def shows(i: int) -> bool:
            group = index.start_for(i)
            return i in wanted and run.start <= group and group not in self._damaged

        while not found:
            if run.is_past(target):
                raise Damaged
            for i, pixels in run.feed(wanted, drain and run.packets.next > last, shows):
                if pixels is not None:
                    delivered.append((i, pixels))
                    found = found or i in pending
        return delivered

    # -- damaged groups of pictures ---------------------------------------------------------

    def _read_damaged(
        self, target: int, pending: dict[int, None], passing: set[int]
    ) -> list[tuple[int, np.ndarray]]:
        start = self.index.start_for(target)
        survey = self._surveys.get(start)
        if survey is None or target >= survey.settled or target in survey.frames:
            wanted = {i for i in pending.keys() | passing if self.index.start_for(i) == start}
            found = self._read_exact(_Place(target, start), wanted)
            if found:
                return found
        place = self._place_of(target)
        if place is None:
            place = self._place_of(self._stand_in_of(target))
            assert place is not None, "stand-ins are frames that can be decoded"
            self._num_substituted += 1
        found = self._read_exact(place, {place.frame})
        assert found, "an exact run gives the same frames always"
        return [(target, dict(found)[place.frame])]

    def _read_exact(self, place: _Place, wanted: Container[int]) -> list[tuple[int, np.ndarray]]:
        """Decodes until the frame of `place` comes out; with it, wanted frames before it.
        Nothing if it does not come."""
        run = self._exact
        delivered: dict[int, np.ndarray] = {}
        if place.cut is not None or run.start != place.start or not run.reaches(place.frame):
            run.start_at(place.start)
        while not run.is_past(place.frame):
            end = place.cut is not None and run.packets.next > place.cut
            frames = run.feed((place.frame,), end, lambda i: i == place.frame or i in wanted)
            delivered.update((i, pixels) for i, pixels in frames if pixels is not None)
            if place.frame in delivered:
                return list(delivered.items())
        return []

    def _place_of(self, frame: int) -> _Place | None:
        """Where a frame of a damaged group can be decoded; None where it cannot."""
        if frame not in self._places:
            self._places[frame] = self._search(frame)
        return self._places[frame]

    def _search(self, frame: int) -> _Place | None:
        own = start = self.index.start_for(frame)
        if self._comes(frame, own):
            return _Place(frame, own)
        # What a broken or wrongly marked keyframe spoils, one before it may still give; and where
        # pictures are refreshed bit by bit, without keyframes, it takes long to see all of one.
        for _ in range(MAX_KEYFRAMES_BACK):
            first = int(self.index.frame_of[start])
            before = self.index.keyframe_before(start)
            if before is None or (first >= 0 and self._comes(first, start)):
                break
            start = before
            if self._comes(frame, start):
                return _Place(frame, start)
        # A broken packet behind it may have thrown it out of a decoder that still held it.
        if frame not in self._surveys[own].failed:
            place = _Place(frame, own, cut=int(self.index.packet_of[frame]))
            if self._read_exact(place, ()):
                return place
        return None

    def _comes(self, frame: int, start: int) -> bool:
        """Whether the frame comes out of an exact run from `start`."""
        survey = self._surveys.setdefault(start, _Survey(settled=0))
        if frame >= survey.settled:
            # Further than is asked for, by as much as leads there: what follows is often lost too.
            ahead = int(self.index.packet_of[frame]) - start + REORDER_FRAMES
            goal = min(frame + ahead, self.index.num_frames - 1)
            run = self._exact
            run.start_at(start, find_all=True)
            while not run.is_past(goal):
                survey.frames.update(i for i, _ in run.feed(()))
            survey.settled = goal + 1
            survey.failed |= run.failed
        return frame in survey.frames

    def _stand_in_of(self, target: int) -> int:
        """The nearest frame before `target` that can be decoded, else the nearest after it."""
        if target in self._stand_ins:
            return self._stand_ins[target]
        nearest = self._stand_ins.get(target - 1)  # of a frame that is lost too
        if nearest is None:
            before, after = range(target - 1, -1, -1), range(target + 1, self.index.num_frames)
            can_be = (i for i in chain(before, after) if self._place_of(i) is not None)
            nearest = next(can_be, None)
        if nearest is None:
            self.media.check_usable(self._closed)
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
        self._stand_ins[target] = nearest
        return nearest

    # -- the decoders -----------------------------------------------------------------------

    def _close_runs(self) -> None:
        self._fast.close()
        self._exact.close()
