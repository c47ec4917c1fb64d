"""Frames that are in memory already: arrays, tensors, images.

Shape letters: T frames, H height, W width (px).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from vtts_rt.types import VideoMetadata, require
from vtts_rt.video.source import distinct_indices


def array_id(array: np.ndarray) -> str:
    """Hash of an array's shape and bytes: the content id of frames given as pixels."""
    digest = hashlib.blake2b(f"uint8{array.shape}".encode(), digest_size=16)
    for frame in array if array.ndim == 4 else [array]:
        digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()


class ArraySource:
    """A (T, H, W, 3) uint8 RGB array at a constant rate, or an (H, W, 3) array as an image.

    array: not copied; frames are copied as they are read. The content id is taken here, so the
        caller must not change the array while the source is in use.
    source_fps: frames a second; required for T frames, must be left out for an image.
    decoder: the name that metadata reports; the default is "array", or "image" for an image.
    content_id: given when the array was decoded from a file that has an id of its own.
    Raises ValueError for other shapes, other dtypes, no frames, no pixels.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        source_fps: float | None = None,
        decoder: str | None = None,
        content_id: str | None = None,
    ) -> None:
        shape, is_image = array.shape, array.ndim == 3
        ok = array.ndim in (3, 4) and shape[-1] == 3 and 0 not in shape
        rule = "a non-empty array of shape (T, H, W, 3), or (H, W, 3) for an image"
        require("open_video", "video", f"an array of shape {shape}", ok, rule)
        require("open_video", "video", f"{array.dtype} pixels", array.dtype == np.uint8, "uint8")
        fps = float(source_fps) if source_fps is not None else math.nan
        if not is_image:
            rule = "a number of frames a second in (0, 10000], as an array holds no rate"
            require("open_video", "source_fps", source_fps, 0.0 < fps <= 1e4, rule)
        self._frames = array[None] if is_image else array
        num_frames = 1 if is_image else shape[0]
        # An image has no rate and no duration; 1.0 keeps divisions by the rate defined.
        rate = 1.0 if is_image else fps
        self._metadata = VideoMetadata(
            video_id=content_id or array_id(array),
            num_frames=num_frames,
            source_fps=rate,
            duration_seconds=0.0 if is_image else num_frames / rate,
            height=shape[-3],
            width=shape[-2],
            decoder=decoder or ("image" if is_image else "array"),
            is_image=is_image,
            timestamps_seconds=np.arange(num_frames, dtype=np.float64) / rate,
        )

    @property
    def metadata(self) -> VideoMetadata:
        return self._metadata

    @property
    def frames_codec_decoded(self) -> int:
        return 0

    @property
    def frames_substituted(self) -> int:
        return 0

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        indices = distinct_indices(frame_indices, self._metadata.num_frames)
        return ((i, np.array(self._frames[i], order="C")) for i in indices)

    def close(self) -> None:
        """Nothing is held but the caller's own array."""

    def __enter__(self) -> ArraySource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
