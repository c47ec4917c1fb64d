"""libvtts.so through ctypes: the structures of vtts.h, and calls with Python values."""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

OK, INVALID, UNSUPPORTED = 0, 1, 2


class Frame(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("row_stride_bytes", c.c_int64),
        ("height", c.c_int64),
        ("width", c.c_int64),
    ]


class PixelBox(c.Structure):
    _fields_ = [(name, c.c_int64) for name in ("x0", "y0", "x1", "y1")]


class Job(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("resize", c.c_int32),
        ("frame_a", Frame),
        ("frame_b", Frame),
        ("box", PixelBox),
        ("resized_height", c.c_int64),
        ("resized_width", c.c_int64),
    ]


class Options(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("isa", c.c_int32),
        ("num_threads", c.c_int32),
        ("mean", c.c_float * 3),
        ("std", c.c_float * 3),
        ("patch_px", c.c_int32),
    ]


class Weights(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("reserved", c.c_uint32),
        ("weight", c.c_void_p),
        ("bias", c.c_void_p),
        ("num_outputs", c.c_int64),
    ]


class CudaLaunch(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("dtype", c.c_int32),
        ("places", c.c_void_p),
        ("workspace", c.c_void_p),
        ("workspace_bytes", c.c_int64),
        ("cuda_stream", c.c_void_p),
    ]


DEFAULTS = {
    "patchify_job": Job,
    "patchify_options": Options,
    "patch_embed_weights": Weights,
    "patch_embed_folded": Weights,
    "cuda_launch": CudaLaunch,
}


@functools.lru_cache(maxsize=1)
def library() -> c.CDLL:
    """The installed libvtts.so; skips the test where the package was built without it."""
    import pytest

    import vtts_rt

    try:
        lib = c.CDLL(vtts_rt.get_library())
    except RuntimeError as error:
        pytest.skip(str(error))
    for name, struct in DEFAULTS.items():
        getattr(lib, f"vtts_{name}_default").restype = struct
    lib.vtts_last_error_message.restype = c.c_char_p
    lib.vtts_version.restype = lib.vtts_status_name.restype = c.c_char_p
    return lib


def default(name: str) -> Any:
    return getattr(library(), f"vtts_{name}_default")()


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def call(name: str, *arguments: Any) -> None:
    """One call; Refused with the library's sentence unless it returns VTTS_OK."""
    status = getattr(library(), f"vtts_{name}")(*arguments)
    if status != OK:
        raise Refused(status, library().vtts_last_error_message().decode())


def job(frames: Sequence[np.ndarray], box: Sequence[int], resized_hw: Sequence[int]) -> Job:
    """A job of two (H, W, 3) uint8 arrays, which the caller keeps."""
    views = [Frame(f.ctypes.data, f.strides[0], f.shape[0], f.shape[1]) for f in frames]
    return Job(c.sizeof(Job), 0, *views, PixelBox(*box), *resized_hw)


def jobs(items: Sequence[Job]) -> Any:
    return (Job * len(items))(*items)


def options(**changed: Any) -> Options:
    made: Options = default("patchify_options")
    for name, value in changed.items():
        if isinstance(value, tuple):
            getattr(made, name)[:] = value
        else:
            setattr(made, name, value)
    return made


def num_rows(items: Sequence[Job], settings: Options) -> int:
    found = c.c_int64()
    arguments = jobs(items), c.c_int64(len(items)), c.byref(settings)
    call("patchify_num_rows", *arguments, c.byref(found))
    return found.value


def row_size(settings: Options) -> int:
    found = c.c_int64()
    call("patchify_row_size", c.byref(settings), c.byref(found))
    return found.value


def patchify(items: Sequence[Job], **changed: Any) -> np.ndarray:
    settings = options(**changed)
    out = np.full((num_rows(items, settings), row_size(settings)), np.nan, dtype=np.float32)
    call(
        "patchify_cpu",
        jobs(items),
        c.c_int64(len(items)),
        c.byref(settings),
        c.c_void_p(out.ctypes.data),
    )
    return out
