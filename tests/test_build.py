"""setup.py: what it needs and what it refuses; test_wheel.py looks at what it installs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtts_rt

ROOT = Path(__file__).resolve().parents[1]


def setup_py(*arguments: str, build: str = "auto", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "VTTS_RT_BUILD": build, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_version_comes_from_the_package() -> None:
    assert setup_py("--version").stdout.split()[-1] == vtts_rt.__version__


def test_setup_imports_nothing_heavy() -> None:
    """pybind11, cmake and ninja are needed only when something is compiled."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    at_top = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
        if name
    }
    assert at_top - set(sys.stdlib_module_names) == {"setuptools"}
    anywhere = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in [alias.name for alias in node.names]
    }
    assert "torch" not in anywhere and "vtts_rt" not in anywhere


def test_an_unknown_build_is_refused_in_one_sentence() -> None:
    done = setup_py("--version", build="fast")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "VTTS_RT_BUILD must be one of auto, none, cpu, cuda, got 'fast'" in done.stderr


def test_cuda_without_its_compiler_is_refused_in_one_sentence() -> None:
    done = setup_py("--version", build="cuda", CUDA_HOME="/nowhere")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "VTTS_RT_BUILD=cuda: no nvcc: set CUDA_HOME or put it on PATH" in done.stderr


def test_only_cmake_knows_sources_and_flags() -> None:
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"-O[0-9]|-std=|-f[a-z]+-|/O2|-gencode|\.cpp|\.cu\b|core/|abi/", text)


def test_make_installs_what_an_isolated_build_would() -> None:
    requires = re.search(r"(?m)^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text())
    assert requires is not None
    assert f"$(PIP) {requires[1].replace(',', '')}\n" in (ROOT / "Makefile").read_text()


def test_the_outcome_of_this_build_is_recorded() -> None:
    info = pytest.importorskip("vtts_rt._build_info", reason="not built by setup.py").BUILD_INFO
    assert info["mode"] in ("auto", "none", "cpu", "cuda")
    if info["built"]:
        assert info["built"][0] == "vtts_rt._C" and info["reason"] is None
        assert info["compiler"] and not any("march" in flag for flag in info["flags"])
        assert ("libvtts" in info["built"]) == (not info["library"].startswith("no ("))
        assert info["cuda"].startswith(("no (", "for sm_"))
    else:
        assert info["reason"]


def test_the_tables_of_functions_name_every_function() -> None:
    headers = "".join(p.read_text() for p in (ROOT / "csrc/include/vtts").glob("*.h"))
    declared = set(re.findall(r"VTTS_API[^;(]*?\b(vtts_\w+)\(", headers))
    named = set(re.findall(r"`(vtts_\w+)`", (ROOT / "docs" / "c_api.md").read_text()))
    assert declared <= named, sorted(declared - named)
