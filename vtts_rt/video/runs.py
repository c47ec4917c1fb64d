"""One decoder on its way through a file, fed packet by packet from a keyframe on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container
from typing import Any

import av
import numpy as np

from vtts_rt.video.container import Media
from vtts_rt.video.index import PacketIndex, decoded
from vtts_rt.video.packets import SEEK_GAP_PACKETS, Misplaced, PacketReader
from vtts_rt.video.references import FrameNumbers, is_disposable, is_skipped_leading
from vtts_rt.video.unwritten import UnwrittenParts

# Codecs reorder by at most 16 frames; a frame not seen that long after its turn is lost.
REORDER_FRAMES = 16
MAX_ORDINAL = 1 << 62
# Decoders that show pictures although they have nothing that those refer to, on grey.
GROUNDLESS = frozenset(
    {"flv", "h263", "h263p", "mpeg4", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "wmv1", "wmv2"}
)
INTRA = 1  # AVPictureType


class Damaged(Exception):
    """A fast run met damage: what it would give from here on depends on how it got there."""


class Run:
    """A decoder of one video that starts at keyframes and is fed in the order of the file.

    A fast run uses threads, leaves out what is not wanted and nothing refers to, and raises
    `Damaged` at the first error that the decoder reports and at the first frame that is missing.
    It holds a frame back until all that was fed before it came out, as only then a decoder reports
    that a picture is damaged which this one may refer to; an exact run does so until all pictures
    came out that nothing refers to.
    What it gave before that is what an exact run gives. An exact run conceals damage as FFmpeg
    does by default, and gives the same frames always: no frame threads, a new decoder at every
    start, every packet from there on, but for broken ones that nothing refers to, and those of HEVC
    near a frame lost without an error: decoders carry what is left of them into later pictures, or
    drop what these refer to, so they are decoded for their own sake only.

    start: ordinal of the packet it was started at; ended: it was drained, only a start revives it;
    expected: frames that it was fed and has not given; failed: frames (of an exact run) whose
    packet did not decode. num_decoded: frames that came out. exact_groups: keyframes (of a fast
    run) that are whole only by what is before them, as pictures are refreshed bit by bit there:
    what follows them may depend on how far before them a run began.
    """

    def __init__(
        self,
        media: Media,
        index: PacketIndex,
        exact: bool,
        pixels: Callable[[Any], np.ndarray],
    ) -> None:
        self.packets = PacketReader(media, index, exact)
        self.start = 0
        self.ended = True
        self.expected: set[int] = set()
        self._held: dict[int, np.ndarray | None] = {}
        self.failed: set[int] = set()
        self._disposable: set[int] = set()  # packets that nothing refers to
        # Of those, by where it starts, the ones that an exact run leaves out.
        self._left_out: defaultdict[int, set[int]] = defaultdict(set)
        self.num_decoded = 0
        self.exact_groups: set[int] = set()
        self._index = index
        self._exact = exact
        self._pixels = pixels
        self._latest = -1
        self._grounded = True
        self._numbers: FrameNumbers | None = None
        self._unwritten = UnwrittenParts()

    def close(self) -> None:
        self.packets.close()
        self._unwritten.forget()
        self.ended = True

    def start_at(self, ordinal: int, find_all: bool = False) -> None:
        """Go to a keyframe packet. find_all: give the frames of packets to leave out too, once."""
        if not self.ended and not self._exact:
            self._drain()
        self.ended = True
        self.packets.start_at(ordinal)
        self.start, self.ended = self.packets.start, False
        if find_all:
            self._left_out.pop(self.start, None)
        self._latest = -1
        self.expected.clear()
        self._held.clear()
        self.failed.clear()
        context = self.packets.context
        self._grounded = context.name not in GROUNDLESS
        self._numbers = None
        if context.name == "h264" and not self._exact:
            self._numbers = FrameNumbers(context.extradata)

    def reaches(self, frame: int) -> bool:
        """Whether the frame may still come out without another start."""
        index = self._index
        if self.ended:
            return False
        if frame in self.expected or self._held.get(frame) is not None:
            return True
        start = index.start_for(frame)
        near = self._exact or start <= self.packets.next + SEEK_GAP_PACKETS
        return near and self.start <= start and int(index.packet_of[frame]) >= self.packets.next

    def is_past(self, frame: int) -> bool:
        """Whether the frame does not come any more."""
        return self.ended or (frame not in self._held and self._latest > frame + REORDER_FRAMES)

    def feed(
        self,
        wanted: Container[int],
        end: bool = False,
        shows: Callable[[int], bool] = lambda frame: False,
    ) -> list[tuple[int, np.ndarray | None]]:
        """Gives the decoder its next packet (or the end); what came out, by frame index, with the
        pixels of what `shows` says yes to.

        wanted: frames not to leave out. An exact run that finds a packet to leave out goes back to
        its start, and gives the frames before that packet again.
        No decoded frame outlives the call: decoders use the memory of frames again, and where
        they leave parts of it as it was, the frames in use decide which memory that is.
        """
        index = self._index
        try:
            taken = None if end else self.packets.take()
        except Misplaced:
            if not self._exact:
                raise Damaged from None
            self.start_at(self.start)
            return []
        context = self.packets.context
        shown = -1
        if taken is None:
            self.ended = True
            ordinal, packet = 0, None
        else:
            ordinal, packet = taken
            order = int(index.order[ordinal])
            if not self._exact:
                self._check_numbers(packet, ordinal)
            # What follows a keyframe in the file but shows before it (an open group of pictures)
            # refers to what this decoder has not seen.
            if self.start > 0 and order < index.order[self.start]:
                return []
            shown = int(index.frame_of[ordinal])
            # Frames that nothing refers to need no decoding unless asked for: with 2 B-frames,
            # 30 of 600 frames took 379 decoded frames instead of 552, the same pixels.
            if is_disposable(context, packet):
                if shown not in wanted and (
                    not self._exact or ordinal in self._left_out[self.start]
                ):
                    return []
                self._disposable.add(ordinal)
            leads = order < index.order[index.keyframe_before(ordinal + 1)]
            if self._clears_memory() and not leads and is_skipped_leading(context, packet):
                raise Damaged
            if shown >= 0:
                self.expected.add(shown)
        try:
            frames = decoded(context, packet, ordinal)
        except (av.FFmpegError, OSError):
            if not self._exact:
                raise Damaged from None
            if ordinal in self._left_out[self.start]:
                self.ended = True
            elif ordinal in self._disposable:
                self._leave_out(ordinal)
            self.failed.add(shown)
            return []
        if not self._exact and any(frame.is_corrupt for frame in frames):
            raise Damaged
        clears = self._clears_memory()
        if clears and any(map(self._unwritten.are_in, frames)):
            raise Damaged
        self.num_decoded += len(frames)
        spoiling = -1
        for frame in frames:
            if not self._grounded and int(frame.pict_type) != INTRA:
                continue
            self._grounded = True
            i = int(index.frame_of[frame.pts]) if 0 <= frame.pts < index.num_packets else -1
            if i < 0:
                continue
            self.expected.discard(i)
            if not self._exact and self.expected and min(self.expected) < i:
                raise Damaged  # a frame before it did not come
            self._latest = max(self._latest, i)
            self._held[i] = self._pixels(frame) if shows(i) else None
            left_out = frame.pts in self._left_out[self.start]
            if left_out or (frame.is_corrupt and frame.pts in self._disposable):
                spoiling = frame.pts
                break
        if clears:
            self._unwritten.recycle(frames)
        missing = self._first_missing()
        if spoiling < 0 or missing < 0:
            return self._released(missing)
        before = self._released(min(spoiling, missing))
        before.append((i, self._held.pop(i)))  # it does not come again
        self._leave_out(spoiling)
        return before

    def _first_missing(self) -> int:
        """The first packet whose frame may come yet and tell of damage in those behind it."""
        packet_of = self._index.packet_of
        if not self._exact:
            if self.expected and self.ended:
                raise Damaged
            return min((int(packet_of[i]) for i in self.expected), default=MAX_ORDINAL)
        lost = {i for i in self.expected if self.is_past(i)}
        self.expected -= lost
        # HEVC without an error: what nothing refers to may have thrown out what these refer to.
        hevc = self.packets.context.name == "hevc"
        silent = {int(packet_of[i]) for i in lost - self.failed if hevc}
        left_out = self._left_out[self.start]
        near = min(silent, default=MAX_ORDINAL) - REORDER_FRAMES
        suspects = {d for d in self._disposable if near <= d < self.packets.next} - left_out
        if suspects:
            self._leave_out(*suspects)
            return -1
        if silent & left_out:
            self.ended = True
            return -1
        fed = {int(packet_of[i]) for i in self.expected}
        return min(fed & self._disposable, default=MAX_ORDINAL)

    def _released(self, end: int) -> list[tuple[int, np.ndarray | None]]:
        """Frames of packets in front of `end`, of those that were held back."""
        free = [i for i in self._held if self._index.packet_of[i] < end]
        return [(i, self._held.pop(i)) for i in free]

    def _leave_out(self, *ordinals: int) -> None:
        """Start again without some packets."""
        self._left_out[self.start].update(ordinals)
        self.start_at(self.start)

    def _clears_memory(self) -> bool:
        return not self._exact and self.packets.context.name == "hevc"

    def _drain(self) -> None:
        """Take out frames that a flush would give back as they are, and errors of threads at work:
        what these leave behind in a decoder outlasts a flush."""
        try:
            frames = decoded(self.packets.context, None, 0)
            if self._clears_memory():
                self._unwritten.recycle(frames)
        except (av.FFmpegError, OSError):
            self.close()

    def _check_numbers(self, packet: Any, ordinal: int) -> None:
        """Damage of H.264 that its decoder does not report."""
        if self._numbers is None:
            return
        if not self._numbers.follows(packet):
            raise Damaged
        if not self._numbers.is_intra and packet.is_keyframe:
            self.exact_groups.add(ordinal)
            if ordinal == self.start:
                raise Damaged
