"""Encoded files and bytes to a FrameSource: videos to a decoder's, pictures to an array's."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

from vtts_rt.types import Decoder
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.bounds import check_header
from vtts_rt.video.container import Media, av_errors, video_stream
from vtts_rt.video.decoders import chosen_decoder
from vtts_rt.video.facts import VideoFacts, learn_facts
from vtts_rt.video.index import demuxed
from vtts_rt.video.index_cache import known_facts, remember_facts
from vtts_rt.video.limits import Opening, require_video
from vtts_rt.video.pictures import open_picture
from vtts_rt.video.pixels import display_matrix, to_rgb
from vtts_rt.video.pyav import CONVERSION, PyavSource
from vtts_rt.video.source import FrameSource, derive_id

logger = logging.getLogger(__name__)

# FFmpeg's demuxers for one picture in memory are called exr_pipe, pcx_pipe, ...
IMAGE_FORMAT_SUFFIX = "_pipe"


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
    media.opening = None  # frames are read however long after
    return source


def _opened(media: Media, opening: Opening, source_fps: float | None) -> FrameSource:
    picture = open_picture(media, opening, source_fps)
    if picture is not None:
        return picture
    facts = known_facts(media, source_fps)
    if facts is None:
        check_header(media, opening)
        learned = _learned(media, source_fps)
        if isinstance(learned, ArraySource):
            return learned
        facts = learned
        remember_facts(media, source_fps, facts)
    opening.check_pixels(*facts.stored_hw, media.name)
    opening.check_packets(facts.index.num_packets, media.name)
    opening.check_frames(facts.index.num_frames, media.name)
    return PyavSource(media, facts)


def _learned(media: Media, source_fps: float | None) -> VideoFacts | ArraySource:
    with media.open() as container:
        several = not container.format.name.endswith(IMAGE_FORMAT_SUFFIX) or media.demuxer
        if several:
            return learn_facts(media, container, source_fps)
        picture = _picture(media, container)
    if picture is not None:
        return picture
    with media.open() as container:
        return learn_facts(media, container, source_fps)


def _picture(media: Media, container: Any) -> ArraySource | None:
    """A picture of a format that Pillow does not know; None where several follow each other."""
    stream = video_stream(container, media.name)
    with av_errors(media.name):
        packets = list(islice(demuxed(container, stream), 2))
        if len(packets) > 1:
            return None
        frames = [f for packet in [*packets, None] for f in stream.decode(packet)]
    require_video(bool(frames), "be an image that can be decoded", media.name)
    first = frames[0]
    pixels = to_rgb(first, first.height, first.width, display_matrix(first), media.name)
    content_id = derive_id(media.content_id(), "image", CONVERSION)
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
