"""The C++ tests of the core, built and run as plain programs: no Python, no torch, no CMake."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.slow
@pytest.mark.parametrize("test", ["patchify", "patch_embed", "decode"])
def test_the_core_builds_and_passes_without_python(test: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [*CSRC.glob("core/*.cpp"), *CSRC.glob("cpu/*.cpp"), CSRC / f"tests/{test}_test.cpp"]
    program = tmp_path / f"{test}_test"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
    build = [compiler, *flags, f"-I{CSRC}", *map(str, sources), "-o", str(program)]
    subprocess.run(build, check=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all passed")


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
