"""Awkward video files that are made, not found, each with its truth: which frame shows what.

Frames carry their number as eight blocks, black or white, one per bit (`paint`, `read_code`).
"""

from __future__ import annotations

import ast
import functools
import io
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from clip_writer import write_video

H, W = 48, 64
FRAMES, GOP, FPS = 24, 12, 10.0


def paint(index: int) -> np.ndarray:
    """(48, 64, 3): bit b of index is the block at row b // 4, column b % 4."""
    bits = np.array([(index >> b) & 1 for b in range(8)], np.uint8).reshape(2, 4)
    grey = 40 + 170 * np.kron(bits, np.ones((H // 2, W // 4), np.uint8))
    return np.repeat(grey[..., None], 3, axis=2)


def read_code(frame: np.ndarray) -> int:
    """The index painted into a frame of any size, from the middle of each block."""
    h, w = frame.shape[:2]
    grey = frame.astype(np.float32).mean(axis=2)
    blocks = [
        grey[int((r + 0.3) * h / 2) : int((r + 0.7) * h / 2) + 1][
            :, int((c + 0.3) * w / 4) : int((c + 0.7) * w / 4) + 1
        ].mean()
        for r in range(2)
        for c in range(4)
    ]
    return sum(int(value > 125) << b for b, value in enumerate(blocks))


def painted(
    count: int = FRAMES, first: int = 0, hw: tuple[int, int] = (H, W)
) -> Iterator[np.ndarray]:
    """Frames first, first + 1, ... in any size (the blocks grow with it)."""
    rows, columns = (np.arange(n) * full // n for n, full in zip(hw, (H, W), strict=True))
    for index in range(first, first + count):
        yield paint(index)[rows][:, columns]


@dataclass(frozen=True)
class Case:
    """write(path) makes the file; suffix is its name's.

    codes: what each frame shows; hw: size as shown; turned: degrees counterclockwise that the
    picture is turned by. times: seconds of the frames, None where they do not matter.
    lost: frames of which nothing can be decoded and that nothing refers to, each served by a
        neighbour and counted. spoilt: frames that are damaged or refer to damaged ones: they
        come, in the right shape, but what they show is not defined.
    """

    write: Callable[[Path], object]
    suffix: str
    codes: Sequence[int] = tuple(range(FRAMES))
    hw: tuple[int, int] = (H, W)
    turned: int = 0
    times: Sequence[float] | None = None
    lost: frozenset[int] = frozenset()
    spoilt: frozenset[int] = field(default=frozenset())


def clip(path: Path | io.BytesIO, count: int = FRAMES, **options: Any) -> None:
    """A painted clip; `first` and `hw` as in `painted`, the rest as `write_video` takes it."""
    frames = painted(count, options.pop("first", 0), options.pop("hw", (H, W)))
    write_video(path, frames, **{"source_fps": FPS, "gop": GOP, **options})


class Packet(NamedTuple):
    """data, times in the stream's time base, and whether it is marked as a keyframe."""

    data: bytes
    pts: int
    dts: int
    key: bool
    duration: int


def packets_of(content: Path | bytes) -> list[Packet]:
    file: Any = io.BytesIO(content) if isinstance(content, bytes) else str(content)
    with av.open(file) as source:
        return [
            Packet(bytes(p), p.pts, p.pts if p.dts is None else p.dts, p.is_keyframe, p.duration)
            for p in source.demux(source.streams.video[0])
            if p.size
        ]


def remux(
    content: bytes,
    out: Path | Any,
    change: Callable[[list[Packet]], Iterable[Packet]] = lambda packets: packets,
    *,
    container: str | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """The first video stream of `content` with its packets changed, nothing encoded again."""
    target = str(out) if isinstance(out, Path) else out
    with (
        av.open(io.BytesIO(content)) as source,
        av.open(target, "w", format=container, options=options or {}) as made,
    ):
        stream = source.streams.video[0]
        # Opaque: without asking for an encoder, which some decoders have not got.
        copy = made.add_stream_from_template(stream, opaque=True)
        for packet in change(packets_of(content)):
            made.mux(av_packet(packet, copy, stream.time_base))


def av_packet(packet: Packet, stream: Any, time_base: Any) -> Any:
    made = av.Packet(packet.data)
    made.stream, made.time_base = stream, time_base
    made.pts, made.dts, made.duration = packet.pts, packet.dts, packet.duration
    made.is_keyframe = packet.key
    return made


@functools.cache
def _encoded(container: str, count: int, options: str) -> bytes:
    file = io.BytesIO()
    clip(file, count, container_format=container, **ast.literal_eval(options))
    return file.getvalue()


def encoded(container: str = "matroska", count: int = FRAMES, **options: Any) -> bytes:
    """A painted clip in memory; the same arguments are encoded once."""
    return _encoded(container, count, repr(options))


class Pipe:
    """A file that cannot seek: muxers can then write neither index nor duration."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def piped(path: Path, content: bytes, container: str) -> None:
    pipe = Pipe()
    remux(content, pipe, container=container)
    path.write_bytes(pipe.data)


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, body) of the MP4 boxes that `data` is made of."""
    found, at = [], 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        found.append((kind, data[at + 8 : at + size]))
        at += size
    return found


def with_edits(mp4: bytes, edits: Sequence[tuple[float, float | None]]) -> bytes:
    """An mp4 of one track, its index behind the data, with another edit list.

    edits: (seconds shown, second of the media they begin at; None: nothing shows).
    """
    with av.open(io.BytesIO(mp4)) as source:
        ticks = 1 / source.streams.video[0].time_base
    entries = [
        struct.pack(
            ">IiHH", round(1000 * shown), -1 if start is None else round(start * ticks), 1, 0
        )
        for shown, start in edits
    ]
    elst = box(b"elst", struct.pack(">II", 0, len(entries)), *entries)

    def track(body: bytes) -> bytes:
        parts = [(k, b) for k, b in boxes(body) if k != b"edts"]
        return b"".join([box(*parts[0]), box(b"edts", elst), *(box(k, b) for k, b in parts[1:])])

    def movie(body: bytes) -> bytes:
        return b"".join(box(k, track(b) if k == b"trak" else b) for k, b in boxes(body))

    return b"".join(box(k, movie(b) if k == b"moov" else b) for k, b in boxes(mp4))


def hide_vp8(packets: list[Packet], *hidden: int) -> list[Packet]:
    """Frames of VP8 made invisible: bit 4 of their first byte (RFC 6386, 9.1)."""
    return [
        p._replace(data=bytes([p.data[0] & ~0x10]) + p.data[1:]) if n in hidden else p
        for n, p in enumerate(packets)
    ]


def ivf_times(ivf: bytes, times: Callable[[int], int]) -> bytes:
    """An IVF file (32 bytes of header; size, time and data of each frame) with other times."""
    data, at, n = bytearray(ivf), 32, 0
    while at < len(data):
        size = struct.unpack_from("<I", data, at)[0]
        struct.pack_into("<Q", data, at + 4, times(n))
        at, n = at + 12 + size, n + 1
    return bytes(data)


def at_once(work: Callable[[int], object], seeds: Iterable[int]) -> None:
    """`work` of every seed, each in a thread of its own; returns when all have ended."""
    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def jpegs(count: int = FRAMES, **options: Any) -> list[bytes]:
    """Frames as JPEG images."""
    options = {"codec": "mjpeg", "pixel_format": "yuvj420p", **options}
    return [p.data for p in packets_of(encoded(count=count, **options))]


def with_cover(path: Path, content: bytes, image: np.ndarray) -> None:
    """The video of `content` behind a picture that players show for the file."""
    with av.open(io.BytesIO(content)) as source, av.open(str(path), "w") as made:
        art = made.add_stream("png", rate=1)
        art.height, art.width, art.pix_fmt = *image.shape[:2], "rgb24"
        art.disposition = av.stream.Disposition.attached_pic
        copy = made.add_stream_from_template(source.streams.video[0])
        made.mux(art.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        made.mux(art.encode(None))
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = copy
                made.mux(packet)


def together(path: Path, contents: Sequence[bytes]) -> None:
    """A sound track, then the video streams of all `contents`, in one file."""
    with av.open(str(path), "w") as made:
        sound = made.add_stream("pcm_s16le", rate=8000)
        opened = [av.open(io.BytesIO(content)) for content in contents]
        copies = [made.add_stream_from_template(c.streams.video[0]) for c in opened]
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.rate = 8000
        made.mux(sound.encode(frame))
        made.mux(sound.encode(None))
        for content, source, copy in zip(contents, opened, copies, strict=True):
            for packet in packets_of(content):
                made.mux(av_packet(packet, copy, source.streams.video[0].time_base))
            source.close()


def odd_sized(path: Path, codec: str, pixel_format: str, hw: tuple[int, int]) -> None:
    """4:2:0 of odd sides, which `write_video` does not make but codecs allow."""
    with av.open(str(path), "w") as made:
        stream = made.add_stream(codec, rate=int(FPS), options={"g": str(GOP)})
        stream.height, stream.width = hw
        stream.pix_fmt = pixel_format
        for pixels in painted(hw=hw):
            made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.copy(), format="rgb24")))
        made.mux(stream.encode(None))
