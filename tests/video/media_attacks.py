"""Small files whose headers declare much: what a demuxer or a decoder would expand."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


# -- MP4 and QuickTime ---------------------------------------------------------------------


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return u32(len(body) + 8) + kind + body


def track(
    num_samples: int = 10,
    *,
    steps: Sequence[tuple[int, int]] | None = None,
    edits: Sequence[tuple[int, int]] = (),
    size: int = 12,
    listed: int | None = None,
    handler: bytes = b"vide",
    codec: bytes = b"raw ",
    chunk_samples: int | None = None,
    chunks: int = 1,
    keys: Sequence[int] = (),
) -> bytes:
    """A track of raw 2 x 2 frames; edits: (duration, media time); listed: samples of its stsz."""
    steps = [(num_samples, 1)] if steps is None else steps
    entry = bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HH", 2, 2)
    entry += u32(0x480000, 0x480000, 0) + b"\0\1" + bytes(32) + b"\0\x18\xff\xff"
    tables = [
        box(b"stsd", u32(0, 1), box(codec, entry)),
        box(b"stts", u32(0, len(steps)), np.array(steps, ">u4").tobytes()),
        box(b"stsc", u32(0, 1, 1, chunk_samples or num_samples, 1)),
        box(b"stsz", u32(0, size, num_samples if listed is None else listed)),
        box(b"stco", u32(0, chunks), u32(*range(48, 48 + chunks))),
    ]
    if keys:
        tables.append(box(b"stss", u32(0, len(keys), *keys)))
    cuts = b""
    if len(edits):
        rows = np.array([(length, begin, 1 << 16) for length, begin in edits], ">u4")
        cuts = box(b"edts", box(b"elst", u32(0, len(edits)), rows.tobytes()))
    media = box(
        b"mdia",
        box(b"mdhd", u32(0, 0, 0, 25, num_samples) + bytes(4)),
        box(b"hdlr", u32(0, 0) + handler + bytes(13)),
        box(b"minf", box(b"vmhd", bytes(12)), box(b"stbl", *tables)),
    )
    head = u32(3, 0, 0, 1, 0, num_samples) + bytes(52) + u32(2 << 16, 2 << 16)
    return box(b"trak", box(b"tkhd", head), cuts, media)


def movie(*parts: bytes) -> bytes:
    return box(b"moov", box(b"mvhd", u32(0, 0, 0, 25, 100) + bytes(80)), *parts)


def mp4(*parts: bytes, compressed: bool = False) -> bytes:
    """ftyp, 4 KiB of samples, and a movie box of `parts`."""
    whole = movie(*parts)
    if compressed:
        packed = box(b"cmvd", u32(len(whole)), zlib.compress(whole))
        whole = box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), packed))
    return box(b"ftyp", b"qt  " + u32(0) + b"qt  ") + box(b"mdat", bytes(4096)) + whole


def fragment(num_samples: int) -> bytes:
    run = box(b"trun", u32(0, num_samples))
    return box(b"moof", box(b"mfhd", u32(0, 1)), box(b"traf", box(b"tfhd", u32(0x20000, 1)), run))


# -- pictures ------------------------------------------------------------------------------


def gif(num_frames: int, side: int = 1) -> bytes:
    image = b"\x2c" + struct.pack("<4H", 0, 0, side, side) + b"\0\2\2\x44\1\0"
    screen = b"GIF89a" + struct.pack("<2H", side, side) + b"\x80\0\0" + bytes(6)
    return screen + image * num_frames + b"\x3b"


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return u32(len(content)) + kind + content + u32(zlib.crc32(kind + content))


def png(side: int, frames: int = 0) -> bytes:
    """side x side RGB, of zeros; frames: what acTL says, none without."""
    packer = zlib.compressobj(9)
    row = bytes(3 * side + 1)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", u32(side, side) + b"\x08\2\0\0\0")
        + (png_chunk(b"acTL", u32(frames, 0)) if frames else b"")
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def webp(side: int, num_frames: int = 0) -> bytes:
    """The extended header of side x side and empty frames."""
    size = (side - 1).to_bytes(3, "little") * 2
    frame = b"ANMF" + struct.pack("<I", 16) + bytes(6) + size + (100).to_bytes(4, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + size + frame * num_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


# -- Matroska and AVI ----------------------------------------------------------------------


def element(name: str, content: bytes) -> bytes:
    return bytes.fromhex(name) + (1 << 56 | len(content)).to_bytes(8, "big") + content


def matroska(num_cues: int, before: bool) -> bytes:
    """before: the cues stand before the first cluster, else a SeekHead points to them."""
    cue = element("BB", element("B3", b"\1") + element("B7", element("F7", b"\1")))
    cues = element("1C53BB6B", cue * num_cues)
    shape = element("E0", element("B0", b"\2") + element("BA", b"\2"))
    numbers = element("D7", b"\1") + element("73C5", b"\1") + element("83", b"\1")
    entry = element("AE", numbers + element("86", b"V_MJPEG") + shape)
    head = element("1549A966", element("2AD7B1", b"\x0f\x42\x40")) + element("1654AE6B", entry)
    cluster = element("1F43B675", element("E7", b"\0"))
    seek = element("53AB", bytes.fromhex("1C53BB6B")) + element("53AC", bytes(8))
    length = len(element("114D9B74", element("4DBB", seek)))
    place = (length + len(head) + len(cluster)).to_bytes(8, "big")
    seek = element("53AB", bytes.fromhex("1C53BB6B")) + element("53AC", place)
    found = element("114D9B74", element("4DBB", seek))
    body = head + cues + cluster if before else found + head + cluster + cues
    return element("1A45DFA3", element("4282", b"matroska")) + element("18538067", body)


def avi(num_chunks: int, entries: int) -> bytes:
    """A super index that names one chunk of `entries` frames `num_chunks` times."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content

    index = struct.pack("<HBBI4sQI", 2, 0, 1, entries, b"00dc", 0, 0) + bytes(8 * entries)

    def written(place: int) -> tuple[bytes, bytes]:
        names = struct.pack("<QII", place, len(index), 1) * num_chunks
        above = struct.pack("<HBBI4s3I", 4, 0, 0, num_chunks, b"00dc", 0, 0, 0) + names
        stream = b"vidsMJPG" + bytes(12) + struct.pack("<4I", 1, 25, 0, 1000) + bytes(20)
        shape = struct.pack("<IiiHH4sIiiII", 40, 2, 2, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
        lists = chunk(b"strh", stream) + chunk(b"strf", shape) + chunk(b"indx", above)
        main = struct.pack("<14I", 40000, 0, 0, 16, 1000, 0, 1, 0, 2, 2, 0, 0, 0, 0)
        head = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + chunk(b"LIST", b"strl" + lists))
        return head, chunk(b"LIST", b"movi" + chunk(b"ix00", index))

    head, films = written(12 + len(written(0)[0]) + 12)
    return chunk(b"RIFF", b"AVI " + head + films)
