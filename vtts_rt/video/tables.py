"""The packets of a stream as the sample tables of an MP4 tell them, without a pass over them.

FFmpeg expands the tables when it opens a file (`stream.index_entries`) and keeps to itself only by
how much a packet shows later than it is decoded (ctts). Key frames of H.264 it marks by what the
packets say, not by the table: here the hash of the content passes on the packets' first bytes.

Sources: ISO/IEC 14496-12, 8.6; ISO/IEC 14496-15, 5.3 (units behind their lengths); ITU-T H.264,
7.3.1, 7.3.3, 7.4.3 and D.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

import av
import numpy as np

from vtts_rt.video.bounds import Track
from vtts_rt.video.container import demuxed
from vtts_rt.video.references import AVCC_LENGTH_AT, IDR, PPS, SPS, unescaped
from vtts_rt.video.timestamps import MISSING, mended_times

MIN_PACKETS = 1 << 12  # a pass over fewer takes less time than to check the tables
# Those that FFmpeg's demuxer gives as they are stored; it parses the others.
CODECS = frozenset({"h264", "hevc", "mjpeg", "mpeg4", "prores"})
SAMPLES = 64  # packets, all over the file, that are compared with what the tables say
# Packets whose first bytes do not tell whether FFmpeg takes them for key frames: it is asked.
MAX_ASKED = 512
NEAR_PACKETS = 64  # that a demuxer may give before the one that was sought
SEEK_BEFORE = 4  # a demuxer seeks by other times than decode times
MAX_OFFSET = 1 << 28  # ticks of ctts; FFmpeg ignores tables with larger ones
KEY, DISCARDED = 1, 2  # AVINDEX_KEYFRAME, AVINDEX_DISCARD_FRAME

SLICE, SEI, PASSED = 1, 6, (SPS, PPS, 6, 9, 12)  # 9: access unit delimiter, 12: filler
RECOVERY_POINT = 6
START_CODE = re.compile(rb"\0\0[\0-\2]")
# Second byte of a slice that begins the picture (first_mb_in_slice 0) and is of type P or B (0, 1,
# 5, 6): FFmpeg takes some I slices for key frames.
IS_INTER = np.zeros(256, bool)
for _prefix, _bits in ((0b11, 2), (0b1010, 4), (0b100110, 6), (0b100111, 6)):
    IS_INTER[_prefix << 8 - _bits : _prefix + 1 << 8 - _bits] = True


class Packets(NamedTuple):
    """What a pass finds: columns: (N, 5) int64 of pts, dts, byte position, size, duration, MISSING
    where there is none; shows: (N,) bool; keyframes: ordinals, ascending."""

    columns: np.ndarray
    shows: np.ndarray
    keyframes: list[int]


class SampleTable:
    """Made by `sample_table`; `look` at the content, then ask for the `packets`."""

    def __init__(self, columns: np.ndarray, flags: np.ndarray, avcc: bytes | None) -> None:
        self._columns, self._shows = columns, flags & DISCARDED == 0
        self._places, self._sizes = columns[:, 2], columns[:, 3]
        self._length_bytes = (avcc[AVCC_LENGTH_AT] & 3) + 1 if avcc else 0
        # Whether they are key frames, -1 where that is not known.
        self._keys = np.full(len(flags), -1, np.int8) if avcc else (flags & KEY).astype(np.int8)
        self._by_place = np.argsort(self._places, kind="stable")
        self._in_order = self._places[self._by_place]

    def look(self, start: int, data: memoryview) -> None:
        """Takes a part of the content, at byte `start`; in any order, by any thread."""
        if not self._length_bytes:
            return
        first, last = np.searchsorted(self._in_order, (start, start + len(data)))
        if first < last:
            which, begins = self._by_place[first:last], self._in_order[first:last] - start
            content = np.frombuffer(data, np.uint8)
            self._keys[which] = _key_frames(content, begins, self._sizes[which], self._length_bytes)

    def packets(self, container: Any, stream: Any, first: Packets) -> Packets | None:
        """What a pass over the container would find; None where that is not sure.

        first: what a pass over the beginning found. The container is read on other places. Only
        the duration of the packet that shows last, and of some others, is there.
        """
        columns, shows, keys = self._columns, self._shows, self._keys
        columns[:, 0] += first.columns[0, 0] - columns[0, 0]
        num_first = len(first.shows)
        agree = (
            (columns[:num_first, :4] == first.columns[:, :4]).all()
            and (shows[:num_first] == first.shows).all()
            and shows.any()
        )
        unknown = np.flatnonzero(keys < 0)
        times = columns[:, 0]
        if not agree or len(unknown) > MAX_ASKED or mended_times(times, columns[:, 1]) is not times:
            return None
        last = len(times) - 1
        shown = np.where(shows, times, MISSING)[::-1]
        sampled = {last - int(np.argmax(shown)), *np.linspace(0, last, SAMPLES).astype(int)}
        edges = np.flatnonzero(np.diff(shows))[:MAX_ASKED]
        sampled |= {*unknown.tolist(), *edges.tolist(), *(edges + 1).tolist()}
        for n in sorted(sampled):
            packet = self._packet(container, stream, n)
            if packet is None:
                return None
            told = (packet.pts, packet.dts, packet.pos, packet.size, packet.is_discard)
            if keys[n] not in (-1, packet.is_keyframe) or told != (*columns[n, :4], not shows[n]):
                return None
            keys[n], columns[n, 4] = packet.is_keyframe, packet.duration or 0
        keyframes = np.flatnonzero(keys).tolist()
        if [k for k in keyframes if k < num_first] != first.keyframes:
            return None
        return Packets(columns, shows, keyframes)

    def _packet(self, container: Any, stream: Any, n: int) -> Any:
        """The packet that the demuxer gives for the n-th."""
        try:
            time = int(self._columns[max(n - SEEK_BEFORE, 0), 1])
            container.seek(time, stream=stream, any_frame=True)
        except (av.FFmpegError, OSError, OverflowError):
            return None
        near = islice(demuxed(container, stream), NEAR_PACKETS)
        return next((packet for packet in near if packet.pos == self._places[n]), None)


def sample_table(
    container: Any, stream: Any, tracks: Iterable[Track], num_bytes: int
) -> SampleTable | None:
    """The table of the stream of an opened MP4 or QuickTime file.

    tracks: those of its header. num_bytes: of the content. None where there is no table, where a
    pass costs less, and where the pass may find something else: for other codecs than `CODECS`,
    fragments, several edits, packets that the file does not hold whole.
    """
    context = stream.codec_context
    name, avcc = context.codec.canonical_name, context.extradata or b""
    entries = getattr(stream, "index_entries", ())  # PyAV 17 has none
    found = [track for track in tracks if track.number == stream.id]
    if name not in CODECS or len(found) != 1 or len(entries) < MIN_PACKETS:
        return None
    if name == "h264" and (len(avcc) <= AVCC_LENGTH_AT or avcc[0] != 1):
        return None
    track, num = found[0], len(entries)
    if track.num_samples != num or track.num_edits != 1:
        return None
    listed = list(entries)
    dts, places, sizes, flags = (
        np.fromiter(map(attrgetter(field), listed), np.int64, num)
        for field in ("timestamp", "pos", "size", "flags")
    )
    if (sizes <= 0).any() or (places < 0).any() or (places > num_bytes - sizes).any():
        return None
    offsets = _offsets(track, num)
    if offsets is None:
        return None
    columns = np.stack([dts + offsets, dts, places, sizes, np.full(num, MISSING)], axis=1)
    return SampleTable(columns, flags, avcc if name == "h264" else None)


def _offsets(track: Track, num: int) -> np.ndarray | None:
    """(num,) ticks from decoding to showing, or so much more for all of them."""
    if not track.ctts:
        return np.zeros(num, np.int64)
    counts, offsets = track.ctts[0].astype(np.int64).T
    offsets = offsets.astype(np.int32).astype(np.int64)
    if len(track.ctts) > 1 or counts.sum() != num or (np.abs(offsets) > MAX_OFFSET).any():
        return None
    return np.repeat(offsets, counts)


def _key_frames(
    data: np.ndarray, begins: np.ndarray, sizes: np.ndarray, length_bytes: int
) -> np.ndarray:
    """(N,) int8, whether FFmpeg takes packets of H.264 for key frames: those with a slice of an IDR
    picture, or behind a recovery point. -1 where a simple look does not tell.

    data: uint8. begins, sizes: (N,) of the packets, of which the last may be cut off.
    """
    keys, recovers = np.full(len(begins), -1, np.int8), np.zeros(len(begins), bool)
    rows, at = np.arange(len(begins)), begins
    while len(rows):
        unit = at + length_bytes
        inside = unit + 2 <= np.minimum(begins + sizes, len(data))[rows]
        rows, at, unit = rows[inside], at[inside], unit[inside]
        length = np.zeros(len(rows), np.int64)
        for n in range(length_bytes):
            length = length << 8 | data[at + n]
        end, kind, second = unit + length, data[unit] & 0x1F, data[unit + 1]
        whole = (length > 0) & (end <= (begins + sizes)[rows])
        keys[rows[whole & (kind == IDR)]] = 1
        keys[rows[whole & (kind == SLICE) & IS_INTER[second]]] = 0
        keys[rows[whole & (kind == SLICE) & recovers[rows]]] = 1
        passed = whole & (end <= len(data)) & np.isin(kind, PASSED)
        for i in np.flatnonzero(passed & (length > 2)):
            recovery = _is_recovery_point(data[unit[i] : end[i]].tobytes())
            passed[i] = recovery is not None
            recovers[rows[i]] |= bool(recovery)
        rows, at = rows[passed], end[passed]
    return keys


def _is_recovery_point(unit: bytes) -> bool | None:
    """Whether a unit holds the message that pictures are whole from here on. None where that is
    not sure, as where FFmpeg takes it for several units."""
    if START_CODE.search(unit):
        return None
    data, at, found = unescaped(unit), 1, False
    while unit[0] & 0x1F == SEI and at + 2 < len(data):
        kind_and_size = []
        for _ in range(2):
            begin = at
            while at + 1 < len(data) and data[at] == 255:
                at += 1
            kind_and_size.append(255 * (at - begin) + data[at])
            at += 1
        kind, size = kind_and_size
        if kind == RECOVERY_POINT:
            if not size or at >= len(data) or not data[at] & 0x80:  # after how many pictures: 0
                return None
            found = True
        at += size
    return found
