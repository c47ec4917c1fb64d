"""The C++ tests of the core on aarch64: cross-compiled, and run by an emulator.

Needs Debian's g++-aarch64-linux-gnu and qemu-user. On an aarch64 machine `make test-csrc` does it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SYSROOT = "/usr/aarch64-linux-gnu"  # where Debian's cross-compiler keeps libraries

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the C++ tests, built for aarch64."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu)")
    folder = tmp_path_factory.mktemp("aarch64")
    cmake = [sys.executable, "-m", "cmake"]
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_SYSTEM_NAME=Linux"]
    options += ["-DCMAKE_CXX_FLAGS=-O1 -Werror", "-DCMAKE_BUILD_TYPE=None"]
    subprocess.run([*cmake, "-S", CSRC, "-B", folder, *options], check=True)
    build = [*cmake, "--build", folder, "--parallel", "2", "--target"]
    subprocess.run([*build, "patchify_test", "decode_test"], check=True, timeout=300)
    return folder / "tests"


@pytest.mark.parametrize("test", ["patchify", "decode"])
def test_the_core_passes_its_tests_on_aarch64(test: str, tests: Path) -> None:
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64 (qemu-user)")
    run = [emulator, "-L", SYSROOT, str(tests / f"{test}_test")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all passed (best: neon)")
