"""Clips for comparing decoders, in the codecs that they are compared on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vtts_rt.files import replacing
from vtts_rt.types import require


class Encoding(NamedTuple):
    """encoder, pixel_format: as write_video; suffix of the file; crf: quality of needle's clips."""

    encoder: str
    suffix: str
    pixel_format: str
    crf: int | None


ENCODINGS = {
    "h264": Encoding("libx264", ".mp4", "yuv420p", 20),
    "vp9": Encoding("libvpx-vp9", ".webm", "yuv420p", 24),
    "mjpeg": Encoding("mjpeg", ".avi", "yuvj420p", None),
}


def codec_names(text: str) -> list[str]:
    """Names of --codec, checked. ValueError names what is wrong."""
    names = [name for name in text.split(",") if name]
    for name in names:
        require("bench", "codec", name, name in ENCODINGS, f"one of {', '.join(ENCODINGS)}")
    return names


def encode(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str,
    *,
    source_fps: float,
    gop: int | None = None,
    crf: int | None = None,
) -> Path:
    """Write (H, W, 3) uint8 RGB frames to `path` with the codec's suffix in place of its own;
    returns where. It is there whole or not at all."""
    from vtts_rt.video.writer import write_video  # PyAV is not everywhere that benches are

    encoding = ENCODINGS[codec]
    path = path.with_suffix(encoding.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        write_video(
            aside,
            frames,
            source_fps=source_fps,
            codec=encoding.encoder,
            pixel_format=encoding.pixel_format,
            gop=gop,
            crf=crf,
        )
    return path
