"""Importing is light, and our `kernels/` never stands in for another package of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "av", "numpy", "rich")


def run(code: str, cwd: Path, path: Path | None = None) -> str:
    """stdout of `code` in a fresh interpreter started in `cwd`, `path` first on sys.path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def heavy_after(code: str, cwd: Path) -> set[str]:
    out = run(f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))", cwd)
    return set(out.split())


def test_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_after("import vtts_rt; vtts_rt.__version__; dir(vtts_rt)", tmp_path) == set()


@pytest.mark.parametrize("name", ["PerceptionConfig", "SamplingParams", "Clue"])
def test_leaf_names_do_not_load_the_runtime(name: str, tmp_path: Path) -> None:
    loaded = heavy_after(f"from vtts_rt import {name}", tmp_path)
    assert not loaded & {"torch", "transformers", "av"}


def test_public_names_resolve() -> None:
    import vtts_rt

    for name in vtts_rt.__all__:
        assert getattr(vtts_rt, name) is not None
    assert dir(vtts_rt) == sorted(vtts_rt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vtts_rt.nothing  # noqa: B018


def test_transformers_imports_from_the_repository_root() -> None:
    """With the root on sys.path our folder shadows the PyPI package `kernels`; it must stay
    empty of names, so that transformers sees nothing to use."""
    out = run("import transformers; print(transformers.__name__)", ROOT, path=ROOT)
    assert out == "transformers"
    assert not (ROOT / "kernels" / "__init__.py").read_text().strip()


def test_kernels_is_ours_only_under_our_name(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, vtts_rt.kernels as k\n"
        "spec = u.find_spec('kernels')\n"
        "print(spec is None or spec.origin != k.__file__)"
    )
    assert run(code, tmp_path) == "True"
