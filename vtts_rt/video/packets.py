"""Reading the packets of an indexed stream from any of its keyframes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import av

from vtts_rt import process
from vtts_rt.video.container import Media, demuxed, video_stream
from vtts_rt.video.index import PacketIndex

# Half of the cores, as a model computes meanwhile, but two where there are two: 64 of 1,800 frames
# of 1280x720 H.264 take 1.4 s with two threads, 1.9 s with one, for 7 % more CPU time (30 frames of
# 640x360: 19 %, of 1920x1080: 5 %; VP9: 5 %). Beyond 8 they mostly add delay: each holds back one
# frame after a seek.
MAX_DECODER_THREADS = 8
USUAL_REORDER = 2  # frames that H.264 with B-frames as references holds back anyway
# Reading on costs less than a seek over so few packets.
SEEK_GAP_PACKETS = 8
# Decoders whose slices do not touch each other even where they are broken.
SLICED = frozenset({"dnxhd", "ffv1", "prores", "utvideo"})
# Decoders that are made anew in less time than it takes to open the file again.
RENEWED = SLICED | {"ffvhuff", "flv", "huffyuv", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4"}
RENEWED |= {"msmpeg4", "png", "qtrle", "vp8", "wmv2"}
# FFmpeg's names of what decoders look for and end a frame at (`ffmpeg -h full`, err_detect).
ERRORS = "crccheck+bitstream+buffer+explode"


def num_decoder_threads() -> int:
    cores = os.cpu_count() or 1
    return min(cores, max(2, cores // 2), MAX_DECODER_THREADS)


def open_stream(media: Media, exact: bool = True) -> tuple[Any, Any]:
    """A new (container, stream) of the video stream, its decoder's threads set.

    exact: what is broken is concealed, always in the same way; else it is an error.
    """
    container = media.open()
    try:
        stream = video_stream(container, media.name)
        if exact:
            _set_exact_threads(stream.codec_context)
            return container, stream
        options = {**media.codec_options, "err_detect": ERRORS}
        if stream.codec_context.name == "h264" and stream.codec_context.has_b_frames:
            # A thread that gives out the picture of another one that is at work does not know yet
            # whether it is damaged: have it wait until that one has ended.
            options["has_b_frames"] = str(USUAL_REORDER + num_decoder_threads())
        stream.codec_context.options = options
        # Frame threads of other codecs (seen of VP9) carry what a broken packet leaves behind to
        # one or another of the next frames, by the order of reading.
        name = stream.codec_context.name
        stream.thread_type = "AUTO" if name in ("h264", "hevc") else "SLICE"
        stream.thread_count = num_decoder_threads()
    except Exception:
        container.close()
        raise
    return container, stream


def _set_exact_threads(context: Any) -> None:
    context.thread_type = "SLICE"
    context.thread_count = num_decoder_threads() if context.name in SLICED else 1


def _like(context: Any, options: dict[str, str]) -> Any:
    """A new decoder of the same stream."""
    new = av.CodecContext.create(context.codec, "r")
    new.options = options
    new.extradata, new.codec_tag = context.extradata, context.codec_tag
    new.width, new.height, new.pix_fmt = context.width, context.height, context.pix_fmt
    new.bits_per_coded_sample = context.bits_per_coded_sample
    _set_exact_threads(new)
    return new


class Misplaced(RuntimeError):
    """A seek came to other packets than the index says: the next start reads from the file's."""


class PacketReader:
    """Packets by their ordinals in the file. Not thread-safe; opens the file when it must.

    exact: as of `open_stream`; every start has a new decoder then.
    start: ordinal that the last `start_at` came to; next: ordinal of the packet to come, -1 when
    nothing is open. context: the decoder.
    """

    def __init__(self, media: Media, index: PacketIndex, exact: bool = False) -> None:
        self._media = media
        self._exact = exact
        self._index = index
        self._container: Any = None
        self._packets: Iterator[Any] = iter(())
        self._sought = False
        self._seekable = index.keys is not None
        self.stream: Any = None
        self.context: Any = None
        self.start = 0
        self.next = -1
        process.after_fork(self, PacketReader._abandon)

    def start_at(self, ordinal: int) -> None:
        """Go to a keyframe packet: by seeking or reading on, which flushes the decoder, or from
        the file's start with a new one."""
        if self._container is not None and self._exact:
            if self.context.name not in RENEWED:
                self.close()
            else:
                self.context = _like(self.stream.codec_context, self._media.codec_options)
        gap = SEEK_GAP_PACKETS if self._seekable else self._index.num_packets
        if 0 <= self.next <= ordinal <= self.next + gap:
            self.context.flush_buffers()
            if self._skip_to(ordinal):
                return
        goal: int | None = ordinal
        # A seek may land late (a demuxer's index is of decode times): aim at earlier ones then.
        for _ in range(2):
            if goal is None or goal <= 0:
                break
            if self._seek(goal, ordinal):
                return
            goal = self._index.keyframe_before(goal)
        self.close()
        self._open()
        self._packets, self.next, self._sought = demuxed(self._container, self.stream), 0, False
        self._skip_to(ordinal)

    def take(self) -> tuple[int, Any] | None:
        """(ordinal, packet) of the next packet, None at the end of the indexed ones.

        RuntimeError when it is not the packet that was indexed there.
        """
        packet = next(self._packets, None)
        index, ordinal = self._index, self.next
        if packet is None or ordinal >= index.num_packets:
            return None
        if index.keys is not None and index.key_of(packet) != index.keys[ordinal]:
            self._media.check_unchanged()
            sought, name = self._sought, self._media.name
            self.close()
            self._seekable = False
            if sought:
                raise Misplaced(f"the video {name} cannot be sought in")
            raise RuntimeError(f"the video {name} changed while it was open")
        self.next += 1
        return ordinal, packet

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container, self._packets, self.next = None, iter(()), -1

    def _abandon(self) -> None:
        """Forget what is open, as it is the parent's; freeing it would wait for its threads."""
        process.never_free(self._container, self._packets, self.stream, self.context)
        self._container = self.stream = self.context = None
        self._packets, self.next = iter(()), -1

    def _open(self) -> None:
        self._container, self.stream = open_stream(self._media, self._exact)
        self.context = self.stream.codec_context

    def _seek(self, goal: int, ordinal: int) -> bool:
        index = self._index
        if not self._seekable:
            return False
        if self._container is None:
            self._open()
        try:
            self._container.seek(int(index.seek_times[goal]), stream=self.stream)
        except (av.FFmpegError, OSError, ValueError, OverflowError):
            self.close()
            return False
        packets = demuxed(self._container, self.stream)
        first = next(packets, None)
        at = None if first is None else index.ordinal_of(first)
        if at is None or at > ordinal:
            return False
        self._packets = chain([first], packets)
        self.next, self._sought = at, True
        return self._skip_to(ordinal)

    def _skip_to(self, ordinal: int) -> bool:
        """Drops packets up to `ordinal`."""
        while self.next < ordinal and next(self._packets, None) is not None:
            self.next += 1
        self.start = self.next
        return self.next == ordinal
