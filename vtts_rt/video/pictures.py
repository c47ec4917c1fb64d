"""Pictures through Pillow, from PIL images to upright RGB; no PyAV is needed.

Shape letters: H height, W width (px).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vtts_rt.errors import BadMedia
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.limits import DeadlinePassed, Opening

logger = logging.getLogger(__name__)

# Part of the id of a picture's content, as caches of features hold what this conversion made.
CONVERSION = "Pillow RGB"


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


def decoded(image: Any, name: str, frame: int | None = None) -> np.ndarray:
    """`picture_pixels`, of an animation those of a frame; ValueError where it cannot be decoded."""
    try:
        if frame is not None:
            image.seek(frame)
        return picture_pixels(image)
    except (DeadlinePassed, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        reason = str(error) or type(error).__name__
        rule = "be an image that can be decoded"
        raise BadMedia(f"open_video: video must {rule}, got {name} ({reason})") from error
