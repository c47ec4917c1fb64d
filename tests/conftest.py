"""Shared guards. The repository root must not be importable: its `kernels/` folder would shadow
the PyPI package of that name, which transformers may import."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from vtts_rt import Runtime

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path += [str(ROOT / "tests"), str(ROOT / "bench")]  # for `utils` and what benches measure


@pytest.fixture(scope="session", autouse=True)
def _own_index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that the user's cache knows, and nothing left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTTS_RT_CACHE_DIR", str(tmp_path_factory.mktemp("index_cache")))
        yield


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    """What one test leaves behind in the process is nothing to the next."""
    torch.manual_seed(0)
    logging.getLogger("vtts_rt").setLevel(logging.NOTSET)  # the command line sets it


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two clips of ten seconds."""
    from vtts_rt.video.writer import write_video

    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{name}.mp4" for name in "ab"]
    for seed, path in enumerate(paths):
        still = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        write_video(path, (np.roll(still, 2 * i, 1) for i in range(80)), source_fps=8.0)
    return paths


@pytest.fixture(scope="module")
def clip(clips: list[Path]) -> Path:
    return clips[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from utils import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture()
def exact_runtime(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """In float32, or the dtype that a test is parametrised with."""
    from vtts_rt import EngineConfig, Runtime
    from vtts_rt.ops import native

    if native.supports("cpu") is not None:
        pytest.skip("torch sums a row as its batch has it")
    engine, dtype = EngineConfig(kv_bytes=1 << 26), getattr(request, "param", "float32")
    with Runtime.from_pretrained(checkpoint, dtype=dtype, engine=engine) as runtime:
        yield runtime
