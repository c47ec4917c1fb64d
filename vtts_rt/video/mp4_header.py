"""What the boxes of an MP4 or QuickTime file would make a demuxer expand (ISO/IEC 14496-12).

Shape letters: N samples of a track, E edits.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field

import numpy as np

from vtts_rt.video.limits import Opening, require_video
from vtts_rt.video.window import Window

# Boxes that hold boxes, as FFmpeg's demuxer takes them.
CONTAINERS = frozenset(
    b"moov cmov trak mdia minf stbl edts udta meta mvex moof traf dinf wave tref".split()
)
SKIPPED = frozenset((b"mdat", b"free", b"skip", b"wide", b"uuid"))
MAX_DEPTH = 10
MAX_BOXES = 1 << 20
# Films are cut some hundred times. FFmpeg passes over the samples of a track for every edit.
MAX_EDITS = 10_000
MAX_EDIT_STEPS = 1 << 30
# Frames show up to so many samples away from where they are stored (H.264 and HEVC: 16).
REORDER_SAMPLES = 32
# FFmpeg reads uncompressed sound in pieces of 1024 samples, GSM in ones of 160.
PIECE_SAMPLES = 160
MAX_COMPRESSED_BYTES = 64 << 20  # of a movie box, as it is without compression
HEADER_BYTES_A_PACKET = 16  # those of a sample in the tables, or of a cue of Matroska
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2"))


@dataclass(slots=True)
class _Track:
    """Tables of a track, as raw numbers: stts (count, ticks), stsc (first chunk, samples, -)."""

    is_sound: bool = False
    timescale: int = 1
    num_samples: int = 0
    same_size: bool = False
    num_chunks: int = 0
    stts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), ">u4"))
    stsc: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), ">u4"))
    stss: np.ndarray | None = None
    elst: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @property
    def has_pieces(self) -> bool:
        """Whether FFmpeg reads it as uncompressed sound: samples of one size, a tick each."""
        one_tick = len(self.stts) == 1 and bool(self.stts[0, 1] == 1)
        return self.is_sound and self.same_size and one_tick

    def num_entries(self) -> int:
        """Entries of the index that FFmpeg makes of it, before edits."""
        if not self.has_pieces:
            return self.num_samples
        firsts = np.append(self.stsc[:, 0].astype(np.int64), self.num_chunks + 1)
        pieces = self.stsc[:, 1].astype(np.float64) // PIECE_SAMPLES + 1
        return int((np.diff(firsts).clip(0) * pieces).sum())

    def num_edited(self, movie_timescale: int) -> int:
        """Entries after the edits: every one brings the samples from the keyframe before it to the
        one behind it."""
        length = self.elst[:, 0] * (self.timescale / movie_timescale)
        if self.has_pieces:
            share = (length / max(self.num_samples, 1)).clip(0, 1)
            return int((share * self.num_entries() + 2 * REORDER_SAMPLES).sum())
        counts = np.diff(np.minimum(np.cumsum(self.stts[:, 0].astype(np.int64)), self.num_samples),
                         prepend=0)  # fmt: skip
        ends = np.cumsum(np.repeat(self.stts[:, 1].astype(np.float64), counts))
        starts = np.concatenate([[0.0], ends[:-1]])
        num = len(ends)
        keys = np.arange(num) if self.stss is None else self.stss.astype(np.int64) - 1
        keys = np.concatenate([[0], np.sort(keys[(keys > 0) & (keys < num)]), [num]])
        begin = self.elst[:, 1]
        first = np.searchsorted(starts, begin, "right") - 1 - REORDER_SAMPLES
        first = keys[np.searchsorted(keys, first.clip(0), "right") - 1]
        last = np.searchsorted(starts, begin + length, "left") + REORDER_SAMPLES
        last = keys[np.searchsorted(keys, last.clip(0, num), "left")]
        return int((last - first).clip(1).sum())


def header_rule(most_bytes: int) -> str:
    return f"have a header of at most {most_bytes} bytes (it grows with MediaLimits.max_packets)"


def check_mp4(data: Window, opening: Opening, most_bytes: int, name: str) -> None:
    """ValueError for a file of which FFmpeg would keep more than the bounds allow, and for HEIF.

    most_bytes: of the movie box. Content of another kind holds no box that counts.
    """
    header = _Header(opening, most_bytes, name)
    header.read(data, 0, data.num_bytes, 0)
    header.check()


class _Header:
    """Sums up boxes wherever they stand: FFmpeg gives a table to the track before it."""

    def __init__(self, opening: Opening, most_bytes: int, name: str) -> None:
        self._opening, self._most_bytes, self._name = opening, most_bytes, name
        self._tracks: list[_Track] = []
        self._movie_timescale = 1
        self._num_boxes = self._num_bytes = self._num_fragment_samples = 0
        self._brands: set[bytes] = set()

    def check(self) -> None:
        heif = self._brands & HEIF_BRANDS and b"avif" not in self._brands and not self._tracks
        rule = "be no HEIF picture (save it as JPEG, PNG or AVIF)"
        require_video(not heif, rule, self._name)
        entries = self._num_fragment_samples
        for track in self._tracks:
            steps = len(track.elst) * track.num_samples
            rule = f"have at most {MAX_EDIT_STEPS} samples times edits"
            require_video(steps <= MAX_EDIT_STEPS, rule, f"{steps} in {self._name}")
            self._opening.check_packets(entries + track.num_entries(), self._name)
            several = len(track.elst) > 1
            entries += track.num_edited(self._movie_timescale) if several else track.num_entries()
            self._opening.check_packets(entries, self._name)

    def read(self, data: Window, place: int, end: int, depth: int) -> None:
        while place + 8 <= end and depth <= MAX_DEPTH:
            head = data.at(place, 16)
            size, kind, start = int.from_bytes(head[:4], "big"), head[4:8], place + 8
            if size == 1:
                size, start = int.from_bytes(head[8:], "big"), place + 16
            stop = end if size == 0 else min(place + size, end)
            if stop < start:
                return
            self._num_boxes += 1
            if self._num_boxes > MAX_BOXES:
                require_video(False, f"have at most {MAX_BOXES} boxes", f"more in {self._name}")
            if kind in CONTAINERS:
                if kind == b"trak":
                    self._tracks.append(_Track())
                full = kind == b"meta" and data.at(start + 4, 4) != b"hdlr"
                self.read(data, start + 4 * full, stop, depth + 1)
            elif kind not in SKIPPED:
                self._leaf(kind, data, start, stop, depth)
            place = stop

    def _leaf(self, kind: bytes, data: Window, start: int, stop: int, depth: int) -> None:
        if depth or kind in (b"sidx", b"ssix"):
            self._num_bytes += (stop - start) * (kind != b"trun")
            if self._num_bytes > self._most_bytes:
                got = f"{self._num_bytes} or more in {self._name}"
                require_video(False, header_rule(self._most_bytes), got)
        if kind == b"ftyp":
            brands = data.at(start, min(stop - start, 256))
            self._brands = {brands[i : i + 4] for i in (0, *range(8, len(brands), 4))}
        elif kind == b"trun":
            self._num_fragment_samples += data.number(start + 4, 4)
            self._opening.check_packets(self._num_fragment_samples, self._name)
        elif kind == b"cmvd":
            self._compressed(data, start, stop, depth)
        elif kind == b"mvhd":
            self._movie_timescale = max(self._time_scale(data, start), 1)
        elif self._tracks:
            self._table(kind, self._tracks[-1], data, start, stop)

    def _table(self, kind: bytes, track: _Track, data: Window, start: int, stop: int) -> None:
        if kind == b"mdhd":
            track.timescale = self._time_scale(data, start)
        elif kind == b"hdlr":
            track.is_sound = data.at(start + 8, 4) == b"soun"
        elif kind in (b"stsz", b"stz2"):
            track.num_samples = max(track.num_samples, data.number(start + 8, 4))
            track.same_size = kind == b"stsz" and data.number(start + 4, 4) > 0
        elif kind in (b"stco", b"co64"):
            track.num_chunks = max(track.num_chunks, data.number(start + 4, 4))
        elif kind == b"stts":
            track.stts = _numbers(data, start, stop, 2)
        elif kind == b"stsc":
            track.stsc = _numbers(data, start, stop, 3)
        elif kind == b"stss":
            track.stss = _numbers(data, start, stop, 1)[:, 0]
        elif kind == b"elst":
            wide = data.number(start, 1) == 1
            entry = np.dtype([("length", ">u8" if wide else ">u4"),
                              ("begin", ">i8" if wide else ">i4"), ("rate", ">u4")])  # fmt: skip
            count = min(data.number(start + 4, 4), (stop - start - 8) // entry.itemsize)
            rule = f"have at most {MAX_EDITS} edits a track"
            require_video(count <= MAX_EDITS, rule, f"{count} in {self._name}")
            edits = np.frombuffer(data.at(start + 8, max(count, 0) * entry.itemsize), entry)
            edits = edits[edits["begin"] >= 0]  # the others show nothing
            track.elst = np.stack([edits["length"], edits["begin"]], 1).astype(np.float64)

    def _compressed(self, data: Window, start: int, stop: int, depth: int) -> None:
        """A movie box in zlib's format (QuickTime File Format, "Compressed movie resources")."""
        rule = f"have a movie box of at most {MAX_COMPRESSED_BYTES} bytes"
        size = data.number(start, 4)
        require_video(size <= MAX_COMPRESSED_BYTES, rule, f"{size} in {self._name}")
        try:
            content = zlib.decompressobj().decompress(data.at(start + 4, stop - start - 4), size)
        except zlib.error:
            return  # FFmpeg gives up on it
        self.read(Window(io.BytesIO(content), len(content)), 0, len(content), depth + 1)

    @staticmethod
    def _time_scale(data: Window, start: int) -> int:
        return data.number(start + (20 if data.number(start, 1) == 1 else 12), 4)


def _numbers(data: Window, start: int, stop: int, columns: int) -> np.ndarray:
    """A table of 32-bit numbers behind its count; as many whole rows as there are."""
    count = min(data.number(start + 4, 4), max(stop - start - 8, 0) // (4 * columns))
    whole = data.at(start + 8, 4 * columns * count)
    count = len(whole) // (4 * columns)
    return np.frombuffer(whole[: 4 * columns * count], ">u4").reshape(count, columns)
