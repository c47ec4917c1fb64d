"""Animated PNG and WebP, which FFmpeg composes wrongly in places or not at all.

Shape letters: H height, W width (px).
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from vtts_rt.types import VideoMetadata
from vtts_rt.video.container import Media
from vtts_rt.video.limits import Opening, require_video
from vtts_rt.video.picture_files import NO_TIME_SECONDS, PNG_START, png_chunks, png_size
from vtts_rt.video.pictures import CONVERSION, decoded, identified
from vtts_rt.video.source import derive_id, distinct_indices
from vtts_rt.video.window import Window

logger = logging.getLogger(__name__)


class AnimatedFrames(Protocol):
    """The frames of an animation; `frame` raises ValueError for one that cannot be decoded.

    durations: seconds of each. num_decoded: running count of frames decoded to get at others.
    """

    @property
    def durations(self) -> Sequence[float]: ...

    num_decoded: int

    def frame(self, index: int) -> np.ndarray: ...


class AnimationSource:
    """An animation as a FrameSource. Frames that cannot be decoded are served by the last one that
    can, counted and logged once: every frame is painted over those before it.

    Raises ValueError when the first frame cannot be decoded.
    """

    def __init__(self, media: Media, frames: AnimatedFrames) -> None:
        self._media, self._frames = media, frames
        self._lock = threading.Lock()
        self._closed = False
        first = frames.frame(0)
        ends = np.cumsum(frames.durations)
        self._num_sound = len(ends)
        self.frames_substituted = 0
        self._probed = frames.num_decoded
        self.metadata = VideoMetadata(
            video_id=derive_id(media.content_id(), "animation", CONVERSION),
            num_frames=len(ends),
            source_fps=len(ends) / float(ends[-1]),
            duration_seconds=float(ends[-1]),
            height=first.shape[0],
            width=first.shape[1],
            decoder="image",
            timestamps_seconds=np.concatenate([[0.0], ends[:-1]]),
        )

    @property
    def frames_codec_decoded(self) -> int:
        return self._frames.num_decoded - self._probed

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        self._check_usable()
        indices = distinct_indices(frame_indices, self.metadata.num_frames)
        return ((i, self._frame(i)) for i in indices)

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> AnimationSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _frame(self, index: int) -> np.ndarray:
        with self._lock:
            self._check_usable()
            if index < self._num_sound:
                try:
                    return self._frames.frame(index)
                except ValueError as error:
                    self._lose(index, error)
            if index < self._num_sound:
                return self._frames.frame(index)
            self.frames_substituted += 1
            return self._frames.frame(self._num_sound - 1)

    def _lose(self, index: int, error: Exception) -> None:
        sound = 0
        try:
            for sound in range(index + 1):
                self._frames.frame(sound)
        except ValueError:
            pass
        self._num_sound = max(sound, 1)
        logger.warning(
            "%s: the frames from %d on cannot be decoded (%s), the one before stands in for them "
            "(the count of such frames is in frames_substituted)",
            self._media.name,
            self._num_sound,
            error,
        )

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError(f"the video {self._media.name} was closed: open it again")
        self._media.check_unchanged()


class WebpFrames:
    """Frames of an animated WebP: libwebp composes them. Reads the whole file."""

    def __init__(self, media: Media, durations: Sequence[float]) -> None:
        with media.reader() as file:
            image = identified(file, "WEBP")
        known = image is not None and getattr(image, "n_frames", 0) == len(durations)
        require_video(known, "be a readable video or image", media.name)
        assert image is not None
        self._image, self._name = image, media.name
        self.durations = durations
        self.num_decoded = 0

    def frame(self, index: int) -> np.ndarray:
        self._image.seek(index)
        self.num_decoded += 1
        return decoded(self._image, self._name)


@dataclass(slots=True)
class _Part:
    """A frame of an animated PNG as it is stored: where it goes, what of the canvas it leaves.

    pieces: (start, end) of its compressed pixels in the file.
    """

    hw: tuple[int, int]
    x: int
    y: int
    dispose: int
    blend: int
    pieces: list[tuple[int, int]] = field(default_factory=list)


# PNG specification (third edition), 11.3.6.2: what becomes of a frame's area behind it, and how it
# is painted.
DISPOSE_BACKGROUND, DISPOSE_PREVIOUS = 1, 2
BLEND_SOURCE = 0
SHARED_CHUNKS = (b"PLTE", b"tRNS")


class ApngFrames:
    """Frames of an animated PNG, composed as the PNG specification says.

    FFmpeg and Pillow decode the parts alike, but each composes some orders of disposal wrongly.
    Raises ValueError for a part that does not lie within the picture.
    """

    def __init__(self, media: Media, data: Window, opening: Opening) -> None:
        self._media = media
        self._height, self._width = png_size(data)
        self._header = data.at(24, 5)  # depth, type of colour, and how they are packed
        self._shared = b""
        self._parts: list[_Part] = []
        self.durations: list[float] = []
        self.num_decoded = 0
        for kind, start, end in png_chunks(data):
            if kind in SHARED_CHUNKS:
                self._shared += _chunk(kind, data.at(start, min(end - start, 1024)))
            elif kind == b"fcTL":
                self._add(data.at(start, 26))
                opening.check_frames(len(self._parts), media.name)
                opening.check_time()
            elif kind in (b"IDAT", b"fdAT") and self._parts:
                self._parts[-1].pieces.append((start + 4 * (kind == b"fdAT"), end))
        require_video(bool(self._parts), "be a readable video or image", media.name)
        self._next = 0
        self._canvas = self._blank()

    def frame(self, index: int) -> np.ndarray:
        if index < self._next:
            self._next, self._canvas = 0, self._blank()
        shown = self._canvas
        while self._next <= index:
            shown = self._painted(self._parts[self._next])
        return np.ascontiguousarray(np.asarray(shown)[..., :3])

    def _add(self, control: bytes) -> None:
        rule = "hold frames that lie within the picture"
        require_video(len(control) == 26, rule, self._media.name)
        _, width, height, x, y, ticks, rate, dispose, blend = struct.unpack(">5I2H2B", control)
        inside = x + width <= self._width and y + height <= self._height and width and height
        require_video(bool(inside), rule, self._media.name)
        if dispose == DISPOSE_PREVIOUS and not self._parts:
            dispose = DISPOSE_BACKGROUND
        self._parts.append(_Part((height, width), x, y, dispose, blend))
        self.durations.append(ticks / (rate or 100) or NO_TIME_SECONDS)

    def _painted(self, part: _Part) -> Image.Image:
        """The canvas with the part on it; what it leaves of it is the next one's canvas."""
        picture = self._decoded(part)
        area = (part.x, part.y, part.x + part.hw[1], part.y + part.hw[0])
        before = self._canvas
        shown = before.copy()
        if part.blend != BLEND_SOURCE:
            picture = Image.alpha_composite(before.crop(area), picture)
        shown.paste(picture, area)
        self._canvas = before if part.dispose == DISPOSE_PREVIOUS else shown
        if part.dispose == DISPOSE_BACKGROUND:
            self._canvas = shown.copy()
            self._canvas.paste((0, 0, 0, 0), area)
        self._next += 1
        self.num_decoded += 1
        return shown

    def _decoded(self, part: _Part) -> Image.Image:
        """The part alone, as RGBA."""
        with self._media.reader() as reader:
            data = Window(reader, self._media.num_bytes)
            pixels = b"".join(data.at(start, end - start) for start, end in part.pieces)
        head = struct.pack(">2I", part.hw[1], part.hw[0]) + self._header
        chunks = _chunk(b"IHDR", head) + self._shared + _chunk(b"IDAT", pixels)
        image = identified(io.BytesIO(PNG_START + chunks + _chunk(b"IEND", b"")), "PNG")
        require_video(image is not None, "be a readable video or image", self._media.name)
        assert image is not None
        rgb = decoded(image, self._media.name)
        if image.mode.startswith("I;16"):
            return Image.fromarray(rgb).convert("RGBA")
        return image.convert("RGBA")

    def _blank(self) -> Image.Image:
        return Image.new("RGBA", (self._width, self._height))


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
