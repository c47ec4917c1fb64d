"""What the headers of picture files say: their format, their frames, whether more follow."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vtts_rt.video.container import Window
from vtts_rt.video.limits import Opening, require_video

# How files of one picture begin, and Pillow's name of their format. PostScript, which Pillow has
# another program draw, is not among them.
_MAGICS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBPVP8[ LX]", "WEBP"),
        # The size of a BMP's second header, as its versions have it.
        (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", "BMP"),
        (rb"II[*+]\x00|MM\x00[*+]", "TIFF"),
        (rb"P[1-6][\s#]|Pf\s", "PPM"),
        (rb"\x00\x00\x00\x0cjP  \r\n\x87\n.{8}jp[2x] |\xff\x4f\xff\x51", "JPEG2000"),
        (rb"\x00\x00\x01\x00[^\x00]\x00.{3}\x00", "ICO"),
        (rb"8BPS\x00\x01", "PSD"),
        (rb"qoif", "QOI"),
        (rb"DDS \x7c\x00\x00\x00", "DDS"),
        (rb"\x01\xda[\x00\x01][\x01\x02]", "SGI"),
        (rb"\x59\xa6\x6a\x95", "SUN"),
    )
)
PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
# Files that hold the further views of one photo behind it say so in the first: the index of
# multi-picture files (CIPA DC-007), or a directory of Google's containers.
_JPEG_PHOTO = re.compile(rb"MPF\x00|Container:Directory")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_JUNK_BYTES = 4096
# Progressive JPEGs have some 10; every scan costs a pass over all pixels.
MAX_JPEG_SCANS = 500
# Of a frame that is to show for no time; browsers take as much (Chromium, ImageFrame).
NO_TIME_SECONDS = 0.1
# Of these Pillow composes some wrongly where there is transparency (seen of version 13).
DISPOSE_PREVIOUS_BLEND_OVER = bytes((2, 1))
WEBP_PART_BYTES = 1 << 18


def picture_format(head: bytes) -> str | None:
    """Pillow's name of a picture's format by its first 64 bytes; None for anything else."""
    if head[4:8] == b"ftyp":
        size = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[i : i + 4] for i in (8, *range(16, size, 4))}
        return "AVIF" if b"avif" in brands and b"avis" not in brands else None
    return next((name for magic, name in _MAGICS if magic.match(head)), None)


def picture_follows(kind: str, data: Window, name: str) -> bool:
    """Whether behind the first picture of a file the next one of its format begins.

    ValueError for a JPEG of more than 500 scans.
    """
    end = _ENDS[kind](data, name)
    return end is not None and picture_format(data.at(end, 64)) == kind


def png_durations(data: Window, opening: Opening, name: str) -> list[float]:
    """Seconds of each frame of an animated PNG (PNG specification, 11.3.6.2: fcTL); none of others.

    ValueError for one that Pillow would compose wrongly.
    """
    durations: list[float] = []
    has_alpha, is_mixed = data.number(25, 1) in (4, 6), False
    for kind, start, _ in png_chunks(data):
        has_alpha |= kind == b"tRNS"
        if kind == b"fcTL":
            is_mixed |= data.at(start + 24, 2) == DISPOSE_PREVIOUS_BLEND_OVER
            ticks, rate = data.number(start + 20, 2), data.number(start + 22, 2)
            durations.append(ticks / (rate or 100) or NO_TIME_SECONDS)
            opening.check_frames(len(durations), name)
            opening.check_time()
    rule = "be no PNG of transparent frames blended over each other and disposed to the previous"
    require_video(not (has_alpha and is_mixed), f"{rule} (save it as WebP)", name)
    return durations


def png_size(data: Window) -> tuple[int, int]:
    """(height, width) of a PNG."""
    return data.number(20, 4), data.number(16, 4)


def webp_header(data: Window, opening: Opening, name: str) -> tuple[int, int, list[float]]:
    """(height, width, seconds of each frame) of a WebP file; no seconds for a still one.

    The canvas is VP8X's, else the size in the head of the only frame (RFC 9649, 6386).
    """
    kind, start = data.at(12, 4), 20
    if kind == b"VP8 ":
        width, height = (data.number(start + 6 + 2 * i, 2, "little") & 0x3FFF for i in (0, 1))
        return height, width, []
    if kind == b"VP8L":
        bits = data.number(start + 1, 4, "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, []
    width, height = (data.number(start + 4 + 3 * i, 3, "little") + 1 for i in (0, 1))
    durations: list[float] = []
    if data.at(start, 1)[0] & 2:
        end = min(8 + data.number(4, 4, "little"), data.num_bytes)
        place = start - 8
        while place < end and len(durations) <= opening.limits.max_frames:
            part, at = data.at(place, WEBP_PART_BYTES) + bytes(24), 0
            while at <= len(part) - 48 or at == 0:
                if part[at : at + 4] == b"ANMF":
                    ticks = int.from_bytes(part[at + 20 : at + 23], "little")
                    durations.append(ticks / 1e3 or NO_TIME_SECONDS)
                size = int.from_bytes(part[at + 4 : at + 8], "little")
                at += size + size % 2 + 8
            place += at
        opening.check_frames(len(durations), name)
    return height, width, durations


def png_chunks(data: Window) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the content of each chunk, up to IEND (PNG specification, 5.3)."""
    start = len(PNG_START)
    while start + 12 <= data.num_bytes:
        head = data.at(start, 8)
        end = start + 8 + int.from_bytes(head[:4], "big")
        yield head[4:], start + 8, end
        if head[4:] == b"IEND":
            return
        start = end + 4


def _png_end(data: Window, name: str) -> int | None:
    return next((end + 4 for kind, _, end in png_chunks(data) if kind == b"IEND"), None)


def _jpeg_end(data: Window, name: str) -> int | None:
    """Where the next JPEG begins, behind at most 4 KiB of padding or junk; None for a photo that
    further views of it follow, or the film of it, and where there is none."""
    place, scans = 2, 0
    while (at := data.search(_JPEG_MARKER, place)) is not None:
        marker = data.at(at, 2)[1]
        if marker == 0xD9:
            place = at + 2
            behind = data.at(place, _JPEG_JUNK_BYTES)
            gap = -1 if behind[4:8] == b"ftyp" else behind.find(_JPEG_START)
            return None if gap < 0 else place + gap
        size = data.number(at + 2, 2)
        if 0xE0 <= marker <= 0xEF and _JPEG_PHOTO.search(data.at(at + 4, size)):
            return None
        scans += marker == 0xDA
        require_video(scans <= MAX_JPEG_SCANS, f"have at most {MAX_JPEG_SCANS} JPEG scans", name)
        place = at + 2 + size
    return None


def _bmp_end(data: Window, name: str) -> int | None:
    return data.number(2, 4, "little") or None


def _ppm_end(data: Window, name: str) -> int | None:
    """Of the binary ones; numbers as text end anywhere."""
    number = rb"(?:\s|#[^\n]*\n)+(\d{1,9})"
    depth = b"" if data.at(0, 2) == b"P4" else number
    head = re.match(rb"P[456]" + number + number + depth + rb"\s", data.at(0, 1024))
    if head is None:
        return None
    width, height = int(head[1]), int(head[2])
    if data.at(0, 2) == b"P4":
        return head.end() + (width + 7) // 8 * height
    values = width * height * (3 if data.at(0, 2) == b"P6" else 1)
    return head.end() + values * (1 if int(head[3]) < 256 else 2)


def _webp_end(data: Window, name: str) -> int | None:
    size = data.number(4, 4, "little")
    return 8 + size + size % 2


_ENDS = {"JPEG": _jpeg_end, "PNG": _png_end, "BMP": _bmp_end, "PPM": _ppm_end, "WEBP": _webp_end}
