"""What a file's header would make a demuxer expand, summed up before a demuxer sees the file.

FFmpeg's demuxers keep one entry for each sample that a header declares, and some headers declare
many in few bytes. Containers that are not looked at here hold no such thing: MPEG streams, Ogg,
FLV, GIF and raw streams have no index, or one that is read with the packets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vtts_rt.video.container import Media, Window
from vtts_rt.video.limits import Opening, require_video

MIN_HEADER_BYTES = 1 << 20  # for names, tags and pictures, however few packets are allowed
# A cue takes 13 bytes, of which FFmpeg makes 100; of attached files it keeps a copy or two.
MATROSKA_SHARE, ATTACHMENT_SHARE = 4, 8
# Chunks of the index that one stream of an AVI may have: one takes a gigabyte as a rule.
MAX_AVI_INDEX_CHUNKS = 1 << 12
AVI_ENTRY_BYTES = 16
AVI_LISTS = (b"AVI ", b"AVIX", b"hdrl", b"strl")

# Elements of Matroska.
SEGMENT, CLUSTER, ATTACHMENTS, VOID = 0x18538067, 0x1F43B675, 0x1941A469, 0xEC
SEEK_HEAD, SEEK, SEEK_POSITION = 0x114D9B74, 0x4DBB, 0x53AC

# Boxes of MP4 and QuickTime (ISO/IEC 14496-12) that hold boxes, as FFmpeg's demuxer takes them.
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


def check_header(media: Media, opening: Opening) -> list[Track]:
    """ValueError for a file of which a demuxer would keep more than the bounds allow.

    The tracks of an MP4 or QuickTime file that has no fragments are given back.
    Headers are believed as demuxers believe them; one that is broken ends the look at it.
    """
    most_bytes = MIN_HEADER_BYTES + HEADER_BYTES_A_PACKET * opening.limits.max_packets
    with media.reader() as reader:
        data = Window(reader, media.num_bytes)
        head = data.at(0, 12)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            size, most = _matroska_header_bytes(data), most_bytes // MATROSKA_SHARE
            require_video(size <= most, _header_rule(most), f"{size} in {media.name}")
        elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
            opening.check_packets(_num_avi_entries(data, media.name), media.name)
        else:
            return _checked_mp4(data, opening, most_bytes, media.name)
    return []


def _matroska_header_bytes(data: Window) -> int:
    """Bytes of the elements that FFmpeg parses whole: those before the first cluster, and those
    that a SeekHead names (RFC 9559, 4.5 and 5.1)."""
    _, place, end = _element(data, 0)
    name, start, stop = _element(data, end)
    if name != SEGMENT:
        return 0
    parsed: dict[int, int] = {}  # place -> bytes
    heads, seen = [], set()
    place = start
    while place < min(stop, data.num_bytes):
        name, first, end = _element(data, place)
        if name in (0, CLUSTER):
            break
        if name == SEEK_HEAD:
            heads.append((first, min(end, data.num_bytes)))
        parsed[place] = _weight(name, min(end, data.num_bytes) - place)
        place = end
    while heads:
        first, last = heads.pop()
        if first in seen:
            continue
        seen.add(first)
        for target in _seek_targets(data, start, first, last):
            name, content, end = _element(data, target)
            end = min(end, data.num_bytes)
            if name not in (0, CLUSTER) and target < data.num_bytes:
                parsed[target] = _weight(name, end - target)
                if name == SEEK_HEAD:
                    heads.append((content, end))
    return sum(parsed.values())


def _weight(name: int, num_bytes: int) -> int:
    if name == ATTACHMENTS:
        return num_bytes // ATTACHMENT_SHARE
    return 0 if name == VOID else num_bytes


def _seek_targets(data: Window, segment: int, place: int, end: int) -> list[int]:
    targets = []
    while place < end:
        name, first, stop = _element(data, place)
        inner = first
        while name == SEEK and inner < min(stop, end):
            part, value, inner_end = _element(data, inner)
            if part == SEEK_POSITION and inner_end - value <= 8:
                targets.append(segment + data.number(value, inner_end - value))
            inner = max(inner_end, inner + 1)
        place = max(stop, place + 1)
    return targets


def _element(data: Window, place: int) -> tuple[int, int, int]:
    """(id, start, end) of an EBML element's content (RFC 8794, 4 to 6); id 0 for none. One of
    unknown size ends with the file."""
    first = data.number(place, 1)
    id_bytes = 9 - first.bit_length()
    head = data.number(place + id_bytes, 1)
    size_bytes = 9 - head.bit_length()
    if not first or id_bytes > 4 or not head:
        return 0, data.num_bytes, data.num_bytes
    mask = (1 << 7 * size_bytes) - 1
    size = data.number(place + id_bytes, size_bytes) & mask
    start = place + id_bytes + size_bytes
    return data.number(place, id_bytes), start, data.num_bytes if size == mask else start + size


def _num_avi_entries(data: Window, name: str) -> int:
    """Entries of an AVI's indices: idx1, and those that the super indices of its streams name (as
    often as they name them; OpenDML AVI File Format Extensions 1.02)."""
    entries, ranges = 0, [(0, data.num_bytes)]
    while ranges:
        place, stop = ranges.pop()
        while place + 8 <= stop:
            kind, size = data.at(place, 4), data.number(place + 4, 4, "little")
            start = place + 8
            if kind in (b"RIFF", b"LIST") and data.at(start, 4) in AVI_LISTS:
                ranges.append((start + 4, min(start + size, stop)))
            elif kind == b"idx1":
                entries += min(size, data.num_bytes - start) // AVI_ENTRY_BYTES
            elif kind == b"indx":
                entries += _num_indx_entries(data, start, name)
            place = start + size + size % 2
    return entries


def _num_indx_entries(data: Window, start: int, name: str) -> int:
    in_use = data.number(start + 4, 4, "little")
    if data.number(start + 3, 1):  # an index of chunks, not of indices
        return in_use
    rule = f"have at most {MAX_AVI_INDEX_CHUNKS} chunks of an AVI stream's index"
    require_video(in_use <= MAX_AVI_INDEX_CHUNKS, rule, f"{in_use} in {name}")
    chunks = (data.number(start + 24 + 16 * n, 8, "little") for n in range(in_use))
    # Behind the chunk's own head of 8 bytes.
    return sum(data.number(chunk + 12, 4, "little") for chunk in chunks)


def _header_rule(most_bytes: int) -> str:
    return f"have a header of at most {most_bytes} bytes (it grows with MediaLimits.max_packets)"


@dataclass(slots=True)
class Track:
    """Tables of a track, as raw numbers: stts (count, ticks), stsc (first chunk, samples, -),
    of all its boxes ctts (count, ticks). number: its ID."""

    number: int = 0
    is_sound: bool = False
    num_samples: int = 0
    same_size: bool = False
    num_chunks: int = 0
    stts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), ">u4"))
    stsc: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), ">u4"))
    ctts: list[np.ndarray] = field(default_factory=list)
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


def _checked_mp4(data: Window, opening: Opening, most_bytes: int, name: str) -> list[Track]:
    """ValueError for a file of which FFmpeg would keep more than the bounds allow, and for HEIF.

    most_bytes: of the movie box. Content of another kind holds no box that counts.
    """
    header = _Header(opening, most_bytes, name)
    header.read(data, 0, data.num_bytes, 0)
    return header.checked()


class _Header:
    """Sums up boxes wherever they stand: FFmpeg gives a table to the track before it."""

    def __init__(self, opening: Opening, most_bytes: int, name: str) -> None:
        self._opening, self._most_bytes, self._name = opening, most_bytes, name
        self._tracks: list[Track] = []
        self._num_boxes = self._num_bytes = self._num_fragment_samples = 0
        self._brands: set[bytes] = set()

    def checked(self) -> list[Track]:
        heif = self._brands & HEIF_BRANDS and b"avif" not in self._brands and not self._tracks
        rule = "be no HEIF picture (save it as JPEG, PNG or AVIF)"
        require_video(not heif, rule, self._name)
        entries = self._num_fragment_samples
        for track in self._tracks:
            # For every edit FFmpeg passes over the samples, and may take all of them.
            entries += track.num_entries() * track.num_edits
            self._opening.check_packets(entries, self._name)
        return [] if self._num_fragment_samples else self._tracks

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
                    self._tracks.append(Track())
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
                require_video(False, _header_rule(self._most_bytes), got)
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

    def _table(self, kind: bytes, track: Track, data: Window, start: int, stop: int) -> None:
        if kind == b"tkhd":
            track.number = data.number(start + (20 if data.number(start, 1) == 1 else 12), 4)
        elif kind == b"ctts":
            track.ctts.append(_numbers(data, start, stop, 2))
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
