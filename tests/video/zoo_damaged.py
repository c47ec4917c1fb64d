"""Clips with random damage: bits turned over, packets cut, emptied or left out."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from clip_writer import write_video
from video.zoo import Packet, packets_of, remux

FRAMES, GOP = 30, 10
HW = (64, 96)
X264 = {"codec": "libx264", "b_frames": 2}
X265_PARAMS = "log-level=none:open-gop={}"
# name: (containers, options of write_video)
CODECS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "h264": (("mp4", "matroska", "mpegts", "avi", "h264"), X264),
    "h264 slices": (
        ("mp4", "mpegts"),
        {**X264, "encoder_options": {"x264-params": "slices=4:cabac=0"}},
    ),
    "h264 open gop": (
        ("matroska", "mpegts"),
        {**X264, "encoder_options": {"x264-params": "open-gop=1:scenecut=0"}},
    ),
    "h264 pyramid": (
        ("mp4",),
        {**X264, "b_frames": 5, "encoder_options": {"x264-params": "b-pyramid=normal:b-adapt=0"}},
    ),
    "h264 interlaced": (("mp4",), {**X264, "encoder_options": {"x264-params": "tff=1"}}),
    "h264 refresh": (
        ("matroska", "mpegts"),
        {"codec": "libx264", "encoder_options": {"x264-params": "intra-refresh=1"}},
    ),
    "hevc": (
        ("mp4", "matroska", "mpegts"),
        {
            "codec": "libx265",
            "b_frames": 2,
            "encoder_options": {"x265-params": X265_PARAMS.format(0)},
        },
    ),
    "hevc open gop": (
        ("matroska",),
        {
            "codec": "libx265",
            "b_frames": 3,
            "encoder_options": {"x265-params": X265_PARAMS.format(1)},
        },
    ),
    "mpeg2": (("mpegts", "matroska", "avi", "mpeg"), {"codec": "mpeg2video", "b_frames": 2}),
    "mpeg4": (("mp4", "matroska", "avi"), {"codec": "mpeg4", "b_frames": 2}),
    "msmpeg4": (("matroska", "avi"), {"codec": "msmpeg4"}),
    "wmv2": (("asf",), {"codec": "wmv2"}),
    "flv1": (("flv",), {"codec": "flv"}),
    "vp8": (("matroska", "webm"), {"codec": "libvpx"}),
    "vp9": (("matroska", "mp4"), {"codec": "libvpx-vp9"}),
    "av1": (("mp4", "matroska"), {"codec": "libsvtav1"}),
    "mjpeg": (("avi", "matroska"), {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "ffv1": (("matroska", "avi"), {"codec": "ffv1"}),
    "prores": (("mov",), {"codec": "prores_ks", "pixel_format": "yuv422p10le"}),
    "huffyuv": (("avi",), {"codec": "huffyuv", "pixel_format": "yuv422p"}),
    "utvideo": (("avi",), {"codec": "utvideo"}),
    "qtrle": (("mov",), {"codec": "qtrle", "pixel_format": "rgb24"}),
    "png": (("mov",), {"codec": "png", "pixel_format": "rgb24"}),
    "gif": (("gif",), {"codec": "gif", "pixel_format": "rgb8"}),
    "cinepak": (("avi",), {"codec": "cinepak", "pixel_format": "rgb24"}),
    "svq1": (("mov",), {"codec": "svq1", "pixel_format": "yuv410p"}),
    "snow": (("avi",), {"codec": "snow"}),
    "zmbv": (("avi",), {"codec": "zmbv", "pixel_format": "bgr0"}),
    "flashsv": (("flv",), {"codec": "flashsv", "pixel_format": "bgr24"}),
}
KINDS = ("flip", "cut", "empty", "drop")


def scene(count: int) -> Iterator[np.ndarray]:
    """Texture that moves, and a square that moves against it."""
    rng = np.random.default_rng(1)
    tiles = rng.integers(0, 255, (HW[0] // 8, HW[1] // 8 + 2 * count // 8 + 2, 3), np.uint8)
    picture = np.kron(tiles, np.ones((8, 8, 1), np.uint8))
    for n in range(count):
        frame = picture[:, 2 * n : 2 * n + HW[1]].copy()
        frame[20:36, 3 * n % 70 : 3 * n % 70 + 16] = (8 * n % 256, 128, 255 - 8 * n % 256)
        yield frame


@functools.cache
def sound(codec: str, container: str) -> bytes:
    file = io.BytesIO()
    options = {"gop": GOP, **CODECS[codec][1]}
    write_video(file, scene(FRAMES), source_fps=10.0, container_format=container, **options)
    return file.getvalue()


def damaged(codec: str, container: str, kind: str, seed: int) -> bytes:
    """A clip of which 1 to 4 packets are damaged, in `container`."""
    rng = random.Random(f"{codec} {container} {kind} {seed}")
    whole = sound(codec, container)
    packets = packets_of(whole)
    chosen = rng.sample(range(len(packets)), rng.choice((1, 1, 2, 4)))
    if kind == "flip" or container in ("mpeg", "h264", "gif", "mpegts"):
        # In the file itself: muxers look into some packets.
        return _flipped(whole, [packets[n] for n in chosen], rng, container)

    def change(packets: list[Packet]) -> Iterator[Packet]:
        for n, packet in enumerate(packets):
            if n not in chosen:
                yield packet
            elif kind == "cut":
                yield packet._replace(data=packet.data[: rng.randrange(1, len(packet.data))])
            elif kind == "empty":
                head = rng.choice((1, 5, 20))
                yield packet._replace(
                    data=packet.data[:head] + bytes(max(0, len(packet.data) - head))
                )

    file = io.BytesIO()
    try:
        remux(whole, file, change, container=container)
    except (av.FFmpegError, ValueError):  # what the muxer refuses is damaged in the file
        return _flipped(whole, [packets[n] for n in chosen], rng, container)
    return file.getvalue()


def _flipped(whole: bytes, packets: list[Packet], rng: random.Random, container: str) -> bytes:
    data = bytearray(whole)
    head = len(data) // 10
    for packet in packets:
        at = whole.find(packet.data)
        begin, end = (at, at + len(packet.data)) if at >= 0 else (head, len(data))
        for _ in range(rng.choice((1, 3, 10))):
            data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(data)
