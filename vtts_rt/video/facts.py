"""What opening learns about a video: from one pass over the content, or from the index cache."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from vtts_rt.video.bounds import Track
from vtts_rt.video.container import PIECE_BYTES, Media, av_errors, pass_by, video_stream
from vtts_rt.video.index import PacketIndex, build_index
from vtts_rt.video.limits import require_video
from vtts_rt.video.packets import open_stream
from vtts_rt.video.pixels import display_matrix
from vtts_rt.video.tables import sample_table

ARRAYS = ("keys", "seek_times", "order", "frame_of", "packet_of", "keyframes", "times_seconds")
NUMBERS = ("key_name", "source_fps", "duration_seconds")


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

    def to_bytes(self) -> bytes:
        """All but `content_id`: a compressed .npz of the differences of the index's arrays, which
        are small and repeat, and of the rest as JSON."""
        index = self.index
        arrays = {n: getattr(index, n) for n in ARRAYS if getattr(index, n) is not None}
        bits = {n: np.asarray(values).view(np.int64) for n, values in arrays.items()}
        rest = {n: getattr(index, n) for n in NUMBERS}
        text = json.dumps([self.codec, self.stored_hw, self.matrix, rest])
        file = io.BytesIO()
        # int64 wraps, and a cumulative sum wraps back.
        differences: dict[str, Any] = {n: np.diff(b, prepend=np.int64(0)) for n, b in bits.items()}
        np.savez(file, rest=np.array(text), **differences)
        return zlib.compress(file.getvalue(), 1)

    @staticmethod
    def from_bytes(content_id: str, data: bytes) -> VideoFacts:
        """The facts of which these are `to_bytes`."""
        with np.load(io.BytesIO(zlib.decompress(data))) as file:
            codec, hw, matrix, rest = json.loads(str(file["rest"]))
            values: dict[str, Any] = {"keys": None, **rest}
            values |= {n: np.cumsum(file[n]) for n in ARRAYS if n in file}
        values["keyframes"] = values["keyframes"].tolist()
        values["times_seconds"] = values["times_seconds"].view(np.float64)
        index = PacketIndex(**values)
        return VideoFacts(content_id, codec, tuple(hw), tuple(matrix), index)


def learn_facts(
    media: Media, container: Any, source_fps: float | None, tracks: Iterable[Track] = ()
) -> VideoFacts:
    """One pass over the packets of a freshly opened container, the content hashed beside it; of a
    long MP4 one over its sample tables.

    source_fps: rate of a stream that has no timestamps of its own. tracks: of `check_header`.
    Raises ValueError when the content is no video, none of its frames decodes, or it exceeds a
    bound of the opening.
    """
    stream = _alone(container, video_stream(container, media.name))
    opening = media.opening
    opening.check_pixels(stream.codec_context.height, stream.codec_context.width, media.name)
    with ThreadPoolExecutor(1, "vtts_rt-hash") as pool, av_errors(media.name):
        # Beside a small content a thread costs more than it saves.
        table = hashed = None
        if media.num_bytes > PIECE_BYTES:
            pool.submit(media.read_ahead)
            table = sample_table(container, stream, tracks, media.num_bytes)
            hashed = pool.submit(media.content_id, table.look if table else pass_by)
            if table:
                table.has_looked = hashed.result

        def reopen() -> tuple[Any, Any]:
            container, stream = open_stream(media)
            return container, _alone(container, stream)

        try:
            found = build_index(
                container,
                stream,
                reopen,
                source_fps,
                lambda packets, frames: opening.check_counts(packets, frames, media.name),
                table.packets if table else None,
            )
        except BaseException:
            opening.cancel()
            raise
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


def _alone(container: Any, stream: Any) -> Any:
    """`stream`, to be passed over without the others; one frame of it is decoded."""
    stream.thread_count = 1  # threads would only read ahead
    if hasattr(stream, "discard"):  # PyAV 18 on: packets of sound need not be made to be dropped
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
    return stream
