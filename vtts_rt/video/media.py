"""Encoded files and bytes to a FrameSource: videos to a decoder's, pictures to an array's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vtts_rt.types import Decoder
from vtts_rt.video.animations import AnimationSource
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.bounds import Track, check_header
from vtts_rt.video.container import Media, Window
from vtts_rt.video.decoders import chosen_decoder
from vtts_rt.video.facts import VideoFacts, learn_facts
from vtts_rt.video.index_cache import known_facts, remember_facts
from vtts_rt.video.limits import Opening, require_video
from vtts_rt.video.picture_files import (
    picture_follows,
    picture_format,
    png_durations,
    png_size,
    webp_header,
)
from vtts_rt.video.pictures import CONVERSION as PICTURE_CONVERSION
from vtts_rt.video.pictures import decoded, identified
from vtts_rt.video.pyav import CONVERSION, PyavSource
from vtts_rt.video.source import FrameSource, derive_id

logger = logging.getLogger(__name__)

# FFmpeg's demuxers for one picture in memory are called exr_pipe, pcx_pipe, ...
IMAGE_FORMAT_SUFFIX = "_pipe"
# Those of pictures that follow each other, one a frame, by Pillow's names of the formats.
SEQUENCE_DEMUXERS = {
    "JPEG": "mjpeg",
    "PNG": "png_pipe",
    "BMP": "bmp_pipe",
    "PPM": "ppm_pipe",
    "WEBP": "webp_pipe",
}
# TIFF's NewSubfileType: a smaller version of the page before, or its mask.
SUBFILE_TYPE, NO_PAGE = 254, 1 | 4


def open_media(
    data: Path | bytes,
    source_fps: float | None = None,
    decoder: Decoder = "pyav",
    device: int | None = None,
    opening: Opening | None = None,
) -> FrameSource:
    """A source for a file's path or content; `open_video` checks the arguments and says more.

    Raises ValueError for what cannot be opened, with one sentence that says why; DeadlinePassed.
    """
    decoder = chosen_decoder(decoder, device)
    opening = opening or Opening()
    media = Media(data, opening)
    source = _opened(media, opening, source_fps)
    if decoder == "dali" and isinstance(source, PyavSource):
        source = _through_dali(source, device)
    opening.end()
    return source


def _opened(media: Media, opening: Opening, source_fps: float | None) -> FrameSource:
    picture = _open_picture(media, opening, source_fps)
    if picture is not None:
        return picture
    facts = known_facts(media, source_fps)
    if facts is None:
        learned = _learned(media, source_fps, check_header(media, opening))
        if isinstance(learned, ArraySource):
            return learned
        facts = learned
        remember_facts(media, source_fps, facts)
    opening.check_pixels(*facts.stored_hw, media.name)
    opening.check_counts(facts.index.num_packets, facts.index.num_frames, media.name)
    return PyavSource(media, facts)


def _open_picture(media: Media, opening: Opening, source_fps: float | None) -> FrameSource | None:
    """A file of one picture, or an animated PNG or WebP; None for what FFmpeg is to open.

    Of pictures that follow each other in one file, which are a video, it leaves FFmpeg's demuxer
    and the rate with `media`. Raises ValueError for a picture that Pillow cannot decode.
    """
    with media.reader() as reader:
        data = Window(reader, media.num_bytes)
        kind = picture_format(data.at(0, 64))
        if kind is None:
            return None
        if kind in SEQUENCE_DEMUXERS and picture_follows(kind, data, media.name):
            media.demuxer = SEQUENCE_DEMUXERS[kind]
            media.demuxer_options = {} if source_fps is None else {"framerate": str(source_fps)}
            return None
        durations: list[float] = []
        if kind == "PNG":
            opening.check_pixels(*png_size(data), media.name)
            durations = png_durations(data, opening, media.name)
        if kind == "WEBP":  # Pillow reads all of it, and makes room for the pixels, to open it
            opening.check_held(media.num_bytes, media.name)
            height, width, durations = webp_header(data, opening, media.name)
            opening.check_pixels(height, width, media.name)
        if len(durations) > 1:
            return AnimationSource(media, kind, durations)
        reader.seek(0)
        image = identified(reader, kind)
        if image is None:
            return None  # a variant that FFmpeg may know
        opening.check_pixels(image.height, image.width, media.name)
        if kind == "TIFF":
            _require_one_page(image, media.name)
        pixels = decoded(image, media.name)
    content_id = derive_id(media.content_id(), "image", PICTURE_CONVERSION)
    return ArraySource(pixels, decoder="image", content_id=content_id)


def _require_one_page(image: Any, name: str) -> None:
    """TIFF says nothing of when its pages show."""
    try:
        image.seek(1)
        several = not image.tag_v2.get(SUBFILE_TYPE, 0) & NO_PAGE
    except (EOFError, OSError, SyntaxError, TypeError, ValueError):
        several = False
    rule = "be a TIFF file of one page, as pages have no times (an array has with source_fps)"
    require_video(not several, rule, f"several pages in {name}")
    image.seek(0)


def _learned(
    media: Media, source_fps: float | None, tracks: list[Track]
) -> VideoFacts | ArraySource:
    """What one pass tells of a video; a picture of a format that Pillow does not know."""
    with media.open() as container:
        facts = learn_facts(media, container, source_fps, tracks)
        is_picture = container.format.name.endswith(IMAGE_FORMAT_SUFFIX) and not media.demuxer
    if not is_picture or facts.index.num_packets > 1:
        return facts
    with PyavSource(media, facts) as source:
        pixels = dict(source.read([0]))[0]
    content_id = derive_id(facts.content_id, "image", CONVERSION)
    return ArraySource(pixels, decoder="image", content_id=content_id)


def _through_dali(source: PyavSource, device: int | None) -> FrameSource:
    """`source` decoded by DALI where that can, else `source` itself."""
    from vtts_rt.video.dali import DaliSource, Refused

    try:
        return DaliSource(source, device)
    except Refused as reason:
        logger.info("%s: decoded by PyAV, not DALI (%s)", source.media.name, reason)
        return source
    except BaseException:
        source.close()
        raise
