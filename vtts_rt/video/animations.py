"""Animated PNG and WebP, as Pillow composes them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from vtts_rt.errors import BadMedia
from vtts_rt.types import VideoMetadata
from vtts_rt.video.container import Media
from vtts_rt.video.limits import require_video
from vtts_rt.video.pictures import CONVERSION, decoded, identified
from vtts_rt.video.source import FrameSource, derive_id, distinct_indices


class AnimationSource(FrameSource):
    """An animation as a FrameSource.

    kind: Pillow's name of the format. durations: seconds of each frame. The whole file is held in
    memory. Raises ValueError when Pillow does not read it, or not the first frame; `read` raises
    RuntimeError at a frame that cannot be decoded.
    """

    def __init__(self, media: Media, kind: str, durations: Sequence[float]) -> None:
        media.opening.check_held(media.num_bytes, media.name)
        with media.reader() as reader:
            data = reader.read()
        self._open: Callable[[], Any] = lambda: identified(io.BytesIO(data), kind)
        image = self._open()
        # Of a PNG the first picture need not be a frame.
        self._skipped = getattr(image, "n_frames", 0) - len(durations)
        known = image is not None and self._skipped in (0, 1)
        require_video(known, "be a readable video or image", media.name)
        self._media, self._image = media, image
        self._lock = threading.Lock()
        self._closed, self._num_decoded = False, 0
        first = self._decoded(0)
        ends = np.cumsum(durations)
        self._num_decoded = 0
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
        return self._num_decoded

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        self._media.check_usable(self._closed)
        indices = distinct_indices(frame_indices, self.metadata.num_frames)
        return ((i, self._frame(i)) for i in indices)

    def close(self) -> None:
        self._closed = True

    def _frame(self, index: int) -> np.ndarray:
        with self._lock:
            self._media.check_usable(self._closed)
            try:
                return self._decoded(index)
            except BadMedia as error:
                raise RuntimeError(
                    f"frame {index} of the video {self._media.name} cannot be decoded: repair or "
                    f"re-encode the file ({error.__cause__})"
                ) from error

    def _decoded(self, index: int) -> np.ndarray:
        self._num_decoded += 1
        frame = index + self._skipped
        # Anew, as Pillow fails on some ways back, and after an error.
        if self._image is None or frame < self._image.tell():
            self._image = self._open()
        image, self._image = self._image, None
        pixels = decoded(image, self._media.name, frame)
        self._image = image
        return pixels
