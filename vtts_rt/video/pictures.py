"""Pictures through Pillow: files of one picture, and PIL images.

Shape letters: H height, W width (px).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.limits import DeadlinePassed, Opening, require_video
from vtts_rt.video.picture_files import (
    num_png_frames,
    picture_follows,
    picture_format,
    png_size,
    webp_header,
)
from vtts_rt.video.source import FrameSource, derive_id
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
    return ArraySource(decoded(image, "a PIL image"))


def open_picture(media: Media, opening: Opening, source_fps: float | None) -> FrameSource | None:
    """A file of one picture, or an animated PNG or WebP; None for what FFmpeg is to open.

    Of pictures that follow each other in one file, which are a video, it leaves FFmpeg's demuxer
    and the rate with `media`. Raises ValueError for a picture that Pillow cannot decode.
    """
    from vtts_rt.video.animations import AnimationSource, ApngFrames, WebpFrames

    with media.reader() as reader:
        data = Window(reader, media.num_bytes)
        kind = picture_format(data.at(0, 64))
        if kind is None:
            return None
        if kind == "PNG" and num_png_frames(data) > 1:
            opening.check_pixels(*png_size(data), media.name)
            opening.check_frames(num_png_frames(data), media.name)
            return AnimationSource(media, ApngFrames(media, data, opening))
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
            return AnimationSource(media, WebpFrames(media, durations))
        reader.seek(0)
        image = identified(reader, kind)
        if image is None:
            return None  # a variant that FFmpeg may know
        opening.check_pixels(image.height, image.width, media.name)
        if kind == "TIFF":
            _require_one_page(image, media.name)
        pixels = decoded(image, media.name)
    content_id = derive_id(media.content_id(), "image", CONVERSION)
    return ArraySource(pixels, decoder="image", content_id=content_id)


def identified(file: object, kind: str) -> Image.Image | None:
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


def decoded(image: Image.Image, name: str) -> np.ndarray:
    """`picture_pixels`; ValueError where it cannot be decoded."""
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
