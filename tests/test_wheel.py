"""What is installed: the wheel with native code, the pure one, and the one without a compiler;
and that C and C++ projects find the wheel's libvtts and get Python's numbers from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vtts_rt
from vtts_rt.ops.patchify import PatchifyJob, patchify_ref
from vtts_rt.types import PixelBox

pytest.importorskip("pybind11")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "vtts_rt")
BUILT = ("*.so", "*.so.*", "*.o", "_build_info.py", "__pycache__", "*.egg-info")
INSTALLED = ("include", "lib", "share")  # what a build in place leaves in vtts_rt/
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


class Wheel:
    """A wheel built from a copy of the sources, unpacked into a folder of its own."""

    def __init__(self, folder: Path, **env: str) -> None:
        source = folder / "source"
        source.mkdir()
        for name in SOURCES:
            path = ROOT / name
            if path.is_dir():
                ignored = (*BUILT, *INSTALLED) if name == "vtts_rt" else BUILT
                shutil.copytree(path, source / name, ignore=shutil.ignore_patterns(*ignored))
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


def test_a_second_build_compiles_only_what_changed(native: Wheel) -> None:
    source = native.folder / "source"
    objects = source / "build" / "native" / "CMakeFiles"
    before = {path: path.stat().st_mtime_ns for path in objects.rglob("*.o")}
    with (source / "csrc" / "core" / "filter.cpp").open("a") as file:
        file.write("// changed\n")
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "VTTS_RT_BUILD": "auto"}
    subprocess.run(build, cwd=source, env=env, check=True, capture_output=True)
    assert len(before) > 20
    changed = [path.name for path in before if path.stat().st_mtime_ns != before[path]]
    assert changed == ["filter.cpp.o"]


def test_the_pure_wheel_needs_no_compiler_and_says_so(pure: Wheel) -> None:
    report = pure.environment()
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in pure.files if name.endswith((".so", ".pyd", ".h", ".cmake"))]
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


# -- the C interface --------------------------------------------------------------------------


def command(*arguments: str | Path, stdin: str = "", **env: str) -> str:
    """stdout of a command that must succeed; skips where its program is missing."""
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    program = shutil.which(arguments[0], path=folders)
    if program is None:
        pytest.skip(f"no {arguments[0]}")
    done = subprocess.run(
        [program, *(str(a) for a in arguments[1:])],
        input=stdin,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_says_where_the_c_interface_is(native: Wheel) -> None:
    home = str(native.site / "vtts_rt")
    show = "import sys; from vtts_rt.__main__ import main; sys.exit(main({!r}))"
    flags = ["--version", "--includes", "--cmakedir", "--pkgconfigdir", "--libs"]
    version, includes, cmake, pkgconfig, libs = native.run(show.format(flags)).split("\n")
    assert version == vtts_rt.__version__ and includes == f"-I{home}/include"
    assert (Path(cmake) / "vttsConfig.cmake").is_file() and cmake.startswith(home)
    assert (Path(pkgconfig) / "vtts.pc").is_file() and pkgconfig.startswith(home)
    assert libs == f"-L{home}/lib -lvtts -Wl,-rpath,{home}/lib"
    for folder in (native.site / "vtts_rt").rglob("share/**/*"):
        assert folder.is_dir() or str(native.folder) not in folder.read_text(), "relocatable"


def test_a_pure_wheel_has_no_c_interface_and_says_so(pure: Wheel) -> None:
    code = "from vtts_rt.__main__ import main; print(main(['--cmakedir']))"
    assert pure.run(code) == "1"


def python_example() -> dict[str, Any]:
    """What csrc/examples/patch_rows.c prints, by the Python implementation."""
    i = np.arange(360 * 640 * 3, dtype=np.uint64)
    frames = [
        ((i * i // 7 + i * 31 + frame * 13) % 256).astype(np.uint8).reshape(360, 640, 3)
        for frame in (720, 723)
    ]
    rows = patchify_ref([PatchifyJob(*frames, PixelBox(160, 36, 384, 288), (252, 224))])
    fingerprint = 0xCBF29CE484222325
    for byte in rows.numpy().tobytes():
        fingerprint = (fingerprint ^ byte) * 0x100000001B3 & (2**64 - 1)
    return {"rows": len(rows), "fingerprint": f"{fingerprint:016x}"}


def test_programs_find_the_wheel_and_print_what_python_says(native: Wheel, tmp_path: Path) -> None:
    """By CMake's find_package and by pkg-config."""
    command(
        "cmake", "-S", ROOT / "csrc" / "examples", "-B", tmp_path,
        f"-DCMAKE_PREFIX_PATH={native.site / 'vtts_rt'}",
    )  # fmt: skip
    command("cmake", "--build", tmp_path)
    assert json.loads(command(tmp_path / "patch_rows")) == python_example()

    folder = str(native.site / "vtts_rt" / "share" / "pkgconfig")
    flags = command("pkg-config", "--cflags", "--libs", "vtts", PKG_CONFIG_PATH=folder).split()
    assert str(native.site) in flags[0]
    program, source = tmp_path / "by_pkg_config", ROOT / "csrc" / "examples" / "patch_rows.c"
    command("cc", "-std=c99", source, *flags, "-o", program)
    assert json.loads(command(program)) == python_example()


def test_another_version_is_not_found(native: Wheel, tmp_path: Path) -> None:
    config = native.site / "vtts_rt" / "share" / "cmake" / "vtts"
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(x NONE)\n"
        'find_package(vtts ${WANTED} CONFIG QUIET)\nmessage(STATUS "found=${vtts_FOUND}")\n'
    )
    major, minor, _ = vtts_rt.__version__.split(".")
    for wanted, found in ((f"{major}.{minor}", "1"), (f"{major}.{int(minor) + 1}", "0")):
        out = command(
            "cmake", "-S", tmp_path, "-B", tmp_path / wanted, f"-Dvtts_DIR={config}",
            f"-DWANTED={wanted}",
        )  # fmt: skip
        assert f"found={found}" in out
