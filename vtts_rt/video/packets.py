"""Reading the packets of an indexed stream from any of its keyframes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import av

from vtts_rt import process
from vtts_rt.video.container import Media, video_stream
from vtts_rt.video.index import PacketIndex, demuxed

# Half of the cores, as a model computes meanwhile, but two where there are two: 64 of 1,800 frames
# of 1280x720 H.264 take 1.4 s with two threads, 1.9 s with one, for 7 % more CPU time (30 frames of
# 640x360: 19 %, of 1920x1080: 5 %; VP9: 5 %). Beyond 8 they mostly add delay: each holds back one
# frame after a seek.
MAX_DECODER_THREADS = 8


def num_decoder_threads() -> int:
    cores = os.cpu_count() or 1
    return min(cores, max(2, cores // 2), MAX_DECODER_THREADS)


def open_stream(media: Media) -> tuple[Any, Any]:
    """A new (container, stream) of the first video stream, its decoder's threads set."""
    container = media.open()
    try:
        stream = video_stream(container, media.name)
        # Frame threads of other codecs (seen of VP9 and FFV1) carry what a broken packet leaves
        # behind to one or another of the next frames, by the order of reading.
        name = stream.codec_context.name
        stream.thread_type = "AUTO" if name in ("h264", "hevc") else "SLICE"
        # Slice threads of VP8 show damaged frames otherwise than one thread does, and by chance;
        # files of one token partition, as libvpx writes them, gain nothing from them.
        stream.thread_count = 1 if name == "vp8" else num_decoder_threads()
    except Exception:
        container.close()
        raise
    return container, stream


class PacketReader:
    """Packets by their ordinals in the file. Not thread-safe; opens the file when it must.

    start: ordinal that the last `start_at` came to; next: ordinal of the packet to come, -1 when
    nothing is open.
    """

    def __init__(self, media: Media, index: PacketIndex) -> None:
        self._media = media
        self._index = index
        self._container: Any = None
        self._packets: Iterator[Any] = iter(())
        self.stream: Any = None
        self.start = 0
        self.next = -1
        process.after_fork(self, PacketReader._abandon)

    def start_at(self, ordinal: int) -> None:
        """Go to a keyframe packet: by seeking, which flushes the decoder, or from the file's
        start with a new one."""
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
        self._packets = demuxed(self._container, self.stream)
        self.next = 0
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
            raise RuntimeError(f"the video {self._media.name} changed while it was open")
        self.next += 1
        return ordinal, packet

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container, self._packets, self.next = None, iter(()), -1

    def _abandon(self) -> None:
        """Forget what is open, as it is the parent's; freeing it would wait for its threads."""
        process.never_free(self._container, self._packets, self.stream)
        self._container = self.stream = None
        self._packets, self.next = iter(()), -1

    def _open(self) -> None:
        self._container, self.stream = open_stream(self._media)

    def _seek(self, goal: int, ordinal: int) -> bool:
        index = self._index
        if index.keys is None:
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
        self._packets = _chain(first, packets)
        self.next = at
        return self._skip_to(ordinal)

    def _skip_to(self, ordinal: int) -> bool:
        """Drops packets up to `ordinal`."""
        while self.next < ordinal and next(self._packets, None) is not None:
            self.next += 1
        self.start = self.next
        return self.next == ordinal


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
