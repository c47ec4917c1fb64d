"""Encoding clips: data for training and for benches."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vtts_rt.types import require

# swscale writes these with levels 0..255; readers must be told.
FULL_RANGE_FORMATS = ("gray", "yuvj")
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# Fast settings per encoder; a caller's crf and preset go on top.
ENCODER_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12"},
}


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    source_fps: float,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int | None = None,
    crf: int | None = None,
    preset: str | None = None,
) -> int:
    """Encodes (H, W, 3) uint8 RGB frames; returns how many. The same frames give the same bytes.

    path: the suffix names the container.
    frames: all of one size; yuv420p needs even sides.
    source_fps: nominal rate, frames a second.
    gop: most frames from keyframe to keyframe; crf, preset: as the encoder takes them.
    Raises ValueError for bad frames; errors of PyAV (OSErrors and ValueErrors) for what it refuses
    and for a file that cannot be written.
    """
    require("write_video", "source_fps", source_fps, 0 < source_fps <= 1000, "in (0, 1000]")
    given = {"preset": preset, "crf": crf, "g": gop}
    if crf is not None and codec.startswith("libvpx"):
        given["b"] = 0  # constant quality; otherwise crf is only a floor
    options = ENCODER_OPTIONS.get(codec, {})
    options = options | {name: str(value) for name, value in given.items() if value is not None}
    rate = Fraction(source_fps).limit_denominator(1001)
    stream: Any = None
    shape, count = None, 0
    with av.open(str(path), "w") as container:
        for pixels in frames:
            if stream is None:
                shape = pixels.shape
                odd = "420" in pixel_format and (shape[0] % 2 or shape[1] % 2)
                rule = f"(H, W, 3), of even sides for {pixel_format}"
                require("write_video", "frames", shape, len(shape) == 3 and not odd, rule)
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width = shape[:2]
                stream.pix_fmt = pixel_format
                stream.codec_context.time_base = 1 / rate
                stream.codec_context.thread_count = 1  # more give other bytes
                if pixel_format.startswith(FULL_RANGE_FORMATS):
                    stream.codec_context.color_range = FULL_RANGE
            ok = pixels.shape == shape and pixels.dtype == np.uint8
            got = f"{pixels.dtype} {pixels.shape}"
            require("write_video", "frames", got, ok, f"uint8 of shape {shape}, all alike")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(stream.encode(frame))
            count += 1
        require("write_video", "frames", "none", stream is not None, "at least one frame")
        container.mux(stream.encode(None))
    return count
