"""Every GPU kernel compiles without a GPU, for three architectures, and does not spill."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "kernel_resources", ROOT / "bench" / "kernel_resources.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(tool: str = "") -> set[tuple[str, str, str]]:
    """Kernel, function and variant of the committed rows, of one tool or of all."""
    [path] = sorted((ROOT / "bench" / "results").glob("kernels_*.json"))[-1:]
    rows = json.loads(path.read_text())["results"]
    return {
        (row["kernel"], row["function"], row["variant"])
        for row in rows
        if row["tool"].startswith(tool)
    }


def jitted() -> set[str]:
    """Files of kernels/ that hold a Triton kernel."""
    folder = ROOT / "kernels"
    return {path.stem for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}


def test_a_variant_of_every_kernel_compiles(tool: ModuleType) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    rows = tool.triton_rows(tool.triton_kernels(), first=True)
    assert not tool.problems(rows), "\n".join(tool.problems(rows))
    for arch in tool.ARCHES:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == jitted()


def test_cuda_sources_compile_for_hopper(tool: ModuleType) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    rows = tool.nvcc_all(jobs=2, arches=(90,))
    assert not tool.problems(rows), "\n".join(tool.problems(rows))
    assert {row["kernel"] for row in rows} == {path.stem for path in tool.cuda_sources()}


def tritons() -> list[Path | None]:
    """The installed one, and the one that VTTS_RT_OTHER_TRITON names (make test-long: 3.6)."""
    other = os.environ.get("VTTS_RT_OTHER_TRITON")
    return [None, Path(other)] if other else [None]


@pytest.mark.slow
@pytest.mark.parametrize("folder", tritons(), ids=str)
def test_triton_kernels_compile_without_spills(tool: ModuleType, folder: Path | None) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    rows = tool.triton_all(folder, jobs=2)
    assert not tool.problems(rows), "\n".join(tool.problems(rows))
    kernels = jitted()
    assert {row["kernel"] for row in rows} == kernels, (
        "a file of kernels/ has no variants in bench/kernel_variants.py"
    )
    for arch in tool.ARCHES:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == kernels
    # A kernel that loads its main operand one number at a time lost its alignment on the way.
    for kernel in kernels:
        assert any(row["vector_loads"] for row in rows if row["kernel"] == kernel), kernel
    found = {(row["kernel"], row["function"], row["variant"]) for row in rows}
    missing, gone = found - recorded(), recorded() - recorded("nvcc") - found
    assert not missing, f"run bench/kernel_resources.py: no row for {sorted(missing)}"
    assert not gone, f"run bench/kernel_resources.py: no such variants: {sorted(gone)}"


@pytest.mark.slow
def test_cuda_sources_compile_without_spills(tool: ModuleType) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    rows = tool.nvcc_all(jobs=2)
    assert not tool.problems(rows), "\n".join(tool.problems(rows))
    assert {row["arch"] for row in rows} == set(tool.ARCHES)
    assert {row["kernel"] for row in rows} == {path.stem for path in tool.cuda_sources()}
    missing = {(r["kernel"], r["function"], r["variant"]) for r in rows} - recorded()
    assert not missing, f"run bench/kernel_resources.py: no row for {sorted(missing)}"


def test_a_spill_must_be_explained(tool: ModuleType) -> None:
    row = {"kernel": "k", "function": "f", "variant": "v", "arch": 90, "tool": "t"}
    said = tool.problems([{**row, "spill_bytes": 8, "explained": ""}])
    assert said == ["k: f [v] sm_90 spills 8 bytes with t"]
    assert not tool.problems([{**row, "spill_bytes": 8, "explained": "why"}])
    assert "does not compile" in tool.problems([{**row, "error": "no"}])[0]


def test_what_ptxas_says_is_read(tool: ModuleType) -> None:
    text = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'
ptxas info    : Function properties for _Z3addPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z3subPf' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    first, second = tool.parse_ptxas(text, {"arch": 90})
    assert (first["registers"], first["spill_bytes"], first["shared_bytes"]) == (40, 8, 1024)
    assert (second["registers"], second["spill_bytes"], second["shared_bytes"]) == (12, 0, 0)
    assert first["arch"] == 90 and "add" in first["function"]
