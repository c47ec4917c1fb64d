"""Importing is light, and our `kernels/` never stands in for another package of that name."""

from __future__ import annotations

import os
import shutil
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


LOGGING = """
import logging, vtts_rt
{configure}
logging.getLogger("vtts_rt.video").info("opened")
logging.getLogger("another").info("not ours")
"""


def run_all(code: str, cwd: Path, **env: str) -> str:
    """stderr of `code`, warnings included."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_the_log_variable_works_without_the_command_line(tmp_path: Path) -> None:
    code = LOGGING.format(configure="")
    assert run_all(code, tmp_path) == ""
    assert run_all(code, tmp_path, VTTS_RT_LOG="INFO") == "vtts_rt.video: opened\n"
    assert run_all(code, tmp_path, VTTS_RT_LOG="error") == ""
    said = run_all(code, tmp_path, VTTS_RT_LOG="loud")
    assert "VTTS_RT_LOG must be one of debug, info, warning, error, critical, got 'loud'" in said


def test_the_logging_of_an_application_is_left_alone(tmp_path: Path) -> None:
    configure = "logging.basicConfig(format='app %(message)s')"
    said = run_all(LOGGING.format(configure=configure), tmp_path, VTTS_RT_LOG="debug")
    assert said == "app opened\n"


def test_a_source_tree_before_the_installed_package_warns_once(tmp_path: Path) -> None:
    sources, site = tmp_path / "sources", tmp_path / "site"
    for folder in (sources, site):
        shutil.copytree(ROOT / "vtts_rt", folder / "vtts_rt", ignore=lambda *_: ["_build_info.py"])
    (site / "vtts_rt" / "_build_info.py").write_text("BUILD_INFO = {}\n")
    (site / "vtts_rt-9.dist-info").mkdir()
    (site / "vtts_rt-9.dist-info" / "METADATA").write_text("Name: vtts_rt\nVersion: 9\n")
    code = "import vtts_rt, vtts_rt.types"
    said = run_all(code, sources, PYTHONPATH=str(site))
    assert said.count("stands before the package installed in") == 1 and str(site) in said
    assert run_all(code, tmp_path, PYTHONPATH=str(site)) == ""
