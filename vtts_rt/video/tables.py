"""The packets of a stream by the sample tables of an MP4, without a pass over them.

FFmpeg expands the tables when it opens a file (`stream.index_entries`); how much later than it is
decoded a packet shows (ctts) it does not tell. Key frames of H.264 it marks by what the packets
say: here the hash of the content passes on the bytes that say it.

Sources: ISO/IEC 14496-12, 8.6; ISO/IEC 14496-15, 5.3 (units behind their lengths); H.264, 7.3.3
and D.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple

import av
import numpy as np

from vtts_rt.video.bounds import Track
from vtts_rt.video.container import demuxed
from vtts_rt.video.references import AVCC_LENGTH_AT, IDR, PPS, SPS, unescaped
from vtts_rt.video.timestamps import MISSING, mended_times

MIN_PACKETS = 1 << 12  # a pass over fewer takes less time than to check the tables
# Codecs whose packets FFmpeg's demuxer gives as they are stored.
CODECS = frozenset({"h264", "hevc", "mjpeg", "mpeg4", "prores"})
SAMPLES = 64  # packets, all over the file, that are compared with what the demuxer gives
MAX_ASKED = 512  # H.264 packets of which only the demuxer can tell whether they are key frames
SEEK_BEFORE, NEAR_PACKETS = 4, 64  # a demuxer does not seek by decode times
MAX_OFFSET = 0x1000_0000  # ticks of ctts; FFmpeg ignores tables with larger ones
KEY, DISCARDED = 1, 2  # AVINDEX_KEYFRAME, AVINDEX_DISCARD_FRAME

MAX_UNITS = 16  # in front of a slice
# Of those, what is read byte by byte: x264 writes its settings in some 700 bytes. More, or more of
# them in one part of the content, is left to the demuxer.
MAX_UNIT_BYTES, MAX_READ = 1 << 12, 1 << 14
SLICE, SEI = 1, 6
IS_PASSED = np.isin(np.arange(32), (SEI, SPS, PPS, 9, 12))  # access unit delimiter, filler
# Second byte of a slice of type P or B (0, 1, 5, 6) with first_mb_in_slice 0: I slices may count as
# key frames.
IS_INTER = np.array([bool(re.match("11|1010|10011[01]", f"{byte:08b}")) for byte in range(256)])
START_CODE = re.compile(rb"\0\0[\0-\2]")
# Of SEI: type, and size as so many 255s and a rest.
MESSAGE, RECOVERY_POINT = re.compile(rb"(\xff*.)(\xff*)(.)", re.DOTALL), b"\6"


class Packets(NamedTuple):
    """What a pass finds. columns: (N, 5) int64, pts, dts, byte position, size and duration, MISSING
    where there is none. shows: (N,) bool. keyframes: ordinals, ascending."""

    columns: np.ndarray
    shows: np.ndarray
    keyframes: list[int]


class SampleTable:
    """Made by `sample_table`; `look` at the content, then ask for the `packets`.

    has_looked: called for the packets, returns when all of the content was looked at.
    """

    def __init__(self, columns: np.ndarray, flags: np.ndarray, length_bytes: int) -> None:
        """length_bytes: of the lengths before units of H.264, 0 for other codecs."""
        self._columns, self._length_bytes = columns, length_bytes
        self._shows = flags & DISCARDED == 0
        self.has_looked: Callable[[], object] = lambda: None
        # Whether they are key frames, -1 where that is not known.
        self._keys = np.full(len(flags), -1, np.int8) if length_bytes else flags & KEY
        self._by_place = np.argsort(columns[:, 2], kind="stable")
        self._places = columns[self._by_place, 2]

    def look(self, start: int, data: memoryview) -> None:
        """Takes a part of the content, at byte `start`; in any order, by any thread."""
        first, last = np.searchsorted(self._places, (start, start + len(data)))
        if self._length_bytes and first < last:
            which, begins = self._by_place[first:last], self._places[first:last] - start
            sizes = self._columns[which, 3]
            self._keys[which] = _key_frames(data, begins, sizes, self._length_bytes)

    def packets(self, container: Any, stream: Any, first: Packets) -> Packets | None:
        """What a pass over the container would find; None where that is not sure.

        first: what a pass over its beginning found. Durations are MISSING but for packets that
        were compared, of which the one that shows last is one. The container is read elsewhere.
        """
        columns, shows, keys, num_first = self._columns, self._shows, self._keys, len(first.shows)
        times = columns[:, 0]
        times += first.columns[0, 0] - times[0]
        if (
            not shows.any()
            or not np.array_equal(shows[:num_first], first.shows)
            or not np.array_equal(columns[:num_first, :4], first.columns[:, :4])
            or mended_times(times, columns[:, 1]) is not times
        ):
            return None
        self.has_looked()
        unknown = np.flatnonzero(keys < 0)
        if len(unknown) > MAX_ASKED:
            return None
        end = len(shows) - 1
        shows_last = end - int(np.argmax(np.where(shows, times, MISSING)[::-1]))
        edges = np.flatnonzero(np.diff(shows))[:MAX_ASKED]
        spread = np.linspace(0, end, SAMPLES).astype(int)
        for n in {shows_last, *np.concatenate([spread, unknown, edges, edges + 1]).tolist()}:
            packet = self._packet(container, stream, n)
            if packet is None or keys[n] not in (-1, packet.is_keyframe):
                return None
            told = (packet.pts, packet.dts, packet.pos, packet.size, packet.is_discard)
            if told != (*columns[n, :4], not shows[n]):
                return None
            keys[n], columns[n, 4] = packet.is_keyframe, packet.duration or 0
        keyframes = np.flatnonzero(keys).tolist()
        same = [k for k in keyframes if k < num_first] == first.keyframes
        return Packets(columns, shows, keyframes) if same else None

    def _packet(self, container: Any, stream: Any, n: int) -> Any:
        """The n-th packet as the demuxer gives it; None where it does not."""
        time, place = self._columns[max(n - SEEK_BEFORE, 0), 1], self._columns[n, 2]
        try:
            container.seek(int(time), stream=stream, any_frame=True)
        except (av.FFmpegError, OSError, OverflowError):
            return None
        near = islice(demuxed(container, stream), NEAR_PACKETS)
        return next((packet for packet in near if packet.pos == place), None)


def sample_table(
    container: Any, stream: Any, tracks: Iterable[Track], num_bytes: int
) -> SampleTable | None:
    """The table of the stream of an opened MP4 or QuickTime file.

    tracks: those of its header. num_bytes: of the content. None where there is none, a pass costs
    less, or a pass may find something else: codecs that FFmpeg parses, fragments, edits that leave
    samples out, packets that end behind the file or lie over each other.
    """
    context, entries = stream.codec_context, getattr(stream, "index_entries", ())  # not in PyAV 17
    name, num, length_bytes = context.codec.canonical_name, len(entries), 0
    found = [track for track in tracks if track.number == stream.id]
    nums = [(track.num_samples, int(track.stts[:, 0].sum())) for track in found]
    if name not in CODECS or num < MIN_PACKETS or nums != [(num, num)]:
        return None
    if name == "h264":
        avcc = context.extradata or b""
        if len(avcc) <= AVCC_LENGTH_AT or avcc[0] != 1:
            return None
        length_bytes = (avcc[AVCC_LENGTH_AT] & 3) + 1
    fields = map(attrgetter("timestamp", "pos", "size", "flags"), entries)
    dts, places, sizes, flags = (
        np.fromiter(chain.from_iterable(fields), np.int64, 4 * num).reshape(num, 4).T
    )
    offsets = np.zeros(num, np.int64)  # but for a number that is the same for all
    for ctts in found[0].ctts:
        counts, ticks = ctts.astype(np.int64)[:, 0], ctts[:, 1].astype(np.int32).astype(np.int64)
        if counts.sum() != num or (np.abs(ticks) > MAX_OFFSET).any():
            return None
        offsets = np.repeat(ticks, counts)
    inside = (sizes > 0) & (places >= 0) & (places <= num_bytes - sizes)
    if len(found[0].ctts) > 1 or found[0].num_edits > 1 or not inside.all():
        return None
    order = np.argsort(places, kind="stable")
    if (places[order][1:] < (places + sizes)[order][:-1]).any():  # bytes that count many times
        return None
    columns = np.stack([dts + offsets, dts, places, sizes, np.full(num, MISSING)], axis=1)
    return SampleTable(columns, flags, length_bytes)


def _key_frames(
    content: memoryview, begins: np.ndarray, sizes: np.ndarray, length_bytes: int
) -> np.ndarray:
    """(N,) int8, whether FFmpeg takes packets of H.264 for key frames: those with a slice of an IDR
    picture, or behind a recovery point. -1 where a simple look does not tell.

    begins, sizes: (N,) of the packets, of which the last may be cut off.
    """
    data = np.frombuffer(content, np.uint8)
    keys, recovers = np.full(len(begins), -1, np.int8), np.zeros(len(begins), bool)
    rows, at = np.arange(len(begins)), begins
    for _ in range(MAX_UNITS):
        unit, ends = at + length_bytes, (begins + sizes)[rows]
        inside = unit + 2 <= np.minimum(ends, len(data))
        rows, at, unit, ends = rows[inside], at[inside], unit[inside], ends[inside]
        length = np.zeros(len(rows), np.int64)
        for n in range(length_bytes):
            length = length << 8 | data[at + n]
        end, kind = unit + length, data[unit] & 0x1F
        whole = (length > 0) & (end <= ends)
        keys[rows[whole & (kind == IDR)]] = 1
        keys[rows[whole & (kind == SLICE) & IS_INTER[data[unit + 1]]]] = 0
        keys[rows[whole & (kind == SLICE) & recovers[rows]]] = 1
        passed = whole & (end <= len(data)) & IS_PASSED[kind] & (length <= MAX_UNIT_BYTES)
        read = np.flatnonzero(passed & (length > 2))
        passed[read[MAX_READ:]] = False
        for i in read[:MAX_READ]:
            recovery = _is_recovery_point(bytes(content[unit[i] : end[i]]))
            passed[i] = recovery is not None
            recovers[rows[i]] |= bool(recovery)
        rows, at = rows[passed], end[passed]
        if not len(rows):
            break
    return keys


def _is_recovery_point(unit: bytes) -> bool | None:
    """Whether a unit holds the message that pictures are whole from here on. None where that is
    not sure: they may be so later, or FFmpeg takes the unit for several."""
    data, at, found = unescaped(unit), 1, False
    while unit[0] & 0x1F == SEI and at + 2 < len(data) and (head := MESSAGE.match(data, at)):
        kind, at = head[1], head.end()
        if kind == RECOVERY_POINT:
            if head[3] == b"\0" or data[at : at + 1] < b"\x80":  # the count of pictures is not 0
                return None
            found = True
        at += 255 * len(head[2]) + head[3][0]
    return None if START_CODE.search(unit) else found
