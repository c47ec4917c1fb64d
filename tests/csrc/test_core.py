"""The core stands alone; `make test-csrc` and `make test-sanitizers` build and run its tests."""

from __future__ import annotations

from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_the_core_knows_neither_torch_nor_python() -> None:
    lines = [
        line
        for folder in ("core", "cpu")
        for path in (CSRC / folder).iterdir()
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    ]
    assert len(lines) > 20
    foreign = [line for line in lines if any(w in line for w in ("torch", "ATen", "Python", "py"))]
    assert not foreign
