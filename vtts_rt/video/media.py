"""Encoded files and bytes to a FrameSource: videos to a decoder's, pictures to an array's."""

from __future__ import annotations

import logging
from pathlib import Path

from vtts_rt.types import Decoder
from vtts_rt.video.arrays import ArraySource
from vtts_rt.video.container import Media, av_errors, require_video, video_stream
from vtts_rt.video.decoders import chosen_decoder
from vtts_rt.video.index import demuxed
from vtts_rt.video.pixels import display_matrix, to_rgb
from vtts_rt.video.pyav import CONVERSION, PyavSource
from vtts_rt.video.source import FrameSource, derive_id

logger = logging.getLogger(__name__)

# FFmpeg's demuxers for one picture in memory are called png_pipe, jpeg_pipe, webp_pipe, ...
IMAGE_FORMAT_SUFFIX = "_pipe"


def open_media(
    data: Path | bytes,
    source_fps: float | None = None,
    decoder: Decoder = "pyav",
    device: int | None = None,
) -> FrameSource:
    """A source for a file's path or content; `open_video` checks the arguments and says more.

    Raises ValueError for what cannot be opened, with one sentence that says why.
    """
    decoder = chosen_decoder(decoder, device)
    media = Media(data)
    with media.open() as container:
        if not container.format.name.endswith(IMAGE_FORMAT_SUFFIX):
            source = PyavSource(media, source_fps=source_fps)
            return source if decoder == "pyav" else _through_dali(source, device)
        stream = video_stream(container, media.name)
        with av_errors(media.name):
            frames = [f for packet in demuxed(container, stream) for f in stream.decode(packet)]
            frames += stream.decode(None)
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
