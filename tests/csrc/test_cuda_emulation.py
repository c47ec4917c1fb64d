"""The CUDA kernels without a GPU: built by the host compiler and run by an emulation of what they
use of CUDA (csrc/tests/cuda_emulation.h), under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CORE = ("patchify", "filter", "parallel", "low_precision", "huge_pages")
CORE_SOURCES = [
    *(CSRC / f"core/{name}.cpp" for name in CORE),
    *sorted(CSRC.glob("cpu/patchify_*.cpp")),
    CSRC / "cpu/cpu_features.cpp",
]
SANITIZERS = "-fsanitize=address,undefined"


def compiles_with_sanitizers(compiler: str, folder: Path) -> bool:
    """Whether the libraries of the sanitizers are there; they are packages of their own."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    build = [compiler, SANITIZERS, str(source), "-o", str(folder / "empty")]
    return subprocess.run(build, capture_output=True, timeout=60).returncode == 0


@pytest.mark.slow
def test_the_kernels_give_the_cores_bits_and_stay_inside_their_memory(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not compiles_with_sanitizers(compiler, tmp_path):
        pytest.skip("the compiler has no sanitizers")
    cuda = sorted(CSRC.glob("cuda/*.cpp")), sorted(CSRC.glob("cuda/*.cu"))
    assert all(cuda)
    sources = [*CORE_SOURCES, *cuda[0], CSRC / "tests/cuda_test.cpp"]
    program = tmp_path / "cuda_test"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-ffp-contract=off", "-pthread", SANITIZERS, "-fno-sanitize-recover=all"]
    build = [compiler, *flags, f"-I{CSRC}", *map(str, sources), "-x", "c++", *map(str, cuda[1])]
    subprocess.run([*build, "-o", str(program)], check=True, timeout=400)
    # The kernels' frames live on stacks of the emulation; the host's leaks are of no interest.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [str(program)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all passed")
