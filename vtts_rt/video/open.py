"""`open_video`: any kind of input to a FrameSource."""

from __future__ import annotations

import math
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.types import DECODERS, Decoder, require
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.source import ClippedSource, FrameSource

URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://|^(data):", re.ASCII)
MAX_URL_BYTES = 1 << 30  # a download is held in memory
URL_TIMEOUT_SECONDS = 30.0


def open_video(
    video: Any,
    *,
    source_fps: float | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    allow_urls: bool = False,
    decoder: Decoder = "auto",
    device: int | None = None,
) -> FrameSource:
    """Opens a video or an image.

    video: path (str or os.PathLike), encoded bytes, (T, H, W, 3) uint8 RGB array or tensor,
        (H, W, 3) array or tensor, PIL image; files that hold one picture (PNG, JPEG, WebP, BMP,
        PPM, ...) are images, an animated or still GIF is a video.
    source_fps: frames a second of an array, required there; also the rate of a stream without
        timestamps (raw H.264). Files that have timestamps keep them.
    start_seconds, end_seconds: only the frames on screen during [start, end); indices count
        from 0 at the first of them and timestamps from the start of the range. Images have no
        time and are left whole.
    allow_urls: take http://, https:// and file:// URLs; a download is held in memory, at most
        1 GiB.
    decoder: of files and encoded bytes. "pyav"; "dali", with PyAV for what DALI does not decode
        (`metadata.decoder` says which); "auto" is DALI where it has NVDEC on `device`, else PyAV.
    device: CUDA ordinal of the GPU that decodes and keeps the frames, as torch tensors; None: CPU.
    Raises ValueError for anything that cannot be opened, with one sentence that says why;
    RuntimeError where the decoder asked for cannot be used.
    """
    require("open_video", "decoder", decoder, decoder in DECODERS, f"one of {', '.join(DECODERS)}")
    fps_ok = source_fps is None or 0.0 < float(source_fps) <= 1e4
    require("open_video", "source_fps", source_fps, fps_ok, "a number in (0, 10000]")
    for name, value in (("start_seconds", start_seconds), ("end_seconds", end_seconds)):
        ok = value is None or (not math.isnan(float(value)) and float(value) >= 0.0)
        require("open_video", name, value, ok, "seconds >= 0")
    if start_seconds is not None and end_seconds is not None:
        rule = f"greater than start_seconds ({start_seconds})"
        require("open_video", "end_seconds", end_seconds, end_seconds > start_seconds, rule)
    source = _open_whole(video, source_fps, allow_urls, decoder, device)
    if source.metadata.is_image or (start_seconds is None and end_seconds is None):
        return source
    try:
        return ClippedSource(source, start_seconds, end_seconds)
    except ValueError:
        source.close()
        raise


def _open_whole(
    video: Any,
    source_fps: float | None,
    allow_urls: bool,
    decoder: Decoder,
    device: int | None,
) -> FrameSource:
    if isinstance(video, str) and (url := URL.match(video)):
        got = video if len(video) <= 200 else video[:200] + "..."
        require("open_video", "video", got, allow_urls, "a local path unless URLs are allowed")
        video = _fetch(video, (url[1] or url[2]).lower())
    if isinstance(video, str | os.PathLike):
        return _open_media(Path(os.fspath(video)), source_fps, decoder, device)
    if isinstance(video, bytes | bytearray | memoryview):
        return _open_media(bytes(video), source_fps, decoder, device)
    if isinstance(video, np.ndarray):
        return _open_array(video, source_fps)
    if hasattr(video, "detach"):  # a torch tensor, told without importing torch
        return _open_array(video.detach().cpu().numpy(), source_fps)
    if hasattr(video, "convert") and hasattr(video, "getexif"):  # a PIL image
        from PIL import ImageOps  # the caller has PIL, as the image is one of its own

        return ArraySource(np.asarray(ImageOps.exif_transpose(video).convert("RGB")))
    rule = "a path, bytes, a uint8 array or tensor, or a PIL image"
    require("open_video", "video", type(video).__name__, False, rule)
    raise AssertionError("unreachable")


def _open_array(array: np.ndarray, source_fps: float | None) -> FrameSource:
    return ArraySource(array, source_fps=None if array.ndim == 3 else source_fps)


def _open_media(
    media: Path | bytes, source_fps: float | None, decoder: Decoder, device: int | None
) -> FrameSource:
    try:
        from vtts_rt.video.media import open_media  # arrays need no decoder
    except ImportError as error:
        remedy = "pip install av"
        raise RuntimeError(f"open_video: files are decoded by PyAV: {remedy} ({error})") from None
    return open_media(media, source_fps, decoder, device)


def _fetch(url: str, scheme: str) -> Path | bytes:
    """A file:// URL as a path, http(s):// content as bytes."""
    parts = urllib.parse.urlsplit(url)
    if scheme == "file":
        local = parts.netloc in ("", "localhost")
        require("open_video", "video", url, local, "a file URL of this machine")
        return Path(urllib.request.url2pathname(parts.path))
    require("open_video", "video", url, scheme in ("http", "https"), "an http, https or file URL")
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_SECONDS) as response:
            data: bytes = response.read(MAX_URL_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"open_video: video must be a URL that can be fetched, got {url!r} ({error})"
        ) from None
    require("open_video", "video", url, len(data) <= MAX_URL_BYTES, f"<= {MAX_URL_BYTES} bytes")
    return data
