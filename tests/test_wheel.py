"""What is installed: the wheel with the extension, the pure one, and the one without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "vtts_rt")
BUILT = shutil.ignore_patterns("*.so", "*.o", "_build_info.py", "__pycache__", "*.egg-info")
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


class Wheel:
    """A wheel built from a copy of the sources, unpacked into a folder of its own."""

    def __init__(self, folder: Path, **env: str) -> None:
        source = folder / "source"
        source.mkdir()
        for name in SOURCES:
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, source / name, ignore=BUILT)
            else:
                shutil.copy(path, source / name)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        self.build = subprocess.run(
            [*command, "--wheel-dir", str(folder), str(source)],
            cwd=folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        self.folder, self.site = folder, folder / "site"
        for path in folder.glob("*.whl"):
            self.name = path.name
            with zipfile.ZipFile(path) as archive:
                archive.extractall(self.site)

    @property
    def files(self) -> set[str]:
        return {p.relative_to(self.site).as_posix() for p in self.site.rglob("*") if p.is_file()}

    def run(self, code: str) -> str:
        """stdout of `code` where this wheel comes first on sys.path."""
        assert self.build.returncode == 0, self.build.stdout[-2000:] + self.build.stderr[-2000:]
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.site)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    def environment(self) -> dict[str, dict[str, str]]:
        """`vtts-rt env --json` of this wheel."""
        out = self.run("from vtts_rt.cli import main; main(['env', '--json'])")
        report: dict[str, dict[str, str]] = json.loads(out)
        return report


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return Wheel(tmp_path_factory.mktemp("native"), VTTS_RT_BUILD="auto")


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return Wheel(tmp_path_factory.mktemp("pure"), VTTS_RT_BUILD="none", **NO_COMPILER)


def test_the_wheel_runs_from_where_it_is(native: Wheel) -> None:
    out = native.run("import vtts_rt, vtts_rt._C; print(vtts_rt.__file__, vtts_rt._C.__file__)")
    assert all(path.startswith(str(native.site)) for path in out.split())
    assert "none-any" not in native.name


def test_kernels_is_never_a_top_level_package(native: Wheel, pure: Wheel) -> None:
    code = (
        "import importlib.util as u, vtts_rt.kernels as k\n"
        "spec = u.find_spec('kernels')\n"
        "print(k.__file__, spec is None or spec.origin != k.__file__)"
    )
    for wheel in (native, pure):
        path, apart = wheel.run(code).split()
        assert path.startswith(str(wheel.site)) and apart == "True"
        assert {name.split("/")[0] for name in wheel.files if "dist-info" not in name} == {
            "vtts_rt"
        }


def test_every_source_and_asset_is_in_the_wheel(native: Wheel) -> None:
    expected = {"vtts_rt/py.typed"}
    for folder, installed in (("vtts_rt", "vtts_rt"), ("kernels", "vtts_rt/kernels")):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.suffix == ".py" or (inside.parts[0] == "assets" and path.is_file()):
                expected.add(f"{installed}/{inside.as_posix()}")
    assert expected <= native.files, sorted(expected - native.files)


def test_the_pure_wheel_needs_no_compiler_and_says_so(pure: Wheel) -> None:
    report = pure.environment()
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in pure.files if name.endswith((".so", ".pyd"))]
    assert report["build"]["built"] == "[]"
    assert "VTTS_RT_BUILD=none" in report["build"]["reason"]


def test_without_a_compiler_auto_installs_and_says_why(tmp_path: Path) -> None:
    report = Wheel(tmp_path, VTTS_RT_BUILD="auto", **NO_COMPILER).environment()
    assert report["build"]["built"] == "[]"
    assert "no-such-compiler" in report["build"]["reason"]


def test_without_a_compiler_cpu_fails(tmp_path: Path) -> None:
    wheel = Wheel(tmp_path, VTTS_RT_BUILD="cpu", **NO_COMPILER)
    assert wheel.build.returncode != 0
    assert not wheel.files
