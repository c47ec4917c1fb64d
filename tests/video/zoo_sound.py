"""Files that are unusual but sound: every frame can be had, exactly."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_writer import write_video
from video.zoo import (
    FRAMES,
    GOP,
    Case,
    H,
    Packet,
    W,
    clip,
    encoded,
    hide_vp8,
    ivf_times,
    jpegs,
    odd_sized,
    packets_of,
    paint,
    painted,
    piped,
    remux,
    together,
    with_cover,
    with_edits,
)

from vtts_rt.video.frame_headers import vp9_frames

VP8: dict[str, Any] = {"codec": "libvpx"}
VP9: dict[str, Any] = {"codec": "libvpx-vp9"}
MJPEG: dict[str, Any] = {"codec": "mjpeg", "pixel_format": "yuvj420p"}
H264: dict[str, Any] = {"codec": "libx264", "b_frames": 2}
HEVC: dict[str, Any] = {"codec": "libx265", "b_frames": 2}
AV1: dict[str, Any] = {"codec": "libsvtav1"}
MPEG4: dict[str, Any] = {"codec": "mpeg4"}
# Altref frames: hidden frames that libvpx packs together with the next one that shows.
ALTREF = {"auto-alt-ref": "1", "lag-in-frames": "25", "deadline": "realtime", "cpu-used": "6"}
TIMES = (0.0, 0.04, 0.08, *np.linspace(0.5, 1.0, 11), *np.linspace(3.0, 9.0, FRAMES - 14))


def content(data: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data())


def same(**options: Any) -> Callable[[Path], object]:
    return lambda path: clip(path, **options)


def moving(count: int = FRAMES) -> Iterator[np.ndarray]:
    """Painted frames over a picture that moves: motion is what altref frames are made for."""
    tiles = np.random.default_rng(0).integers(0, 80, (6, 60, 3), np.uint8)
    picture = np.kron(tiles, np.ones((8, 8, 1), np.uint8))
    for n, frame in enumerate(painted(count)):
        yield picture[:, 2 * n : 2 * n + W] + frame // 2 + frame // 8


def altref(path: Path) -> None:
    settings = {**ALTREF, "b": "200k"}
    write_video(
        path, moving(60), source_fps=10.0, codec="libvpx-vp9", gop=100, encoder_options=settings
    )
    # A superframe ends in its index, which begins with the byte that it ends with.
    assert any(p.data[-1] & 0xE0 == 0xC0 for p in packets_of(path)), "no frame is hidden"


def hidden_packets(path: Path) -> None:
    """Superframes taken apart: hidden frames are packets of their own, as NUT alone keeps them."""
    whole = io.BytesIO()
    write_video(
        whole,
        moving(60),
        source_fps=10.0,
        codec="libvpx-vp9",
        gop=100,
        encoder_options={**ALTREF, "b": "200k"},
        container_format="matroska",
    )

    def split(packets: list[Packet]) -> Iterator[Packet]:
        for n, packet in enumerate(packets):
            parts = vp9_frames(packet.data)
            for k, part in enumerate(parts):
                time = 100 * n - 10 * (len(parts) - 1 - k) + 100
                yield packet._replace(data=part, pts=time, dts=time, key=packet.key and k == 0)

    remux(whole.getvalue(), path, split, container="nut")


def grown(codec: dict[str, Any], hw: tuple[int, int] = (72, 96)) -> bytes:
    """A Matroska file whose second half has another resolution."""
    packets = packets_of(encoded(**codec, hw=hw))
    small, out = encoded(**codec), io.BytesIO()
    remux(small, out, lambda p: [*p[:GOP], *(q._replace(data=packets[n + GOP].data)
          for n, q in enumerate(p[GOP:]))], container="matroska")  # fmt: skip
    return out.getvalue()


def fragmented(path: Path, codec: dict[str, Any]) -> None:
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    remux(encoded("mp4", **codec), path, options=flags)


def without_tail(data: bytes, mark: bytes) -> bytes:
    return data[: data.rindex(mark)]


def edited(edits: list[tuple[float, float | None]], **options: Any) -> Callable[[Path], object]:
    return content(lambda: with_edits(encoded("mp4", **{**H264, "b_frames": 0, **options}), edits))


def pil_jpegs(mode: str, **options: Any) -> Callable[[Path], object]:
    """A Motion JPEG of images that FFmpeg's own encoder does not make."""

    def write(path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        made = []
        for pixels in painted():
            file = io.BytesIO()
            image.fromarray(pixels.copy()).convert(mode).save(file, "jpeg", quality=90, **options)
            made.append(file.getvalue())
        base = encoded("avi", **MJPEG)
        remux(base, path, lambda p: [q._replace(data=d) for q, d in zip(p, made, strict=True)])

    return write


SOUND: dict[str, Case] = {
    # Codecs and pixel layouts.
    "av1 mp4": Case(same(**AV1), "mp4"),
    "av1 10 bit": Case(same(**AV1, pixel_format="yuv420p10le"), "mkv"),
    "hevc 10 bit": Case(same(**HEVC, pixel_format="yuv420p10le"), "mp4"),
    "hevc open gop": Case(
        same(**HEVC, encoder_options={"x265-params": "log-level=none:open-gop=1"}), "mkv"
    ),
    "h264 10 bit": Case(same(**H264, pixel_format="yuv420p10le"), "mkv"),
    "h264 4:4:4 odd": Case(same(**H264, pixel_format="yuv444p", hw=(75, 101)), "mp4", hw=(75, 101)),
    "h264 interlaced": Case(same(**H264, encoder_options={"x264-params": "tff=1"}), "mp4"),
    "mpeg2 interlaced": Case(
        same(codec="mpeg2video", encoder_options={"flags": "+ildct+ilme"}), "ts"
    ),
    "mpeg4 avi": Case(same(**MPEG4), "avi"),
    "prores 4444 alpha": Case(same(codec="prores_ks", pixel_format="yuva444p10le"), "mov"),
    "qtrle alpha": Case(same(codec="qtrle", pixel_format="argb"), "mov"),
    "png alpha": Case(same(codec="png", pixel_format="rgba"), "mov"),
    "ffv1 odd": Case(same(codec="ffv1", pixel_format="yuv444p", hw=(75, 101)), "mkv", hw=(75, 101)),
    "ffv1 16 bit": Case(same(codec="ffv1", pixel_format="yuv420p16le"), "mkv"),
    "vp8 alpha": Case(
        same(**VP8, pixel_format="yuva420p", encoder_options={"auto-alt-ref": "0"}), "webm"
    ),
    "vp9 alpha": Case(same(**VP9, pixel_format="yuva420p"), "webm"),
    "vp9 4:4:4": Case(same(**VP9, pixel_format="yuv444p"), "webm"),
    "vp9 rgb": Case(same(**VP9, pixel_format="gbrp"), "mp4"),
    "vp8 odd": Case(lambda p: odd_sized(p, "libvpx", "yuv420p", (75, 101)), "webm", hw=(75, 101)),
    "vp9 odd": Case(
        lambda p: odd_sized(p, "libvpx-vp9", "yuv420p", (75, 101)), "webm", hw=(75, 101)
    ),
    "mjpeg odd": Case(lambda p: odd_sized(p, "mjpeg", "yuvj420p", (75, 101)), "mkv", hw=(75, 101)),
    "mjpeg 4:4:4": Case(same(codec="mjpeg", pixel_format="yuvj444p"), "mov"),
    "mjpeg 4:2:2": Case(same(codec="mjpeg", pixel_format="yuvj422p"), "avi"),
    "mjpeg grey": Case(pil_jpegs("L"), "avi"),
    "mjpeg progressive": Case(pil_jpegs("RGB", progressive=True), "avi"),
    "mjpeg restart markers": Case(pil_jpegs("RGB", restart_marker_blocks=1), "avi"),
    "mjpeg, junk between": Case(
        content(lambda: b"".join(bytes([0, n, 0xFF, 0]) * n + d for n, d in enumerate(jpegs()))),
        "mjpeg",
    ),
    "mjpeg, junk in the packets": Case(
        lambda path: remux(
            encoded(**MJPEG),
            path,
            lambda p: [
                q._replace(data=b"\0" * (n % 3) + q.data + b"junk") for n, q in enumerate(p)
            ],
        ),
        "mkv",
    ),
    # Orientation and length.
    "vp9 turned": Case(same(**VP9, rotation_degrees=90), "mp4", hw=(W, H), turned=90),
    "mjpeg turned": Case(same(**MJPEG, rotation_degrees=-90), "mov", hw=(W, H), turned=-90),
    "hevc turned": Case(same(**HEVC, rotation_degrees=180), "mp4", turned=180),
    "av1, one frame": Case(same(**AV1, count=1), "mp4", codes=(0,)),
    "vp8, one frame": Case(same(**VP8, count=1), "webm", codes=(0,)),
    "mjpeg, one frame": Case(same(**MJPEG, count=1), "avi", codes=(0,)),
    # Index, duration, timestamps.
    "mkv without cues": Case(lambda p: piped(p, encoded("mp4", **H264), "matroska"), "mkv"),
    "webm without cues": Case(lambda p: piped(p, encoded(**VP9), "webm"), "webm"),
    "mjpeg mkv without cues": Case(lambda p: piped(p, encoded(**MJPEG), "matroska"), "mkv"),
    "mjpeg avi without index": Case(
        content(lambda: without_tail(encoded("avi", **MJPEG), b"idx1")), "avi"
    ),
    "mpeg4 avi without index": Case(
        content(lambda: without_tail(encoded("avi", **MPEG4), b"idx1")), "avi"
    ),
    "h264 fragmented": Case(lambda p: fragmented(p, H264), "mp4"),
    "vp9 fragmented": Case(lambda p: fragmented(p, VP9), "mp4"),
    "hevc without times": Case(same(**HEVC), "hevc"),
    "vp8 varying rate": Case(same(**VP8, timestamps_seconds=TIMES), "webm", times=TIMES),
    "mjpeg varying rate": Case(same(**MJPEG, timestamps_seconds=TIMES), "mkv", times=TIMES),
    "av1 varying rate": Case(same(**AV1, timestamps_seconds=TIMES), "mkv", times=TIMES),
    "vp9 late start": Case(
        same(**VP9, timestamps_seconds=[100 + n / 10 for n in range(FRAMES)]),
        "webm",
        times=np.arange(FRAMES) / 10,
    ),
    "vp8 clock jumps back": Case(
        content(lambda: ivf_times(encoded("ivf", **VP8), lambda n: n if n < 15 else n - 10)), "ivf"
    ),
    "vp9 clock stands": Case(content(lambda: ivf_times(encoded("ivf", **VP9), lambda n: 7)), "ivf"),
    # Edit lists.
    "edits start late": Case(edited([(0.5, None), (2.4, 0.0)]), "mp4", times=np.arange(24) / 10),
    "edits cut the start": Case(edited([(1.9, 0.5)]), "mp4", codes=range(5, 24)),
    "edits cut both ends": Case(edited([(1.0, 0.5)]), "mp4", codes=range(5, 15)),
    "edits of two pieces": Case(
        edited([(0.5, 0.0), (0.5, 1.2)]), "mp4", codes=[*range(5), *range(12, 17)]
    ),
    "edits cut vp9": Case(edited([(1.9, 0.5)], codec="libvpx-vp9"), "mp4", codes=range(5, 24)),
    "edits cut mjpeg": Case(edited([(1.9, 0.5)], **MJPEG), "mp4", codes=range(5, 24)),
    # Streams.
    "vp8 hidden frames": Case(
        lambda path: remux(encoded(**VP8), path, lambda p: hide_vp8(p, 3, 4, 15, 23)),
        "webm",
        codes=[n for n in range(FRAMES) if n not in (3, 4, 15, 23)],
    ),
    "vp8 hidden keyframe": Case(
        lambda path: remux(encoded(**VP8), path, lambda p: hide_vp8(p, 12)),
        "webm",
        codes=[n for n in range(FRAMES) if n != 12],
    ),
    "vp9 altref": Case(altref, "webm", codes=range(60)),
    "vp9 hidden packets": Case(hidden_packets, "nut", codes=range(60)),
    "vp8 grows": Case(content(lambda: grown(VP8)), "mkv"),
    "vp9 grows": Case(content(lambda: grown(VP9)), "mkv"),
    "vp9 shrinks": Case(content(lambda: grown(VP9, (24, 32))), "mkv"),
    "mjpeg grows": Case(content(lambda: grown(MJPEG)), "mkv"),
    # Not to half the height: such images are taken for the two fields of one.
    "mjpeg shrinks": Case(content(lambda: grown(MJPEG, (36, 48))), "mkv"),
    "h264 grows": Case(
        content(
            lambda: (
                encoded("mpegts", 12, **H264) + encoded("mpegts", 12, **H264, first=12, hw=(72, 96))
            )
        ),
        "ts",
    ),
    "two streams of vp9": Case(
        lambda p: together(p, [encoded(**VP9), encoded(**VP9, first=100)]), "mkv"
    ),
    "two streams of h264": Case(
        lambda p: together(p, [encoded("mp4", **H264), encoded("mp4", **H264, first=100)]), "mkv"
    ),
    "cover before h264": Case(lambda p: with_cover(p, encoded(**H264), paint(255)), "mp4"),
    "cover before vp9": Case(lambda p: with_cover(p, encoded(**VP9), paint(255)), "mp4"),
}
