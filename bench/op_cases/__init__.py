"""Cases of every op of vtts_rt.ops: what tests check, and what benches check and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import vtts_rt.ops  # noqa: F401  (registers the ops)
from op_cases import (
    cascade_attention,
    gelu,
    linear,
    linear_fp8,
    paged_attention,
    patch_embed,
    patchify,
    rmsnorm,
    rotary,
    rotary_kv,
    sampling,
    segment_attention,
    swiglu,
)
from op_cases.case import Build, Case, Error, Scale, benched_in, error_of
from vtts_rt.ops.dispatch import backends
from vtts_rt.types import require

# Every op of vtts_rt.ops; the file of an op's cases has its name.
CASES: dict[str, Callable[[str, Scale], Iterator[Build]]] = {
    "cascade_attention": cascade_attention.cases,
    "gelu": gelu.cases,
    "linear": linear.cases,
    "linear_fp8": linear_fp8.cases,
    "paged_attention": paged_attention.cases,
    "patch_embed": patch_embed.cases,
    "patchify": patchify.cases,
    "rmsnorm": rmsnorm.cases,
    "rotary": rotary.cases,
    "rotary_kv": rotary_kv.cases,
    "sampling": sampling.cases,
    "segment_attention": segment_attention.cases,
    "swiglu": swiglu.cases,
}


def op_names(text: str) -> list[str]:
    """The ops of a comma-separated list. ValueError names one that there is not."""
    names = text.split(",")
    for name in names:
        require("bench", "op", name, name in CASES, f"one of {', '.join(CASES)}")
    return names


def cases(op: str, device: str, scale: Scale, dtype: torch.dtype | None = None) -> Iterator[Case]:
    """The cases of an op, of one storage type where `dtype` names it; device: "cpu" or "cuda"."""
    with benched_in(dtype):
        for build in CASES[op](device, scale):
            case = build()
            if dtype in (None, case.dtype):
                yield case


def check(
    op: str, device: str, scale: Scale = "check", dtype: torch.dtype | None = None
) -> Iterator[tuple[Case, str, Error]]:
    """Every case with every backend that runs here, torch's own excepted."""
    for case in cases(op, device, scale, dtype):
        for backend in backends(op, device):
            if case.takes(backend) and backend not in ("torch", "reference"):
                yield case, backend, error_of(case, backend)
