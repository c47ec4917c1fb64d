"""Bad input at the C interface: a named error, and nothing is written."""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import vtts_abi
from vtts_abi import Job, Refused, Weights

FRAME = np.zeros((40, 50, 3), dtype=np.uint8)
BIG = 2**62


@pytest.fixture(autouse=True)
def _built() -> None:
    vtts_abi.library()


def refused(message: str, name: str, *arguments: Any) -> None:
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        vtts_abi.call(name, *arguments)
    assert caught.value.status == vtts_abi.INVALID


def job(box: Any = (0, 0, 50, 40), hw: Any = (28, 28), **change: Any) -> Job:
    made = vtts_abi.job((FRAME, FRAME), box, hw)
    for name, value in change.items():
        *path, field = name.split("__")
        target: Any = made
        for step in path:
            target = getattr(target, step)
        setattr(target, field, value)
    return made


JOBS: list[tuple[str, Callable[[], Job]]] = [
    ("box must be non-empty and inside", lambda: job((0, 0, 51, 40))),
    ("box must be non-empty and inside", lambda: job((-1, 0, 50, 40))),
    ("box must be non-empty and inside", lambda: job((9, 0, 9, 40))),
    ("box must be non-empty and inside", lambda: job((0, 0, 2**32 + 50, 40))),
    ("box must be non-empty and inside", lambda: job((-(2**63), 0, 2**63 - 1, 40))),
    ("multiples of 28 px, got (28, 29)", lambda: job(hw=(28, 29))),
    ("multiples of 28 px, got (0, 28)", lambda: job(hw=(0, 28))),
    ("multiples of 28 px, got (-28, 28)", lambda: job(hw=(-28, 28))),
    ("multiples of 28", lambda: job(hw=(28 * 2**40, 28))),
    ("jobs[0].resize must be a vtts_resize, got 3", lambda: job(resize=3)),
    ("jobs[0].resize must be a vtts_resize, got -1", lambda: job(resize=-1)),
    ("frame_b must be a frame, got a null pointer", lambda: job(frame_b__data=None)),
    ("frame_a must be 1 to 1048576 px", lambda: job(frame_a__height=0)),
    ("frame_a must be 1 to 1048576 px", lambda: job(frame_a__width=2**32 + 1)),
    ("row_stride_bytes must be at most 2^40", lambda: job(frame_a__row_stride_bytes=BIG)),
    ("row_stride_bytes must be at most 2^40", lambda: job(frame_b__row_stride_bytes=-BIG)),
    ("jobs.struct_size must be set by", lambda: job(struct_size=0)),
    ("jobs.struct_size must be set by", lambda: job(struct_size=c.sizeof(Job) - 8)),
    ("jobs.struct_size must be set by", lambda: job(struct_size=c.sizeof(Job) + 1)),
    ("jobs.struct_size must be set by", lambda: job(struct_size=2**32 - 8)),
]


@pytest.mark.parametrize(("message", "make"), JOBS, ids=[str(i) for i in range(len(JOBS))])
def test_jobs(message: str, make: Callable[[], Job]) -> None:
    out = np.full((4, 1176), 7.0, dtype=np.float32)
    one = c.c_int64(1)
    refused(message, "patchify_cpu", c.byref(make()), one, None, c.c_void_p(out.ctypes.data))
    assert np.all(out == 7.0)
    found = c.c_int64(7)
    refused(message, "patchify_num_rows", c.byref(make()), one, None, c.byref(found))
    refused(message, "patchify_cpu_dlpack", c.byref(make()), one, None, c.byref(c.c_void_p()))
    refused(message, "patchify_cuda_workspace_bytes", c.byref(make()), one, None, c.byref(found))
    assert found.value == 7


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("options.isa must be a vtts_isa, got 9", {"isa": 9}),
        ("options.num_threads must be in [1, 1024], got 0", {"num_threads": 0}),
        ("options.num_threads must be in [1, 1024]", {"num_threads": 2**31 - 1}),
        ("options.mean, options.std must be finite", {"mean": (0.0, float("nan"), 0.0)}),
        ("options.mean, options.std must be finite", {"std": (1.0, 1.0, 0.0)}),
        ("options.struct_size must be set by", {"struct_size": 4}),
        ("patch_px must be 14 or 16, got 28", {"patch_px": 28}),
        ("patch_px must be 14 or 16, got 0", {"patch_px": 0}),
        ("resized_hw must be positive multiples of 32 px, got (28, 28)", {"patch_px": 16}),
    ],
)
def test_options(message: str, change: dict[str, Any]) -> None:
    out = np.full((4, 1176), 7.0, dtype=np.float32)
    arguments = c.byref(job()), c.c_int64(1), c.byref(vtts_abi.options(**change))
    refused(message, "patchify_cpu", *arguments, c.c_void_p(out.ctypes.data))
    assert np.all(out == 7.0)


def test_pointers_and_counts() -> None:
    one, found = c.c_int64(1), c.c_int64()
    good = c.byref(job())
    out = np.zeros((5, 1176), dtype=np.float32)
    address = out.ctypes.data
    refused("out must be a pointer, got NULL", "patchify_cpu", good, one, None, None)
    refused("out must be aligned to 4", "patchify_cpu", good, one, None, c.c_void_p(address + 2))
    refused("jobs must be a pointer", "patchify_cpu", None, one, None, c.c_void_p(address))
    refused("num_jobs must be in", "patchify_num_rows", good, c.c_int64(-1), None, c.byref(found))
    refused(
        "num_jobs must be in", "patchify_num_rows", good, c.c_int64(2**62), None, c.byref(found)
    )
    refused("num_rows must be a pointer", "patchify_num_rows", good, one, None, None)
    crooked = c.c_void_p(c.addressof(job()) + 4)
    refused("jobs must be aligned to 8", "patchify_num_rows", crooked, one, None, c.byref(found))
    vtts_abi.call("patchify_cpu", None, c.c_int64(0), None, None)  # no jobs, nothing to do


def test_more_rows_than_an_array_may_have() -> None:
    huge = job(hw=(28 * 37449, 28 * 37449))  # 5.6e9 rows: more than 2^31 elements many times over
    found = c.c_int64()
    vtts_abi.call("patchify_num_rows", c.byref(huge), c.c_int64(1), None, c.byref(found))
    assert found.value == 37449**2 * 4
    many = vtts_abi.jobs([huge] * 250)
    refused("rows of all jobs must be at most 2^40", "patchify_num_rows", many, c.c_int64(250),
            None, c.byref(found))  # fmt: skip
    with pytest.raises(Refused) as caught:
        vtts_abi.call(
            "patchify_cpu_dlpack", vtts_abi.jobs([huge] * 100), c.c_int64(100), None,
            c.byref(c.c_void_p()),
        )  # fmt: skip
    assert caught.value.status == 4, "VTTS_ERROR_OUT_OF_MEMORY"


def test_newer_and_mixed_structures() -> None:
    class NewerJob(Job):
        _fields_ = [("unknown", c.c_int64)]

    newer = (NewerJob * 2)()
    for element in newer:
        c.memmove(c.byref(element), c.byref(job()), c.sizeof(Job))
        element.struct_size = c.sizeof(NewerJob)
    found = c.c_int64()
    vtts_abi.call("patchify_num_rows", newer, c.c_int64(2), None, c.byref(found))
    assert found.value == 8
    newer[1].unknown = 1
    message = "jobs[1] must be without fields that this version of libvtts does not know"
    refused(message, "patchify_num_rows", newer, c.c_int64(2), None, c.byref(found))
    newer[1].struct_size = c.sizeof(Job)
    refused(
        "that of the first element", "patchify_num_rows", newer, c.c_int64(2), None, c.byref(found)
    )


def test_patch_embed_weights() -> None:
    values = np.zeros((8, 1176), dtype=np.float32)
    address = values.ctypes.data

    def weights(**change: Any) -> Any:
        fields = {"struct_size": c.sizeof(Weights), "weight": address, "num_outputs": 8, **change}
        return c.byref(Weights(**fields))

    good = c.byref(job()), c.c_int64(1), None
    out = c.c_void_p(address)
    for message, change in (
        ("weights.weight must be a pointer", {"weight": None}),
        ("weights.weight must be aligned", {"weight": address + 1}),
        ("weights.bias must be aligned", {"bias": address + 2}),
        ("weights.num_outputs must be in", {"num_outputs": 0}),
        ("weights.num_outputs must be in", {"num_outputs": 2**40}),
    ):
        refused(message, "patch_embed_cpu", *good, weights(**change), out)
        refused(message, "patch_embed_fold", weights(**change), None, 0, out, out)
    refused("dtype must be a vtts_dtype", "patch_embed_fold", weights(), None, 3, out, out)
    refused("folded must be a pointer", "patch_embed_fold", weights(), None, 0, None, out)
