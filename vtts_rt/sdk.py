"""Where the C interface lies in this installation: headers, library, CMake and pkg-config files.

`python -m vtts_rt --cmakedir` and its like print the same. docs/c_api.md shows how to use them.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def get_include_dir() -> str:
    """Folder of `vtts/vtts.h`."""
    return _folder("include", "vtts/vtts.h")


def get_lib_dir() -> str:
    """Folder of `libvtts.so`."""
    return _folder("lib", "libvtts.so")


def get_library() -> str:
    """Path of `libvtts.so`, for ctypes or dlopen."""
    return str(Path(get_lib_dir()) / "libvtts.so")


def get_cmake_dir() -> str:
    """Folder of `vttsConfig.cmake`: a value for `vtts_DIR` or CMAKE_PREFIX_PATH."""
    return _folder("share/cmake/vtts", "vttsConfig.cmake")


def get_pkgconfig_dir() -> str:
    """Folder of `vtts.pc`: a value for PKG_CONFIG_PATH."""
    return _folder("share/pkgconfig", "vtts.pc")


def _folder(name: str, file: str) -> str:
    folder = _PACKAGE / name
    if not (folder / file).is_file():
        raise RuntimeError(
            f"vtts_rt was installed without {file}: `vtts-rt env` says why; "
            "VTTS_RT_BUILD=cpu pip install ... fails instead"
        )
    return str(folder)
