"""Builds the package: Python always, native code where a C++17 compiler works.

The core is compiled once and linked twice: into vtts_rt/_C, which Python imports, and into
vtts_rt/lib/libvtts.so, the C interface, whose headers, CMake and pkg-config files are installed
beside it. Where nvcc is, csrc/cuda joins both.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("VTTS_RT_BUILD", "auto")
# No -march: instruction sets are chosen at run time, so that one wheel serves every machine.
# No contraction: a product and a sum fuse only where the source says so, or results would differ.
UNIX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]
# Ampere, Hopper, Blackwell; the last one also as PTX, for what comes after it.
CUDA_ARCHS = ["80", "90", "100"]
INCLUDES = ["csrc", "csrc/include"]

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
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        return "this version has no CUDA sources to build"
    return None


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for: those asked for, or ours that this nvcc knows."""
    if asked := os.environ.get("VTTS_RT_CUDA_ARCHS"):
        return asked.replace(",", ";").split(";")
    shown = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in shown.stdout.split()]
    if not known:
        raise RuntimeError(f"{nvcc()} knows none of sm_{', sm_'.join(CUDA_ARCHS)}")
    return known


if MODE == "cuda" and (why := why_no_cuda()) is not None:
    sys.exit(f"VTTS_RT_BUILD=cuda: {why}; VTTS_RT_BUILD=cpu (or auto) builds without CUDA")


def version() -> str:
    """`__version__` as written in the package, read without importing it."""
    text = (ROOT / "vtts_rt" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        sys.exit('setup.py: vtts_rt/__init__.py must hold a line __version__ = "..."')
    return found[1]


def sources(*patterns: str) -> list[str]:
    """Sources below csrc/, relative to the root."""
    found = [path for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def native_extension() -> Extension:
    return Extension(
        "vtts_rt._C",
        sources=["csrc/bindings.cpp", "csrc/bindings_cuda.cpp"],
        depends=["setup.py", *sources("**/*.h", "**/*.cpp", "**/*.cu*", "*.map", "**/*.in")],
        include_dirs=list(INCLUDES),
        language="c++",
        optional=MODE == "auto",
    )


def soname() -> str:
    header = (ROOT / "csrc" / "include" / "vtts" / "base.h").read_text(encoding="utf-8")
    return f"libvtts.so.{re.search(r'define VTTS_ABI_MAJOR ([0-9]+)', header)[1]}"


def write_build_info(folder: Path, **outcome: object) -> None:
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.py").write_text(
        '"""Written by setup.py: what was built, with what, and what was not and why."""\n\n'
        f"BUILD_INFO = {pprint.pformat(info, sort_dicts=False)}\n",
        encoding="utf-8",
    )


class BuildPython(build_py):
    """Records the outcome of a build that has no extension."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            write_build_info(folder / "vtts_rt", reason="VTTS_RT_BUILD=none asked for pure Python")


class BuildNative(build_ext):
    """Builds the extension and libvtts.so and records the outcome, a failure too."""

    def run(self) -> None:
        self.reason: str | None = None
        self.no_cuda = why_no_cuda()
        # setuptools forgets `inplace` while it builds.
        in_place = self.editable_mode or self.inplace
        self.target = (ROOT if in_place else Path(self.build_lib)) / "vtts_rt"
        self.no_library = None if sys.platform == "linux" else f"not built on {sys.platform}"
        super().run()
        built = [] if self.reason else [ext.name for ext in self.extensions]
        if not self.reason and not self.no_library:
            built.append("libvtts")
        write_build_info(
            self.target,
            built=built,
            reason=self.reason,
            compiler=self.compiler_name(),
            flags=self.extensions[0].extra_compile_args,
            cuda=f"no ({self.no_cuda})" if self.no_cuda else f"for sm_{', sm_'.join(self.archs)}",
            library=f"no ({self.no_library})" if self.no_library else soname(),
        )

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            unix = self.compiler.compiler_type != "msvc"
            ext.extra_compile_args = UNIX_FLAGS if unix else MSVC_FLAGS
            ext.extra_link_args = ["-pthread"] if unix else []
            cuda, cuda_link = self.cuda_objects()
            if sys.platform == "linux":
                # libdl is part of libc since glibc 2.34.
                ext.extra_link_args += ["-ldl", *cuda_link]
            if cuda:
                ext.define_macros.append(("VTTS_WITH_CUDA", "1"))
            core = [*self.objects(ext, sources("core/*.cpp", "cpu/*.cpp")), *cuda]
            if not self.no_library:
                self.link_library(ext, core)
            ext.include_dirs.append(pybind11.get_include())
            ext.extra_objects = core
            self.force = True  # with or without CUDA: no file's age tells
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            self.reason = f"{type(error).__name__}: {error}"
            self.warn(f"vtts_rt is installed without {ext.name}: {self.reason}")
            # What an earlier build left would hide that this one failed.
            for folder in {Path(self.build_lib), ROOT} if self.editable_mode else {self.build_lib}:
                Path(folder, *ext.name.split(".")[:-1], self.file_name(ext)).unlink(missing_ok=True)
                for name in ("include", "lib", "share"):
                    shutil.rmtree(Path(folder, "vtts_rt", name), ignore_errors=True)

    def objects(self, ext: Extension, files: list[str], macros: tuple = ()) -> list[str]:
        """Compiled sources, several at a time; those that are newer than all they need stay."""
        folder = str(Path(self.build_temp, "cpu" if self.no_cuda else "cuda"))
        headers = max(Path(ROOT, path).stat().st_mtime for path in sources("**/*.h"))

        def compiled(source: str) -> str:
            (target,) = self.compiler.object_filenames([source], output_dir=folder)
            newest = max(headers, Path(source).stat().st_mtime, Path("setup.py").stat().st_mtime)
            if self.force or not Path(target).exists() or Path(target).stat().st_mtime < newest:
                self.compiler.compile(
                    [source],
                    output_dir=folder,
                    macros=[*ext.define_macros, *macros],
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args,
                )
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compiled, files))

    def cuda_objects(self) -> tuple[list[str], list[str]]:
        """(objects of csrc/cuda, linker flags); `auto` goes on without them where that fails."""
        if self.no_cuda:
            return [], []
        try:
            shown = subprocess.run(
                [nvcc(), "--dryrun", "-c", "none.cu"], capture_output=True, text=True
            )
            top = Path(re.search(r"^#\$ TOP=(.*)$", shown.stderr, re.MULTILINE)[1].strip())
            runtimes = [
                path
                for folder in ("lib64", "lib", "targets/*/lib")
                for path in top.resolve().glob(f"{folder}/libcudart_static.a")
            ]
            if not runtimes:
                raise RuntimeError(f"no libcudart_static.a below {top}")
            self.archs = cuda_archs()
            folder = Path(self.build_temp, "cuda", "nvcc")
            folder.mkdir(parents=True, exist_ok=True)
            files = sources("cuda/*.cu", "cuda/*.cpp")
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda path: self.nvcc_compile(path, folder), files))
            # Other copies of the runtime in a process, torch's say, must not meet this one.
            return objects, [
                str(runtimes[0]),
                "-Wl,--exclude-libs,ALL",
                "-ldl",
                "-lrt",
                "-lpthread",
            ]
        except Exception as error:
            if MODE == "cuda":
                raise
            self.no_cuda = f"{type(error).__name__}: {error}"
            self.warn(f"vtts_rt is built without CUDA: {self.no_cuda}")
            return [], []

    def nvcc_compile(self, source: str, folder: Path) -> str:
        target = str(folder / (Path(source).name + ".o"))
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        archs.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        host = ",".join(["-fPIC", *(flag for flag in UNIX_FLAGS if not flag.startswith("-std"))])
        command = [nvcc(), "-std=c++17", "-O3", *archs, "-Xcompiler", host, "-DVTTS_WITH_CUDA=1"]
        command += [*(f"-I{path}" for path in INCLUDES), "-x", "cu", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise RuntimeError(f"nvcc failed on {source}: {done.stderr.strip()[-500:]}")
        return target

    def link_library(self, ext: Extension, core: list[str]) -> None:
        """libvtts.so, and beside it all that a C or C++ project needs to find and use it."""
        name = soname()
        objects = self.objects(ext, sources("abi/*.cpp"), (("VTTS_VERSION", f'"{version()}"'),))
        shutil.rmtree(self.target / "lib", ignore_errors=True)
        flags = [f"-Wl,-soname,{name}", "-Wl,--version-script=csrc/libvtts.map", "-Wl,-z,defs"]
        # A thread that still spins must not find its code unmapped.
        flags += ["-Wl,-z,nodelete", "-Wl,-s", *ext.extra_link_args]
        library = self.target / "lib" / name
        self.compiler.link_shared_object(
            [*objects, *core], str(library), extra_postargs=flags, target_lang="c++"
        )
        # Wheels hold no links: `-lvtts` finds the one name, programs the other.
        shutil.copy2(library, library.with_name("libvtts.so"))
        include = self.target / "include" / "vtts"
        shutil.rmtree(include, ignore_errors=True)
        shutil.copytree(ROOT / "csrc" / "include" / "vtts", include)
        for template, folder in (
            ("vttsConfig.cmake", "share/cmake/vtts"),
            ("vttsConfigVersion.cmake", "share/cmake/vtts"),
            ("vtts.pc", "share/pkgconfig"),
        ):
            text = (ROOT / "csrc" / "cmake" / f"{template}.in").read_text(encoding="utf-8")
            text = text.replace("@VERSION@", version()).replace("@SONAME@", name)
            (self.target / folder).mkdir(parents=True, exist_ok=True)
            (self.target / folder / template).write_text(text, encoding="utf-8")

    def file_name(self, ext: Extension) -> str:
        return Path(self.get_ext_filename(ext.name)).name

    def compiler_name(self) -> str | None:
        """First line of `compiler --version`, or how setuptools calls it."""
        command = getattr(self.compiler, "compiler_cxx", None) or []
        try:
            shown = subprocess.run(
                [*command[:1], "--version"], capture_output=True, text=True, check=True
            )
            return shown.stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError, TypeError):
            return getattr(self.compiler, "compiler_type", None)


setup(
    version=version(),
    packages=[*find_packages(include=["vtts_rt", "vtts_rt.*"]), "vtts_rt.kernels"],
    package_dir={"vtts_rt.kernels": "kernels"},
    package_data={
        "vtts_rt": [
            "py.typed",
            *(f"assets/**/*.{end}" for end in ("json", "safetensors", "mp4", "webm", "txt", "md")),
        ]
    },
    ext_modules=[] if MODE == "none" else [native_extension()],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
