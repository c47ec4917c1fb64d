"""Clips whose frames say which they are: eight blocks of black or white, one per bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_writer import write_video
from video.zoo import paint, read_code


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
