"""Frames that are in memory already: arrays, tensors, images.

Shape letters: T frames, H height, W width (px).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from vtts_rt.errors import BadMedia
from vtts_rt.types import VideoMetadata, require
from vtts_rt.video.limits import Opening, require_video
from vtts_rt.video.source import FrameSource, distinct_indices

NPY_MAGIC = b"\x93NUMPY"


def is_npy(content: Path | bytes) -> bool:
    """Whether a file or its content is one of numpy's; False for a file that cannot be read."""
    if isinstance(content, bytes):
        return content.startswith(NPY_MAGIC)
    try:
        if not content.is_file():
            return False
        with content.open("rb") as file:
            return file.read(len(NPY_MAGIC)) == NPY_MAGIC
    except (OSError, ValueError):
        return False  # the next open of it says why


def load_npy(content: Path | bytes, opening: Opening) -> np.ndarray:
    """The array of a .npy file, at most 1 GiB; ValueError where it is broken."""
    name = repr(str(content)) if isinstance(content, Path) else f"{len(content)} bytes"
    num_bytes = content.stat().st_size if isinstance(content, Path) else len(content)
    opening.check_held(num_bytes, name)
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        try:
            # Room for what its header declares is taken, but not touched, before it is read.
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("more follows the array")
            return np.asarray(array)
        except Exception as error:  # numpy's parser of the header raises many kinds
            got = f"{name} ({error})"
            raise BadMedia(
                f"open_video: video must be a .npy file of an array of numbers, got {got}"
            ) from error


def array_id(array: np.ndarray, check: Callable[[], None]) -> str:
    """Hash of an array's shape and bytes: the content id of frames given as pixels.

    check: called before every frame; what it raises ends the work.
    """
    digest = hashlib.blake2b(f"uint8{array.shape}".encode(), digest_size=16)
    for frame in array if array.ndim == 4 else [array]:
        check()
        digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()


class ArraySource(FrameSource):
    """A (T, H, W, 3) uint8 RGB array, or an (H, W, 3) array as an image.

    array: not copied; frames are copied as they are read. The content id is taken here, so the
        caller must not change the array while the source is in use.
    source_fps: frames a second; must be left out for an image.
    timestamps_seconds: (T,) when each frame shows, strictly ascending, counted from the first; in
        place of a constant rate. The last frame shows for a frame at `source_fps`, by default for
        the mean step.
    decoder: the name that metadata reports; the default is "array", or "image" for an image.
    content_id: given when the array was decoded from a file that has an id of its own.
    opening: the bounds and the deadline that hold; None where the caller has checked them.
    Raises ValueError for other shapes, other dtypes, no frames, no pixels, neither rate nor times
    for T frames, times that are none.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        source_fps: float | None = None,
        timestamps_seconds: Sequence[float] | np.ndarray | None = None,
        decoder: str | None = None,
        content_id: str | None = None,
        opening: Opening | None = None,
    ) -> None:
        shape, is_image = array.shape, array.ndim == 3
        ok = array.ndim in (3, 4) and shape[-1] == 3 and 0 not in shape
        rule = "be a non-empty array of shape (T, H, W, 3), or (H, W, 3) for an image"
        require_video(ok, rule, f"an array of shape {shape}")
        require_video(array.dtype == np.uint8, "be uint8", f"{array.dtype} pixels")
        num_frames = 1 if is_image else shape[0]
        if opening is not None:
            opening.check_pixels(shape[-3], shape[-2], "an array")
            opening.check_frames(num_frames, "an array")
            opening.check_bytes(array.nbytes, "an array")
        if is_image:
            rule = "None for an image"
            none = timestamps_seconds is None
            require("open_video", "timestamps_seconds", timestamps_seconds, none, rule)
            # An image has no rate and no duration; 1.0 keeps divisions by the rate defined.
            times, rate, duration = np.zeros(1), 1.0, 0.0
        else:
            times, rate, duration = _times(num_frames, source_fps, timestamps_seconds)
        self._frames = array[None] if is_image else array
        check = (lambda: None) if opening is None else opening.check_time
        self.metadata = VideoMetadata(
            video_id=content_id or array_id(array, check),
            num_frames=num_frames,
            source_fps=rate,
            duration_seconds=duration,
            height=shape[-3],
            width=shape[-2],
            decoder=decoder or ("image" if is_image else "array"),
            is_image=is_image,
            timestamps_seconds=times,
        )

    def read(
        self, frame_indices: Sequence[int], passing: Collection[int] = ()
    ) -> Iterator[tuple[int, np.ndarray]]:
        indices = distinct_indices(frame_indices, self.metadata.num_frames)
        return ((i, np.array(self._frames[i], order="C")) for i in indices)


def _times(
    num_frames: int, source_fps: float | None, timestamps: Sequence[float] | np.ndarray | None
) -> tuple[np.ndarray, float, float]:
    """((T,) seconds from the first frame, frames a second, seconds) of T frames."""
    fps = float(source_fps) if source_fps is not None else math.nan
    if timestamps is None:
        rule = "a number of frames a second in (0, 10000], as an array holds no rate"
        require("open_video", "source_fps", source_fps, 0.0 < fps <= 1e4, rule)
        return np.arange(num_frames, dtype=np.float64) / fps, fps, num_frames / fps
    try:
        times = np.asarray(timestamps, np.float64)
    except (TypeError, ValueError):
        times = np.zeros(())
    rule = f"{num_frames} finite seconds, strictly ascending, one a frame"
    ok = times.shape == (num_frames,) and bool(np.isfinite(times).all())
    got = timestamps if times.ndim == 0 else f"{times.size} numbers"
    require("open_video", "timestamps_seconds", got, ok, rule)
    steps = np.diff(times)
    if not (steps > 0.0).all():
        at = int(np.argmin(steps > 0.0))
        got = f"{times[at]} s before {times[at + 1]} s"
        require("open_video", "timestamps_seconds", got, False, rule)
    times = times - times[0]
    if source_fps is None:
        rule = "given with the time of one frame only"
        require("open_video", "source_fps", None, num_frames > 1, rule)
        duration = float(times[-1]) * num_frames / (num_frames - 1)
        return times, num_frames / duration, duration
    return times, fps, float(times[-1]) + 1.0 / fps
