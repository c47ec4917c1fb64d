"""Cases of checks and benches of an op: calls with known right answers.

An op's cases live in the file of its name beside this one. One list serves the tests, the error
tables of docs/ops.md, the checks on a GPU and the times, so that what is timed is what was checked.

The 2x rule: a kernel's largest error against the equation in float32 or wider may be at most twice
that of torch's operators in the same storage type, plus one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Literal, NamedTuple, ParamSpec

import torch
from torch import Tensor

from vtts_rt.ops.dispatch import interpreted
from vtts_rt.ops.native import STORAGE

Outputs = tuple[Tensor, ...]
# "check": small and awkward shapes, quick under Triton's interpreter. "bench": those of Qwen2.5-VL
# 3B and 7B on a GPU, of the 118 M bench model on a CPU.
Scale = Literal["check", "bench"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


_asked: list[torch.dtype] = []  # by `benched_in`, the last one counts


@contextmanager
def benched_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, cases at "bench" scale are of this storage type; None changes nothing."""
    if dtype is None:
        yield
        return
    _asked.append(dtype)
    try:
        yield
    finally:
        _asked.pop()


def bench_dtype(device: str) -> torch.dtype:
    """The type that models are served in, unless `benched_in` asks for another type."""
    return _asked[-1] if _asked else torch.bfloat16 if device == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op.

    name: the shapes, in words; unique with the dtype. dtype: the storage type of the error table.
    run: with a backend's name -> outputs. exact: the equation in float32 or float64, from the
        same (rounded) inputs. eager: torch's operators in `dtype`, rounding where models round;
        its error bounds the others'. None where every backend must give `exact` bit for bit.
    num_bytes, num_flops: least memory traffic and arithmetic of the call, 0 where it says nothing.
    without: backends that do not take this call. native: storage types that "cpu" takes.
    """

    name: str
    dtype: torch.dtype
    run: Callable[[str], Outputs]
    exact: Callable[[], Outputs]
    eager: Callable[[], Outputs] | None
    num_bytes: int = 0
    num_flops: int = 0
    without: tuple[str, ...] = ()
    native: Collection[torch.dtype] = tuple(STORAGE)

    def takes(self, backend: str) -> bool:
        return backend not in self.without and (backend != "cpu" or self.dtype in self.native)


Arguments = ParamSpec("Arguments")
Build = Callable[[], Case]


def built_later(make: Callable[Arguments, Case]) -> Callable[Arguments, Build]:
    """A function that makes a case, put off: cases can be listed without their tensors."""

    @wraps(make)
    def listed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Build:
        return partial(make, *args, **kwargs)

    return listed


class Error(NamedTuple):
    """Largest errors of one case, over all its outputs: the kernel's, eager's, and the bound."""

    found: float
    eager: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.found <= self.allowed  # False for NaN: something was not written


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN (integers: the largest), so that what a kernel forgets to
    write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@torch.inference_mode()
def error_of(case: Case, backend: str) -> Error:
    """Run one case with a backend, outputs poisoned, and compare."""
    exact = case.exact()
    with poisoned():
        outputs = case.run(backend)
    assert len(outputs) == len(exact), f"{case.name}: {len(outputs)} outputs, not {len(exact)}"
    eager = exact if case.eager is None else case.eager()
    worst = Error(0.0, 0.0, 0.0)
    for out, right, usual in zip(outputs, exact, eager, strict=True):
        assert out.shape == right.shape, f"{case.name}: {tuple(out.shape)}, not {right.shape}"
        if out.numel() == 0:
            continue
        found, bound = _distance(out, right), _distance(usual, right)
        allowed = bound
        if case.eager is not None and out.is_floating_point():
            size = right[right.isfinite()].abs().max() if right.isfinite().any() else 0.0
            # The interpreter cuts bfloat16 off where a GPU rounds, and its float32 products are
            # numpy's, summed in an order that depends on the processor.
            ulps = 2 if interpreted() and out.dtype is not torch.float16 else 1
            allowed = 2 * bound + ulps * torch.finfo(out.dtype).eps * float(size)
        # The error of a case is that of the output nearest to its bound, or beyond it.
        if not found <= allowed or found * worst.allowed >= worst.found * allowed:
            worst = Error(found, bound, allowed)
        if not worst.within:
            break
    return worst


def _distance(found: Tensor, right: Tensor) -> float:
    """Largest difference; equal values, infinities too, do not differ; NaN where one is not."""
    found, right = found.double(), right.double()
    return float(torch.where(found == right, 0.0, (found - right).abs()).max())
