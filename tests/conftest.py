"""Shared guards. The repository root must not be importable: its `kernels/` folder would shadow
the PyPI package of that name, which transformers may import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))  # for `utils` and `torchvision_shim`


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
