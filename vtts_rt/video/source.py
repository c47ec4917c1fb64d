"""Where frames come from: what every decoder is, a clip range over one, and what callers share.

Shape letters: T frames, H height, W width (px).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from vtts_rt.types import Frame, VideoMetadata, require

# Clip bounds and timestamps are both rounded decimals of rational times: below a microsecond
# apart they are the same instant (containers count in 1/90000 s or coarser).
SAME_INSTANT_SECONDS = 1e-6

Source = TypeVar("Source", bound="FrameSource")


class FrameSource:
    """An opened video. Thread-safe; a context manager that closes itself.

    metadata: what is known before any frame is delivered.
    frames_codec_decoded: running count of the frames that `read` made a codec decode; 0 for
        sources without a codec.
    frames_substituted: running count of delivered frames that could not be decoded and are
        copies of a neighbour.
    """

    metadata: VideoMetadata
    _num_substituted = 0

    @property
    def frames_codec_decoded(self) -> int:
        return 0

    @property
    def frames_substituted(self) -> int:
        return self._num_substituted

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, Frame]]:
        """Each distinct index of `frame_indices` once, in any order, with its frame.

        passing: frames that are delivered too where the decoder passes them on its way; it
        neither seeks nor reads on for them.
        Frames are (H, W, 3) uint8 RGB, C-contiguous, owned by the caller: no view of memory that
        holds more than the frame. Arrays, or tensors on the device where they were decoded. Those
        are handed over complete: `read` has waited for the stream that writes them, so that any
        stream may read them, and that stream had waited for what used their memory before.
        Raises ValueError for an index outside 0 .. num_frames-1, at the call.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files, decoders and memory; reading is an error from then on."""

    def __enter__(self: Source) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SourceView(FrameSource):
    """Frames of another source."""

    _source: FrameSource

    @property
    def frames_codec_decoded(self) -> int:
        return self._source.frames_codec_decoded

    @property
    def frames_substituted(self) -> int:
        return self._source.frames_substituted


def distinct_indices(frame_indices: Iterable[Any], num_frames: int) -> list[int]:
    """The distinct indices, ascending, checked against 0 .. num_frames-1.

    Raises ValueError for anything but integers in range.
    """
    checked = set()
    for index in frame_indices:
        ok = isinstance(index, int | np.integer) and 0 <= int(index) < num_frames
        require("read", "frame_indices", index, ok, f"integers in 0..{num_frames - 1}")
        checked.add(int(index))
    return sorted(checked)


def derive_id(content_id: str, *what: object) -> str:
    """The id of a view of a content: as long as a content id, and different for other views."""
    text = "\0".join([content_id, *map(repr, what)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ClippedSource(SourceView):
    """The frames of `source` that are on screen during [start_seconds, end_seconds).

    A frame is on screen from its timestamp until the next frame's. Indices count from 0 at the
    first such frame; timestamps are relative to the start of the range (frame 0 is at 0.0 even
    where it came on screen earlier). None leaves a side open; an end beyond the video's is cut.
    Closing it closes `source`. Raises ValueError for a range that holds nothing of the video.
    """

    def __init__(
        self, source: FrameSource, start_seconds: float | None, end_seconds: float | None
    ) -> None:
        whole = source.metadata
        start = 0.0 if start_seconds is None else float(start_seconds)
        end = whole.duration_seconds if end_seconds is None else float(end_seconds)
        rule = f"before the end of the video ({whole.duration_seconds:.3f} s)"
        require("open_video", "start_seconds", start_seconds, start < whole.duration_seconds, rule)
        rule = f"greater than {start} s"
        require("open_video", "end_seconds", end_seconds, end > start, rule)
        end = min(end, whole.duration_seconds)
        times = whole.timestamps_seconds
        assert times is not None, "sources of frames with a duration say when each shows"
        first = int(np.searchsorted(times, start + SAME_INSTANT_SECONDS, side="right")) - 1
        self._first = max(first, 0)
        stop = int(np.searchsorted(times, end - SAME_INSTANT_SECONDS, side="left"))
        stop = max(stop, self._first + 1)
        self._source = source
        self.metadata = replace(
            whole,
            video_id=derive_id(whole.video_id, "clip", self._first, stop, start, end),
            num_frames=stop - self._first,
            duration_seconds=end - start,
            timestamps_seconds=np.maximum(times[self._first : stop] - start, 0.0),
        )

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, Frame]]:
        first, num = self._first, self.metadata.num_frames
        indices, by_products = (distinct_indices(x, num) for x in (frame_indices, passing))
        frames = self._source.read([first + i for i in indices], [first + i for i in by_products])
        return ((i - first, frame) for i, frame in frames)

    def close(self) -> None:
        self._source.close()


class Video(SourceView):
    """An opened video, for any number of questions: `open_video` takes it where it takes a path.

    metadata: its VideoMetadata; frames_codec_decoded, frames_substituted: running counts of frames.
    video: what it holds, or another Video that it shares with: the source closes with the last of
    them, so that one may be closed while questions about it run. A FrameSource, thread-safe.
    Raises BadRequest for a Video that is closed.
    """

    def __init__(self, video: FrameSource | Video) -> None:
        self._shared: _Shared = video._shared if isinstance(video, Video) else _Shared(video)
        self._closed = False
        with self._shared.lock:
            is_open = not (isinstance(video, Video) and video._closed)
            require("open_video", "video", "a closed one", is_open, "open")
            self._shared.num_open += 1
        self._source = self._shared.source
        self.metadata = self._source.metadata

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, Frame]]:
        return self._source.read(frame_indices, passing)

    def close(self) -> None:
        with self._shared.lock:
            self._shared.num_open -= not self._closed
            self._closed = True
            is_last = self._shared.num_open == 0
        if is_last:
            self._source.close()


class _Shared:
    """What several Videos hold."""

    def __init__(self, source: FrameSource) -> None:
        self.source = source
        self.lock = threading.RLock()  # a garbage collection may close what it collects
        self.num_open = 0


def origin_of(source: FrameSource) -> FrameSource:
    """What decodes the frames of a source: what a Video or a clip range holds, else itself."""
    while isinstance(source, SourceView):
        source = source._source
    return source
