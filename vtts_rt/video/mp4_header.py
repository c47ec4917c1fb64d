"""What the boxes of an MP4 or QuickTime file would make a demuxer expand (ISO/IEC 14496-12).

Shape letters: N samples of a track.
"""

from __future__ import annotations

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
# FFmpeg reads uncompressed sound in pieces of 1024 samples, GSM in ones of 160.
PIECE_SAMPLES = 160
HEADER_BYTES_A_PACKET = 16  # those of a sample in the tables, or of a cue of Matroska
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2"))


@dataclass(slots=True)
class _Track:
    """Tables of a track, as raw numbers: stts (count, ticks), stsc (first chunk, samples, -)."""

    is_sound: bool = False
    num_samples: int = 0
    same_size: bool = False
    num_chunks: int = 0
    stts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), ">u4"))
    stsc: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), ">u4"))
    num_edits: int = 1

    @property
    def has_pieces(self) -> bool:
        """Whether FFmpeg reads it as uncompressed sound: samples of one size, a tick each."""
        one_tick = len(self.stts) == 1 and bool(self.stts[0, 1] == 1)
        return self.is_sound and self.same_size and one_tick

    def num_entries(self) -> int:
        """Entries of the index that FFmpeg makes of it, for each edit."""
        if not self.has_pieces:
            return self.num_samples
        firsts = np.append(self.stsc[:, 0].astype(np.int64), self.num_chunks + 1)
        pieces = self.stsc[:, 1].astype(np.float64) // PIECE_SAMPLES + 1
        return int((np.diff(firsts).clip(0) * pieces).sum())


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
        self._num_boxes = self._num_bytes = self._num_fragment_samples = 0
        self._brands: set[bytes] = set()

    def check(self) -> None:
        heif = self._brands & HEIF_BRANDS and b"avif" not in self._brands and not self._tracks
        rule = "be no HEIF picture (save it as JPEG, PNG or AVIF)"
        require_video(not heif, rule, self._name)
        entries = self._num_fragment_samples
        for track in self._tracks:
            # For every edit FFmpeg passes over the samples, and may take all of them.
            entries += track.num_entries() * track.num_edits
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
            rule = "have a movie box that is not compressed (write the file anew)"
            require_video(False, rule, self._name)
        elif self._tracks:
            self._table(kind, self._tracks[-1], data, start, stop)

    def _table(self, kind: bytes, track: _Track, data: Window, start: int, stop: int) -> None:
        if kind == b"hdlr":
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
        elif kind == b"elst":
            columns, begin = (5, 2) if data.number(start, 1) == 1 else (3, 1)
            begins = _numbers(data, start, stop, columns)[:, begin]
            track.num_edits = max(int((begins < 1 << 31).sum()), 1)  # negative ones show nothing


def _numbers(data: Window, start: int, stop: int, columns: int) -> np.ndarray:
    """A table of 32-bit numbers behind its count; as many whole rows as there are."""
    count = min(data.number(start + 4, 4), max(stop - start - 8, 0) // (4 * columns))
    whole = data.at(start + 8, 4 * columns * count)
    count = len(whole) // (4 * columns)
    return np.frombuffer(whole[: 4 * columns * count], ">u4").reshape(count, columns)
