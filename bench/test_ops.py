"""Times of every op by backend: `pytest bench --benchmark-only [--op NAMES] [--device D]`.

The cases are those of op_cases at "bench" scale; each is checked before it is timed.
`vtts-rt bench ops` makes one table of what this file measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from op_cases import CASES, op_names
from op_cases.case import Case, bench_dtype, benched_in, error_of
from timing import WARM_UPS, GpuTimer, copy_sides, flush_buffer, product_sides

from vtts_rt.bench.setting import check_compute
from vtts_rt.models.registry import DTYPES
from vtts_rt.ops.dispatch import backends
from vtts_rt.types import require

LIMITS = "limits"  # of the machine, in the list of ops
GPU_TIMER = GpuTimer()


def options_of(config: pytest.Config) -> argparse.Namespace:
    """The flags, checked."""
    args = argparse.Namespace(**{name: config.getoption(name) for name in ("op", "runs", "dtype")})
    args.op = (args.op or ",".join((LIMITS, *CASES))).split(",")
    op_names(",".join(op for op in args.op if op != LIMITS) or next(iter(CASES)))
    args.device = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    args.threads = config.getoption("threads") or torch.get_num_threads()
    require("bench", "runs", args.runs, args.runs >= 1, ">= 1")
    known = args.dtype is None or args.dtype in DTYPES
    require("bench", "dtype", args.dtype, known, f"of {', '.join(DTYPES)}")
    args.dtype = DTYPES.get(args.dtype)
    check_compute(args)
    return args


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    args = options_of(metafunc.config)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize(("op", "number", "backend"), listed(args))
    else:
        metafunc.parametrize("op", [LIMITS] * (LIMITS in args.op))


def listed(args: argparse.Namespace) -> Iterator[Any]:
    """An op, the number of a case and a backend, or torch's operators as "eager"."""
    for op in args.op:
        for number, _ in enumerate(CASES[op](args.device, "bench") if op != LIMITS else ()):
            for backend in (*backends(op, args.device), "eager"):
                yield pytest.param(op, number, backend, id=f"{op}-{number}-{backend}")


@pytest.fixture(scope="session")
def args(request: pytest.FixtureRequest) -> argparse.Namespace:
    return options_of(request.config)


@pytest.fixture(autouse=True)
def _clock(request: pytest.FixtureRequest, args: argparse.Namespace) -> None:
    """A GPU's own, which the fixture `benchmark` takes from the marker."""
    if args.device == "cuda":
        request.node.add_marker(pytest.mark.benchmark(timer=GPU_TIMER))


@lru_cache(maxsize=1)  # the backends of a case follow each other
def built(op: str, device: str, number: int, dtype: torch.dtype | None) -> Case:
    with benched_in(dtype):
        return list(CASES[op](device, "bench"))[number]()


def timed(benchmark: Any, args: argparse.Namespace, call: Callable[[], object]) -> None:
    """Time a call again and again, on a GPU each time with an empty L2."""
    flush = flush_buffer(args.device)

    def emptied() -> None:
        flush.zero_()
        if args.device == "cuda":
            GPU_TIMER.begin()

    benchmark.pedantic(call, setup=emptied, rounds=args.runs, warmup_rounds=WARM_UPS)


@torch.inference_mode()
def test_copy(benchmark: Any, args: argparse.Namespace, op: str) -> None:
    """Memory-bound ops are compared with a copy's bytes per second, read and written."""
    source, target = copy_sides(args.device)
    benchmark.extra_info["num_bytes"] = 2 * source.numel()
    timed(benchmark, args, lambda: target.copy_(source))


@torch.inference_mode()
def test_product(benchmark: Any, args: argparse.Namespace, op: str) -> None:
    """The operations per second of torch's product of square matrices."""
    dtype = args.dtype or bench_dtype(args.device)
    a, b = product_sides(args.device, dtype)
    benchmark.extra_info |= {"num_flops": 2 * len(a) ** 3, "dtype": str(dtype)}
    timed(benchmark, args, lambda: a @ b)


@torch.inference_mode()
def test_op(benchmark: Any, args: argparse.Namespace, op: str, number: int, backend: str) -> None:
    case = built(op, args.device, number, args.dtype)
    if args.dtype not in (None, case.dtype):
        pytest.skip(f"of {case.dtype}")
    if backend == "eager":
        if case.eager is None:
            pytest.skip("torch has no operators for it")
        call: Callable[[], object] = case.eager
    else:
        # The reference is for small shapes; what torch can do stands in as eager.
        if not case.takes(backend) or (backend == "reference" and case.eager is not None):
            pytest.skip(f"not by {backend}")
        error = error_of(case, backend)
        assert error.within or backend in ("torch", "reference"), f"{case.name}, {backend}: {error}"
        benchmark.extra_info["error"] = error._asdict()

        def call() -> object:
            return case.run(backend)

    dtype = str(case.dtype).removeprefix("torch.")
    benchmark.group = f"{op}: {case.name}, {dtype}"
    benchmark.extra_info |= {"op": op, "case": case.name, "dtype": dtype, "backend": backend}
    benchmark.extra_info |= {"num_bytes": case.num_bytes, "num_flops": case.num_flops}
    timed(benchmark, args, call)
