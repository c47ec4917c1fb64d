"""What opening learns about a video: from one pass over the content, or from the index cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import av

from vtts_rt.video.container import Media, av_errors, video_stream
from vtts_rt.video.content_hash import PIECE_BYTES
from vtts_rt.video.index import PacketIndex, build_index
from vtts_rt.video.limits import require_video
from vtts_rt.video.packets import open_stream
from vtts_rt.video.pixels import display_matrix


@dataclass(frozen=True, slots=True, eq=False)
class VideoFacts:
    """The first video stream of a content; the same for the same bytes and `source_fps`.

    content_id: hash of the content. codec: FFmpeg's name of it. stored_hw: (H, W) px of a frame
    as it is stored; matrix: how it is put upright (`pixels.display_matrix`).
    """

    content_id: str
    codec: str
    stored_hw: tuple[int, int]
    matrix: tuple[int, int, int, int]
    index: PacketIndex


def learn_facts(media: Media, container: Any, source_fps: float | None) -> VideoFacts:
    """One pass over the packets of a freshly opened container, the content hashed beside it.

    source_fps: rate of a stream that has no timestamps of its own.
    Raises ValueError when the content is no video, none of its frames decodes, or it exceeds a
    bound of the opening.
    """
    stream = video_stream(container, media.name)
    media.check_pixels(stream.codec_context.height, stream.codec_context.width)
    stream.thread_count = 1  # one frame is decoded: threads would only read ahead
    if hasattr(stream, "discard"):  # PyAV 18 on: packets of sound need not be made to be dropped
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
    with ThreadPoolExecutor(1, "vtts_rt-hash") as pool, av_errors(media.name):
        # Beside a small content a thread costs more than it saves.
        hashed = pool.submit(media.content_id) if media.num_bytes > PIECE_BYTES else None
        with media.cancelled_on_error():
            found = build_index(
                container,
                stream,
                lambda exact: open_stream(media, exact),
                source_fps,
                media.check_counts,
            )
        content_id = media.content_id() if hashed is None else hashed.result()
    media.check_unchanged()
    require_video(found is not None, "hold at least one frame that can be decoded", media.name)
    assert found is not None
    index, first = found
    return VideoFacts(
        content_id=content_id,
        codec=stream.codec_context.codec.canonical_name,
        stored_hw=(first.height, first.width),
        matrix=display_matrix(first),
        index=index,
    )
