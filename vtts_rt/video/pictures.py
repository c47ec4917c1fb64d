"""Pictures through Pillow: files of one picture, PIL images, animated WebP.

Shape letters: H height, W width (px).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from vtts_rt.types import VideoMetadata
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.limits import DeadlinePassed, Opening, require_video
from vtts_rt.video.picture_files import (
    num_png_frames,
    picture_follows,
    picture_format,
    webp_header,
)
from vtts_rt.video.source import derive_id, distinct_indices
from vtts_rt.video.window import Window

if TYPE_CHECKING:
    from vtts_rt.video.container import Media  # PIL images need no PyAV

logger = logging.getLogger(__name__)

# Part of the id of a picture's content, as caches of features hold what this conversion made.
CONVERSION = "Pillow RGB"
# FFmpeg's demuxers of pictures that follow each other, one a frame.
SEQUENCE_DEMUXERS = {
    "JPEG": "mjpeg",
    "PNG": "png_pipe",
    "BMP": "bmp_pipe",
    "PPM": "ppm_pipe",
    "WEBP": "webp_pipe",
}
# TIFF's NewSubfileType: a smaller version of the page before, or its mask.
SUBFILE_TYPE, NO_PAGE = 254, 1 | 4


def picture_pixels(image: Image.Image) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8 RGB, upright: `ImageOps.exif_transpose`, `convert("RGB")`.

    Gray of 16 bits is cut to its upper 8, as Pillow does with 16 bits of colour (`convert` would
    show all above 255 as white). Alpha is dropped, ICC profiles are ignored.
    """
    # Pillow widens 16 bits of PPM to mode I.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image.load()
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # whatever broken EXIF does to its parser, the pixels are there
        logger.warning("the EXIF data of an image is ignored, as it cannot be read: %s", error)
        upright = image
    if deep:
        gray = np.clip(np.asarray(upright) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if upright.mode == "La":  # Pillow knows no way from there to RGB
        upright = upright.convert("LA")
    return np.array(upright.convert("RGB"), order="C")


def open_pil_image(image: Image.Image, opening: Opening) -> ArraySource:
    """A PIL image, of an animation its current frame; ValueError where it cannot be decoded."""
    opening.check_pixels(image.height, image.width, "a PIL image")
    return ArraySource(_decoded(image, "a PIL image"))


def open_picture(
    media: Media, opening: Opening, source_fps: float | None
) -> ArraySource | WebpSource | None:
    """A file of one picture, or an animated WebP; None for what FFmpeg is to open.

    Of pictures that follow each other in one file, which are a video, it leaves FFmpeg's demuxer
    and the rate with `media`. Raises ValueError for a picture that Pillow cannot decode.
    """
    with media.reader() as reader:
        data = Window(reader, media.num_bytes)
        kind = picture_format(data.at(0, 64))
        if kind is None or (kind == "PNG" and num_png_frames(data) > 1):
            return None
        if kind in SEQUENCE_DEMUXERS and picture_follows(kind, data, media.name):
            media.demuxer = SEQUENCE_DEMUXERS[kind]
            media.demuxer_options = {} if source_fps is None else {"framerate": str(source_fps)}
            return None
        durations: list[float] = []
        if kind == "WEBP":  # Pillow reads all of it, and makes room for the pixels, to open it
            opening.check_held(media.num_bytes, media.name)
            height, width, durations = webp_header(data, opening, media.name)
            opening.check_pixels(height, width, media.name)
        if len(durations) > 1:
            return WebpSource(media, durations)
        reader.seek(0)
        image = _opened(reader, kind)
        if image is None:
            return None  # a variant that FFmpeg may know
        opening.check_pixels(image.height, image.width, media.name)
        if kind == "TIFF":
            _require_one_page(image, media.name)
        pixels = _decoded(image, media.name)
    content_id = derive_id(media.content_id(), "image", CONVERSION)
    return ArraySource(pixels, decoder="image", content_id=content_id)


def _opened(file: object, kind: str) -> Image.Image | None:
    """`Image.open` for one format, without Pillow's own bound on pixels, of which it warns first;
    None where the format's reader does not know what it sees."""
    Image.init()
    factory, _ = Image.OPEN[kind]
    try:
        return factory(file, "")  # type: ignore[arg-type]
    except (DeadlinePassed, MemoryError):
        raise
    except Exception:
        return None


def _decoded(image: Image.Image, name: str) -> np.ndarray:
    try:
        return picture_pixels(image)
    except (DeadlinePassed, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        reason = str(error) or type(error).__name__
        rule = "be an image that can be decoded"
        raise ValueError(f"open_video: video must {rule}, got {name} ({reason})") from error


def _require_one_page(image: Image.Image, name: str) -> None:
    """TIFF says nothing of when its pages show."""
    try:
        image.seek(1)
        several = not image.tag_v2.get(SUBFILE_TYPE, 0) & NO_PAGE  # type: ignore[attr-defined]
    except (EOFError, OSError, SyntaxError, TypeError, ValueError):
        several = False
    rule = "be a TIFF file of one page, as pages have no times (an array has with source_fps)"
    require_video(not several, rule, f"several pages in {name}")
    image.seek(0)


class WebpSource:
    """An animated WebP file, which FFmpeg does not decode; a FrameSource.

    durations: seconds of each frame. Frames that cannot be decoded are served by the last one
    that can, counted and logged once.
    Raises ValueError when the first frame cannot be decoded.
    """

    def __init__(self, media: Media, durations: Sequence[float]) -> None:
        self._media = media
        self._lock = threading.Lock()
        self._closed = False
        with media.reader() as file:
            image = _opened(file, "WEBP")  # which reads all of it
        num_frames = getattr(image, "n_frames", 0)
        require_video(num_frames == len(durations), "be a readable video or image", media.name)
        assert image is not None
        self._image = image
        first = _decoded(image, media.name)
        self._num_sound = num_frames
        self.frames_codec_decoded = 0
        self.frames_substituted = 0
        ends = np.cumsum(durations)
        self.metadata = VideoMetadata(
            video_id=derive_id(media.content_id(), "webp", CONVERSION),
            num_frames=num_frames,
            source_fps=num_frames / float(ends[-1]),
            duration_seconds=float(ends[-1]),
            height=first.shape[0],
            width=first.shape[1],
            decoder="image",
            timestamps_seconds=np.concatenate([[0.0], ends[:-1]]),
        )

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        self._check_usable()
        indices = distinct_indices(frame_indices, self.metadata.num_frames)
        return ((i, self._frame(i)) for i in indices)

    def close(self) -> None:
        self._closed = True
        with self._lock:
            self._image.close()

    def __enter__(self) -> WebpSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _frame(self, index: int) -> np.ndarray:
        with self._lock:
            self._check_usable()
            if index < self._num_sound:
                try:
                    pixels = self._decode(index)
                except ValueError as error:
                    self._lose(index, error)
                else:
                    return pixels
            self.frames_substituted += 1
            return self._decode(self._num_sound - 1)

    def _decode(self, index: int) -> np.ndarray:
        self._image.seek(index)
        self.frames_codec_decoded += 1
        return _decoded(self._image, self._media.name)

    def _lose(self, index: int, error: Exception) -> None:
        """The decoder goes from frame to frame: it knows nothing behind the first broken one."""
        for sound in range(index):
            try:
                self._decode(sound)
            except ValueError:
                break
        else:
            sound = index
        require_video(sound > 0, "be a readable video or image", self._media.name)
        self._num_sound = sound
        logger.warning(
            "%s: the frames from %d on cannot be decoded (%s), the one before stands in for them "
            "(the count of such frames is in frames_substituted)",
            self._media.name,
            sound,
            error,
        )

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError(f"the video {self._media.name} was closed: open it again")
        self._media.check_unchanged()
