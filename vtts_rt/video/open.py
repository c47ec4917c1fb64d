"""`open_video`: any kind of input to a FrameSource."""

from __future__ import annotations

import http.client
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vtts_rt import process
from vtts_rt.checks import Rule, check, is_flag, is_number, is_whole
from vtts_rt.config import MediaLimits
from vtts_rt.errors import BadMedia, BadRequest
from vtts_rt.types import DECODERS, Decoder, require
from vtts_rt.video.arrays import ArraySource, is_npy, load_npy
from vtts_rt.video.limits import DeadlinePassed, Opening
from vtts_rt.video.source import ClippedSource, FrameSource, Video

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# What a video can be given as; see `open_video`.
VideoInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | Tensor | Image | Video"
)
# Seconds, one a frame.
Times: TypeAlias = "Sequence[float] | np.ndarray"

URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://|^(data):", re.ASCII)
URL_TIMEOUT_SECONDS = 30.0
URL_READ_BYTES = 1 << 20


_SECONDS: Rule = (lambda v: v is None or (is_number(v) and v >= 0), "seconds >= 0 or None")
# Of the arguments of `open_video` beside the video and its times.
OPENING_RULES: dict[str, Rule] = {
    "source_fps": (
        lambda v: v is None or (is_number(v) and 0.0 < v <= 1e4),
        "a number in (0, 10000] or None",
    ),
    "start_seconds": _SECONDS,
    "end_seconds": _SECONDS,
    "allow_urls": (is_flag, "True or False"),
    "decoder": (DECODERS.__contains__, f"one of {', '.join(DECODERS)}"),
    "device": (lambda v: v is None or (is_whole(v) and v >= 0), "the number of a GPU or None"),
    "limits": (lambda v: v is None or isinstance(v, MediaLimits), "a MediaLimits or None"),
    "deadline_seconds": (lambda v: v is None or (is_number(v) and v == v), "seconds or None"),
}


def check_range(what: str, start_seconds: float | None, end_seconds: float | None) -> None:
    if start_seconds is not None and end_seconds is not None:
        rule = f"greater than start_seconds ({start_seconds})"
        require(what, "end_seconds", end_seconds, end_seconds > start_seconds, rule)


def open_video(
    video: VideoInput,
    *,
    source_fps: float | None = None,
    timestamps_seconds: Times | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    allow_urls: bool = False,
    decoder: Decoder = "auto",
    device: int | None = None,
    limits: MediaLimits | None = None,
    deadline_seconds: float | None = None,
) -> FrameSource:
    """Opens a video or an image.

    video: path (str or os.PathLike), encoded bytes, (T, H, W, 3) uint8 RGB array or tensor,
        (H, W, 3) array or tensor, PIL image; a path or bytes may be a .npy file of such an array.
        Files that hold one picture (PNG, JPEG, WebP, BMP, PPM, ...) are images; an animated or
        still GIF, and pictures that follow each other in one file, are a video. Or an open Video,
        as it was opened; closing what is returned leaves that one open.
    source_fps: frames a second of an array, required there unless it has times; also the rate of
        a stream without timestamps (raw H.264, pictures in one file: 25 where it is None). Files
        that have timestamps keep them.
    timestamps_seconds: of an array only: when each of its T frames shows, strictly ascending.
        They are counted from the first. The last frame shows for one frame at `source_fps`, by
        default for the mean step.
    start_seconds, end_seconds: only the frames on screen during [start, end); indices count
        from 0 at the first of them and timestamps from the start of the range. Images have no
        time and are left whole.
    allow_urls: take http://, https:// and file:// URLs; a download is held in memory, at most
        1 GiB.
    decoder: of files and encoded bytes. "pyav"; "dali", with PyAV for what DALI does not decode
        (`metadata.decoder` says which); "auto" is DALI where it has NVDEC on `device`, else PyAV.
    device: CUDA ordinal of the GPU that decodes and keeps the frames, as torch tensors; None: CPU.
    limits: bounds on the video; None for the defaults of MediaLimits.
    deadline_seconds: value of `time.monotonic()` by which the video must be open.
    Raises BadMedia for a content that cannot be opened and BadRequest for other arguments, both
    ValueErrors of one sentence that says why; RuntimeError where the decoder asked for cannot
    be used; TimeoutError after the deadline.
    """
    given = {name: value for name, value in locals().items() if name in OPENING_RULES}
    check("open_video", OPENING_RULES, given)
    check_range("open_video", start_seconds, end_seconds)
    opening = Opening(limits, deadline_seconds)
    try:
        opening.check_time()
        content = _fetched(video, allow_urls, opening)
        pixels = _pixels(content, opening)
        if pixels is not None:
            source: FrameSource = ArraySource(
                pixels,
                source_fps=None if pixels.ndim == 3 else source_fps,
                timestamps_seconds=timestamps_seconds,
                opening=opening,
            )
        else:
            rule = "None, as only arrays come without times of their own"
            none = timestamps_seconds is None
            require("open_video", "timestamps_seconds", timestamps_seconds, none, rule)
            if isinstance(content, Video):
                source = Video(content)
            else:
                source = _open_encoded(content, source_fps, decoder, device, opening)
    except DeadlinePassed:
        raise TimeoutError("open_video: the deadline passed before the video was open") from None
    if source.metadata.is_image or (start_seconds is None and end_seconds is None):
        return source
    try:
        return ClippedSource(source, start_seconds, end_seconds)
    except ValueError:
        source.close()
        raise


def _fetched(video: Any, allow_urls: bool, opening: Opening) -> Any:
    """`video`; for a text or path-like the local Path that it names, for a URL its content."""
    if isinstance(video, str) and (url := URL.match(video)):
        got = video if len(video) <= 200 else video[:200] + "..."
        require("open_video", "video", got, allow_urls, "a local path unless URLs are allowed")
        return _fetch(video, (url[1] or url[2]).lower(), opening)
    if isinstance(video, str | os.PathLike):
        return Path(os.fspath(video))
    if isinstance(video, bytearray | memoryview):
        return bytes(video)
    return video


def _pixels(video: Any, opening: Opening) -> np.ndarray | None:
    """The array that `video` is or holds; None for anything else."""
    if isinstance(video, np.ndarray):
        return video
    if hasattr(video, "detach"):  # a torch tensor, told without importing torch
        return np.asarray(video.detach().cpu().numpy())
    if isinstance(video, Path | bytes) and is_npy(video):
        return load_npy(video, opening)
    return None


def _open_encoded(
    video: Any,
    source_fps: float | None,
    decoder: Decoder,
    device: int | None,
    opening: Opening,
) -> FrameSource:
    if isinstance(video, Path | bytes):
        try:
            from vtts_rt.video.media import open_media  # arrays need no decoder
        except ImportError as error:
            remedy = f"open_video: files are decoded by PyAV: pip install av ({error})"
            raise RuntimeError(remedy) from error
        return open_media(video, source_fps, decoder, device, opening)
    if hasattr(video, "convert") and hasattr(video, "getexif"):  # a PIL image
        from vtts_rt.video.pictures import open_pil_image

        return open_pil_image(video, opening)
    rule = "a path, bytes, a uint8 array or tensor, or a PIL image"
    require("open_video", "video", type(video).__name__, False, rule)
    raise AssertionError("unreachable")


def _fetch(url: str, scheme: str, opening: Opening) -> Path | bytes:
    """A file:// URL as a path, http(s):// content as bytes."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise BadRequest(f"open_video: video must be a URL, got {url!r} ({error})") from error
    if scheme == "file":
        local = parts.netloc in ("", "localhost")
        require("open_video", "video", url, local, "a file URL of this machine")
        return Path(urllib.request.url2pathname(parts.path))
    require("open_video", "video", url, scheme in ("http", "https"), "an http, https or file URL")
    data = bytearray()
    try:
        seconds = min(URL_TIMEOUT_SECONDS, opening.seconds_left())
        with process.outside_calls():
            response = urllib.request.urlopen(url, timeout=seconds)
        with response:
            while True:
                with process.outside_calls():
                    part = response.read1(URL_READ_BYTES)
                if not part:
                    return bytes(data)
                data += part
                opening.check_held(len(data), repr(url))
                opening.check_time()
    except BadMedia:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        opening.check_time()  # it may be the time that was left
        raise BadMedia(
            f"open_video: video must be a URL that can be fetched, got {url!r} ({error})"
        ) from error
