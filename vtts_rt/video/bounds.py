"""What a file's header would make a demuxer expand, summed up before a demuxer sees the file.

FFmpeg's demuxers keep one entry for each sample that a header declares, and some headers declare
many in few bytes. Containers that are not looked at here hold no such thing: MPEG streams, Ogg,
FLV, GIF and raw streams have no index, or one that is read with the packets.
"""

from __future__ import annotations

from vtts_rt.video.container import Media
from vtts_rt.video.limits import Opening, require_video
from vtts_rt.video.mp4_header import HEADER_BYTES_A_PACKET, check_mp4, header_rule
from vtts_rt.video.window import Window

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


def check_header(media: Media, opening: Opening) -> None:
    """ValueError for a file of which a demuxer would keep more than the bounds allow.

    Headers are believed as demuxers believe them; one that is broken ends the look at it.
    """
    most_bytes = MIN_HEADER_BYTES + HEADER_BYTES_A_PACKET * opening.limits.max_packets
    with media.reader() as reader:
        data = Window(reader, media.num_bytes)
        head = data.at(0, 12)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            size, most = _matroska_header_bytes(data), most_bytes // MATROSKA_SHARE
            require_video(size <= most, header_rule(most), f"{size} in {media.name}")
        elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
            opening.check_packets(_num_avi_entries(data, media.name), media.name)
        else:
            check_mp4(data, opening, most_bytes, media.name)


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
    if not first or id_bytes > 4:
        return 0, data.num_bytes, data.num_bytes
    head = data.number(place + id_bytes, 1)
    size_bytes = 9 - head.bit_length()
    if not head:
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
