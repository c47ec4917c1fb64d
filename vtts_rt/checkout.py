"""What commands use of the source checkout's bench/, which is not in the wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "bench"


def source_file(what: str, name: str) -> Path:
    """A file of bench/. RuntimeError with the remedy where this is an installed wheel."""
    path = FOLDER / name
    if not path.is_file():
        raise RuntimeError(
            f"vtts_rt: {what} are in bench/ of the source checkout, not in the wheel: clone the "
            "repository and install it with `pip install -e .`"
        )
    return path


def source_module(what: str, name: str) -> Any:
    """A module of bench/, imported; name: its file, of a package `__init__.py`."""
    path = source_file(what, name)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # last: its names hide no other module
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return importlib.import_module(".".join(part for part in parts if part != "__init__"))
