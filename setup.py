"""Builds the package: Python always, native code where a C++17 compiler works.

csrc/CMakeLists.txt builds vtts_rt/_C, which Python imports, and vtts_rt/lib/libvtts.so, the C
interface, with its headers, CMake and pkg-config files. Objects stay in build/native.

VTTS_RT_BUILD = auto (default) | none | cpu | cuda. `auto` installs without native code when it
cannot be built, and compiles CUDA only on a machine with a GPU or where VTTS_RT_CUDA_ARCHS (such
as "80;90") asks for it; `cpu` and `cuda` fail instead. The outcome, and why something is missing,
is written to vtts_rt/_build_info.py, which `vtts-rt env` prints. torch is not needed here.
"""

from __future__ import annotations

import os
import platform
import pprint
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "build" / "native"
MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("VTTS_RT_BUILD", "auto")

if MODE not in MODES:
    sys.exit(f"VTTS_RT_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, or on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def why_no_cuda() -> str | None:
    """Why csrc/cuda is left out; None where it is to be compiled."""
    if MODE == "cpu":
        return "VTTS_RT_BUILD=cpu"
    asked = MODE == "cuda" or "VTTS_RT_CUDA_ARCHS" in os.environ
    if not asked and not Path("/dev/nvidia0").exists() and not shutil.which("nvidia-smi"):
        return "no GPU here; VTTS_RT_BUILD=cuda compiles for one elsewhere"
    if nvcc() is None:
        return "no nvcc: set CUDA_HOME or put it on PATH"
    return None


if MODE == "cuda" and (why := why_no_cuda()) is not None:
    sys.exit(f"VTTS_RT_BUILD=cuda: {why}; VTTS_RT_BUILD=cpu (or auto) builds without CUDA")


def program(name: str) -> str:
    """Path of cmake or ninja: that of this Python's environment, or on PATH."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise RuntimeError(f"no {name}: pip install {name}, or put it on PATH")
    return found


def run(*command: object) -> None:
    """Runs a command whose output is shown, and quoted where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout, flush=True)
    if done.returncode != 0:
        # What CMake says, without the place in its own files; else what a compiler says.
        cmakes = r"(?s)CMake Error(?: at \S+ \(\w+\))?:(.*?)(?:Call Stack|-- Configuring|\Z)"
        for pattern in (cmakes, r"(?i)(.*\berror\b.*)", r"(?s)(FAILED.*)", r"(?s)(.*)"):
            if found := re.search(pattern, done.stdout):
                break
        raise RuntimeError(f"cmake: {' '.join(found[1].split())[:500]}")


def remove_native(package: Path) -> None:
    """Deletes what an earlier build left, which would hide that this one has none."""
    Path(package, f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
    for name in ("include", "lib", "share"):
        shutil.rmtree(package / name, ignore_errors=True)


def write_build_info(package: Path, **outcome: object) -> None:
    info = {
        "mode": MODE,
        "built": [],
        "reason": None,
        "compiler": None,
        "flags": [],
        "machine": platform.machine(),
        "python": platform.python_version(),
        **outcome,
    }
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.py").write_text(
        '"""Written by setup.py: what was built, with what, and what was not and why."""\n\n'
        f"BUILD_INFO = {pprint.pformat(info, sort_dicts=False)}\n",
        encoding="utf-8",
    )


class BuildPython(build_py):
    """Records the outcome of a build that has no extension."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            package = (ROOT if self.editable_mode else Path(self.build_lib)) / "vtts_rt"
            remove_native(package)
            write_build_info(package, reason="VTTS_RT_BUILD=none asked for pure Python")


class BuildNative(build_ext):
    """Builds csrc by CMake, installs it into the package and records the outcome."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / "vtts_rt"
        no_cuda = why_no_cuda()
        try:
            try:
                self.build_native(cuda=no_cuda is None)
            except RuntimeError as error:
                if MODE != "auto" or no_cuda is not None:
                    raise
                no_cuda = str(error)
                self.warn(f"vtts_rt is built without CUDA: {no_cuda}")
                self.build_native(cuda=False)
            remove_native(package)
            run(program("cmake"), "--install", NATIVE, "--prefix", package, "--strip")
        except (RuntimeError, ImportError, OSError) as error:
            if MODE != "auto":
                raise
            self.warn(f"vtts_rt is installed without native code: {error}")
            remove_native(package)
            write_build_info(package, reason=f"{type(error).__name__}: {error}")
            return
        text = (NATIVE / "build_info.txt").read_text(encoding="utf-8")
        found = dict(line.split("=", 1) for line in text.splitlines())
        libraries = sorted(path.name for path in package.glob("lib/libvtts.so.*"))
        write_build_info(
            package,
            built=["vtts_rt._C", *(["libvtts"] if libraries else [])],
            compiler=found["compiler"],
            flags=found["flags"].split(),
            cuda=f"no ({no_cuda})" if no_cuda else f"for sm_{found['cuda'].replace(';', ', sm_')}",
            library=libraries[0] if libraries else f"no (not built on {sys.platform})",
        )

    def build_native(self, cuda: bool) -> None:
        """csrc in build/native, made anew where it was built by another compiler or Python."""
        import pybind11

        names = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS")
        settings = [ROOT, nvcc(), sysconfig.get_path("include"), *map(os.environ.get, names)]
        key = NATIVE / "settings.txt"
        if self.force or not key.exists() or key.read_text(encoding="utf-8") != str(settings):
            shutil.rmtree(NATIVE, ignore_errors=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "VTTS_PYTHON": "ON",
            "VTTS_TESTS": "OFF",
            "VTTS_CUDA": "ON" if cuda else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if cuda:
            options["CMAKE_CUDA_COMPILER"] = nvcc()
            options["VTTS_CUDA_ARCHS"] = os.environ.get("VTTS_RT_CUDA_ARCHS", "").replace(",", ";")
        if sys.platform == "darwin":
            archs = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", ""))
            if not archs and self.plat_name.endswith("universal2"):
                archs = ["arm64", "x86_64"]
            options["CMAKE_OSX_ARCHITECTURES"] = ";".join(archs)
        generator = []
        if os.name != "nt":  # there, Visual Studio's generator finds its compiler
            generator = ["-G", "Ninja"]
            options["CMAKE_MAKE_PROGRAM"] = program("ninja")
        defines = [f"-D{name}={value}" for name, value in options.items()]
        run(program("cmake"), "-S", ROOT / "csrc", "-B", NATIVE, *generator, *defines)
        key.write_text(str(settings), encoding="utf-8")
        jobs = self.parallel or os.cpu_count() or 1
        run(program("cmake"), "--build", NATIVE, "--config", "Release", "--parallel", jobs)


setup(
    packages=[*find_packages(include=["vtts_rt", "vtts_rt.*"]), "vtts_rt.kernels"],
    package_dir={"vtts_rt.kernels": "kernels"},
    package_data={
        "vtts_rt": [
            "py.typed",
            *(f"assets/**/*.{end}" for end in ("json", "safetensors", "mp4", "webm", "txt", "md")),
        ]
    },
    ext_modules=[]
    if MODE == "none"
    else [
        Extension(
            "vtts_rt._C",
            sources=[],
            depends=[
                str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()
            ],
        )
    ],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
