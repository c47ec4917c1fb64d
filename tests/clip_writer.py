"""Encoding the tests' clips: rates, rotations, containers and encoders as a test wants them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from vtts_rt.video.writer import ENCODER_OPTIONS, FULL_RANGE, FULL_RANGE_FORMATS

# Ticks a second of clips with given times. MPEG-4 stores a rate in 16 bits, so not 90000.
VFR_TICKS = 60000


def write_video(
    path_or_file: str | Path | BinaryIO,
    frames: Iterable[np.ndarray],
    *,
    source_fps: float,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    gop: int | None = None,
    crf: int | None = None,
    preset: str | None = None,
    b_frames: int | None = None,
    timestamps_seconds: Sequence[float] | None = None,
    rotation_degrees: int = 0,
    container_format: str | None = None,
    encoder_options: dict[str, str] | None = None,
    threads: int = 1,
) -> int:
    """Encodes (H, W, 3) uint8 RGB frames; returns how many.

    path_or_file: the suffix names the container, of a file object `container_format` (mp4).
    timestamps_seconds: time of each frame, for a variable rate. rotation_degrees: players show
    the frames turned counterclockwise by it. The rest is as the encoder takes it.
    """
    given = {"preset": preset, "crf": crf, "g": gop, "bf": b_frames}
    if crf is not None and codec.startswith("libvpx"):
        given["b"] = 0  # constant quality; otherwise crf is only a floor
    options = ENCODER_OPTIONS.get(codec, {})
    options = options | {k: str(v) for k, v in given.items() if v is not None}
    options |= encoder_options or {}
    is_path = isinstance(path_or_file, str | Path)
    target = str(path_or_file) if is_path else path_or_file
    rate = Fraction(source_fps).limit_denominator(1001)
    ticks = 1 / rate if timestamps_seconds is None else Fraction(1, VFR_TICKS)
    container_format = container_format or (None if is_path else "mp4")
    stream, count = None, 0
    with av.open(target, "w", format=container_format) as container:
        for pixels in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = pixel_format
                stream.codec_context.time_base = ticks
                stream.codec_context.thread_count = threads
                if pixel_format.startswith(FULL_RANGE_FORMATS):
                    stream.codec_context.color_range = FULL_RANGE
                if rotation_degrees:
                    stream.set_display_rotation(rotation_degrees)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            times = timestamps_seconds
            frame.pts = count if times is None else round(times[count] * VFR_TICKS)
            frame.time_base = ticks
            container.mux(stream.encode(frame))
            count += 1
        assert stream is not None, "no frames"
        container.mux(stream.encode(None))
    return count
