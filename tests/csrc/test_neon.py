"""The C++ tests of the core on aarch64: cross-compiled, and run by an emulator.

Needs Debian's g++-aarch64-linux-gnu and qemu-user. On an aarch64 machine `make test-csrc` does it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SYSROOT = "/usr/aarch64-linux-gnu"  # where Debian's cross-compiler keeps libraries


@pytest.mark.slow
@pytest.mark.parametrize("test", ["patchify", "decode"])
def test_the_core_passes_its_tests_on_aarch64(test: str, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu) and qemu-aarch64 (qemu-user)")
    sources = [*CSRC.glob("core/*.cpp"), *CSRC.glob("cpu/*.cpp"), CSRC / f"tests/{test}_test.cpp"]
    program = tmp_path / f"{test}_test"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
    build = [compiler, *flags, f"-I{CSRC}", *map(str, sources), "-o", str(program), "-ldl"]
    subprocess.run(build, check=True, timeout=300)
    run = [emulator, "-L", SYSROOT, str(program)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all passed (best: neon)")
