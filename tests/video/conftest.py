"""Clips whose frames say which they are: eight blocks of black or white, one per bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtts_rt.video.writer import write_video

H, W = 48, 64


def paint(index: int) -> np.ndarray:
    """(48, 64, 3): bit b of index is the block at row b // 4, column b % 4."""
    bits = np.array([(index >> b) & 1 for b in range(8)], np.uint8).reshape(2, 4)
    grey = 40 + 170 * np.kron(bits, np.ones((H // 2, W // 4), np.uint8))
    return np.repeat(grey[..., None], 3, axis=2)


def read_code(frame: np.ndarray) -> int:
    """The index painted into a frame of any size, from the middle of each block."""
    h, w = frame.shape[:2]
    grey = frame.astype(np.float32).mean(axis=2)
    blocks = [
        grey[int((r + 0.3) * h / 2) : int((r + 0.7) * h / 2) + 1][
            :, int((c + 0.3) * w / 4) : int((c + 0.7) * w / 4) + 1
        ].mean()
        for r in range(2)
        for c in range(4)
    ]
    return sum(int(value > 125) << b for b, value in enumerate(blocks))


@pytest.fixture(scope="session")
def painted() -> Callable[[int], np.ndarray]:
    return paint


@pytest.fixture(scope="session")
def code_of() -> Callable[[np.ndarray], int]:
    return read_code


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_clip("name.mp4", num_frames, **write_video options) -> path, painted 0, 1, 2, ..."""
    folder = tmp_path_factory.mktemp("clips")
    made: dict[str, Path] = {}

    def make(name: str, num_frames: int = 40, **options: Any) -> Path:
        key = f"{name} {num_frames} {sorted(options.items())}"
        if key not in made:
            path = folder / f"{len(made)}_{name}"
            write_video(path, map(paint, range(num_frames)), **{"source_fps": 10.0, **options})
            made[key] = path
        return made[key]

    return make
