"""setup.py: what it needs and what it refuses; test_wheel.py looks at what it installs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vtts_rt

ROOT = Path(__file__).resolve().parents[1]


def setup_py(*arguments: str, build: str = "auto") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "VTTS_RT_BUILD": build},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_version_comes_from_the_package() -> None:
    assert setup_py("--version").stdout.split()[-1] == vtts_rt.__version__


def test_setup_imports_nothing_heavy() -> None:
    """An isolated build has setuptools and pybind11, and pybind11 only when it compiles."""
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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("fast", "VTTS_RT_BUILD must be one of auto, none, cpu, cuda, got 'fast'"),
        ("cuda", "this version has no CUDA sources to build"),
    ],
)
def test_a_build_that_cannot_be_is_refused_in_one_sentence(build: str, message: str) -> None:
    done = setup_py("--version", build=build)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_outcome_of_this_build_is_recorded() -> None:
    info = pytest.importorskip("vtts_rt._build_info", reason="not built by setup.py").BUILD_INFO
    assert info["mode"] in ("auto", "none", "cpu")
    if info["built"]:
        assert info["built"] == ["vtts_rt._C"] and info["reason"] is None
        assert info["compiler"] and not any("march" in flag for flag in info["flags"])
    else:
        assert info["reason"]
