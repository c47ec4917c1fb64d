"""Builds the package: Python always, the native CPU extension where a C++17 compiler works.

VTTS_RT_BUILD = auto (default) | none | cpu | cuda. `auto` installs without the extension when it
cannot be built and records why; `cpu` and `cuda` fail instead. The outcome is written to
vtts_rt/_build_info.py, which `vtts-rt env` prints. torch is not needed here.
"""

from __future__ import annotations

import os
import platform
import pprint
import re
import subprocess
import sys
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

if MODE not in MODES:
    sys.exit(f"VTTS_RT_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
if MODE == "cuda":
    sys.exit(
        "VTTS_RT_BUILD=cuda: this version has no CUDA sources to build; "
        "use VTTS_RT_BUILD=cpu (or auto), GPU kernels come from the triton extra"
    )


def version() -> str:
    """`__version__` as written in the package, read without importing it."""
    text = (ROOT / "vtts_rt" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        sys.exit('setup.py: vtts_rt/__init__.py must hold a line __version__ = "..."')
    return found[1]


def native_extension() -> Extension:
    sources = sorted([*ROOT.glob("csrc/core/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    headers = sorted(ROOT.glob("csrc/**/*.h"))
    return Extension(
        "vtts_rt._C",
        sources=[str(p.relative_to(ROOT)) for p in [*sources, ROOT / "csrc" / "bindings.cpp"]],
        depends=[str(p.relative_to(ROOT)) for p in headers],
        include_dirs=["csrc"],
        language="c++",
        optional=MODE == "auto",
    )


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
    """Builds the extension and records the outcome, a failure too."""

    def run(self) -> None:
        self.reason: str | None = None
        super().run()
        built = [] if self.reason else [ext.name for ext in self.extensions]
        write_build_info(
            (ROOT if self.editable_mode or self.inplace else Path(self.build_lib)) / "vtts_rt",
            built=built,
            reason=self.reason,
            compiler=self.compiler_name(),
            flags=self.extensions[0].extra_compile_args,
        )

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            unix = self.compiler.compiler_type != "msvc"
            ext.extra_compile_args = UNIX_FLAGS if unix else MSVC_FLAGS
            ext.extra_link_args = ["-pthread"] if unix else []
            if sys.platform == "linux":
                ext.extra_link_args.append("-ldl")  # part of libc since glibc 2.34
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            self.reason = f"{type(error).__name__}: {error}"
            self.warn(f"vtts_rt is installed without {ext.name}: {self.reason}")
            # An extension left by an earlier build would hide that this one failed.
            for folder in {Path(self.build_lib), ROOT} if self.editable_mode else {self.build_lib}:
                Path(folder, *ext.name.split(".")[:-1], self.file_name(ext)).unlink(missing_ok=True)

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
