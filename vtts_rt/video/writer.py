"""Encoding clips: data for training and tests.

Encoders of PyAV's wheels that are of use here: libx264, libx265, libvpx-vp9, libvpx, libsvtav1,
mjpeg, mpeg4, gif, ffv1, huffyuv, qtrle, prores_ks, rawvideo, png, apng.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from vtts_rt.types import require

# Ticks a second of clips with given times. MPEG-4 stores a rate in 16 bits, so not 90000.
VFR_TICKS = 60000
# swscale writes these with levels 0..255; readers must be told.
FULL_RANGE_FORMATS = ("gray", "yuvj")
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# Fast settings per encoder; a caller's crf, preset, ... go on top.
ENCODER_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12"},
}

# No such place: the caller's mistake. No room or no right there: the machine's state.
WRONG_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
UNUSABLE_PLACE: tuple[int, ...] = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
)
UNUSABLE_PLACE += (errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE)


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

    path_or_file: the suffix names the container; for a file object `container_format` does
        (default "mp4").
    frames: all of one size; yuv420p needs even sides, yuv422p an even width.
    source_fps: nominal rate, frames a second. timestamps_seconds: presentation time of each
        frame, strictly ascending, for a variable rate.
    gop: most frames from keyframe to keyframe; crf, preset, b_frames: as the encoder takes them.
    rotation_degrees: multiple of 90; players show the frames turned counterclockwise by it.
    threads: encoder threads; output bytes repeat only for a fixed number, hence 1.
    Raises ValueError for bad frames, for what the encoder refuses and for a place that does not
    exist; OSError where it is full or may not be written.
    """
    require("write_video", "source_fps", source_fps, 0 < source_fps <= 1000, "in (0, 1000]")
    turned = rotation_degrees % 90 == 0
    require("write_video", "rotation_degrees", rotation_degrees, turned, "a multiple of 90")
    options = dict(ENCODER_OPTIONS.get(codec, {}))
    if preset is not None:
        options["preset"] = preset
    if crf is not None:
        options["crf"] = str(crf)
        if codec.startswith("libvpx"):
            options["b"] = "0"  # constant quality; otherwise crf is only a floor
    if gop is not None:
        options["g"] = str(gop)
    if b_frames is not None:
        options["bf"] = str(b_frames)
    options.update(encoder_options or {})
    target: Any = str(path_or_file)
    if not isinstance(path_or_file, str | Path):
        target, container_format = _File(path_or_file), container_format or "mp4"
    try:
        with _opened(target, container_format) as container:
            return _encode(
                container,
                frames,
                rate=Fraction(source_fps).limit_denominator(1001),
                codec=codec,
                pixel_format=pixel_format,
                options=options,
                times=timestamps_seconds,
                rotation=rotation_degrees,
                threads=threads,
            )
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        if isinstance(target, _File) and target.error is not None:
            raise target.error from None
        number = getattr(error, "errno", None)
        if number in WRONG_PLACE:
            rule = "path_or_file must be a file in a folder that exists"
            raise ValueError(f"write_video: {rule}, got {target!r} ({error})") from error
        if number in UNUSABLE_PLACE and isinstance(target, str):
            raise OSError(number, os.strerror(number), target) from error
        raise ValueError(
            "write_video: container, codec and pixel_format must fit together, got "
            f"{str(path_or_file)!r} with {codec} and {pixel_format} ({error})"
        ) from error


def _opened(target: Any, container_format: str | None) -> Any:
    try:
        return av.open(target, "w", format=container_format)
    except av.FFmpegError:
        raise
    except ValueError as error:
        rule = "container_format must be given unless the suffix names a container"
        raise ValueError(f"write_video: {rule}, got {target!r} ({error})") from error


class _File:
    """A file object for PyAV, which loses some of the errors of its `write`.

    error: the first that `write` raised.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: Exception | None = None
        for name in ("seek", "tell", "read"):
            if hasattr(file, name):
                setattr(self, name, getattr(file, name))

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except Exception as error:
            self.error = self.error or error
            raise


def _encode(
    container: Any,
    frames: Iterable[np.ndarray],
    *,
    rate: Fraction,
    codec: str,
    pixel_format: str,
    options: dict[str, str],
    times: Sequence[float] | None,
    rotation: int,
    threads: int,
) -> int:
    stream: Any = None
    ticks = Fraction(1, VFR_TICKS) if times is not None else 1 / rate
    shape, count, last_pts = None, 0, -1
    for pixels in frames:
        if stream is None:
            shape = _checked_shape(pixels, pixel_format)
            try:
                stream = container.add_stream(codec, rate=rate, options=options)
            except ValueError as error:
                raise ValueError(
                    f"write_video: codec must be one the container takes, got {codec} ({error})"
                ) from error
            stream.height, stream.width = shape[:2]
            stream.pix_fmt = pixel_format
            stream.codec_context.time_base = ticks
            stream.codec_context.thread_count = threads
            if pixel_format.startswith(FULL_RANGE_FORMATS):
                stream.codec_context.color_range = FULL_RANGE
            if rotation:
                stream.set_display_rotation(rotation)
        ok = pixels.shape == shape and pixels.dtype == np.uint8
        got = f"{pixels.dtype} {pixels.shape}"
        require("write_video", "frames", got, ok, f"uint8 of shape {shape}, all alike")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if times is not None:
            got_times = f"{len(times)} times"
            require("write_video", "timestamps_seconds", got_times, count < len(times), "one each")
        frame.pts = count if times is None else round(times[count] * VFR_TICKS)
        frame.time_base = ticks
        rule = "strictly ascending from 0"
        require("write_video", "timestamps_seconds", frame.pts * ticks, frame.pts > last_pts, rule)
        container.mux(stream.encode(frame))
        last_pts, count = frame.pts, count + 1
    require("write_video", "frames", "none", stream is not None, "at least one frame")
    container.mux(stream.encode(None))
    return count


def _checked_shape(pixels: np.ndarray, pixel_format: str) -> tuple[int, ...]:
    ok = pixels.ndim == 3 and pixels.shape[2] == 3 and 0 not in pixels.shape
    require("write_video", "frames", f"shape {pixels.shape}", ok, "of shape (H, W, 3)")
    height, width = pixels.shape[:2]
    even_width = "420" in pixel_format or "422" in pixel_format
    ok = not (even_width and width % 2) and not ("420" in pixel_format and height % 2)
    rule = f"of even sides where {pixel_format} halves them"
    require("write_video", "frames", f"{height} x {width} px", ok, rule)
    return pixels.shape
