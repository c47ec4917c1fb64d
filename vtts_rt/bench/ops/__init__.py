"""What an op costs against torch's operators on this machine, each checked before it is timed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import vtts_rt.ops  # noqa: F401  (registers the ops)
from vtts_rt.bench.ops import (
    cascade_attention,
    linear,
    linear_fp8,
    linear_int8,
    merge_state,
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
from vtts_rt.bench.ops.case import Case, Error, Scale, bench_dtype, benched_in, error_of
from vtts_rt.bench.ops.isolated import Row, outcomes, serve
from vtts_rt.bench.ops.timing import copy_bandwidth, matmul_rate, median_seconds
from vtts_rt.bench.setting import add_compute_flags, add_output_flags, check_compute, heading
from vtts_rt.models.registry import DTYPES
from vtts_rt.ops.dispatch import backends, interpreted
from vtts_rt.types import require

# Every op of vtts_rt.ops; the file of an op's cases has its name.
CASES: dict[str, Callable[[str, Scale], Iterator[Case]]] = {
    "cascade_attention": cascade_attention.cases,
    "linear": linear.cases,
    "linear_fp8": linear_fp8.cases,
    "linear_int8": linear_int8.cases,
    "merge_state": merge_state.cases,
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
_CHILD = "from vtts_rt.bench.ops import child; child()"


def op_names(text: str) -> list[str]:
    """The ops of a comma-separated list. ValueError names one that there is not."""
    names = text.split(",")
    for name in names:
        require("bench", "op", name, name in CASES, f"one of {', '.join(CASES)}")
    return names


def cases(op: str, device: str, scale: Scale, dtype: torch.dtype | None = None) -> Iterator[Case]:
    """The cases of an op, of one storage type where `dtype` names it; device: "cpu" or "cuda"."""
    with benched_in(dtype):
        for case in CASES[op](device, scale):
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


# -- `vtts-rt bench ops` ------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench ops`."""
    add = parser.add_argument
    add("--op", default=",".join(CASES), help="comma-separated")
    add("--runs", type=int, default=25, help="timed runs of each contender, alternating")
    add_compute_flags(
        parser, threads=torch.get_num_threads(), dtype_help="default: bfloat16, on a CPU float32"
    )
    add("--timeout-seconds", type=float, default=600.0, help="of one case")
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    return "ops"


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row for each case: errors and medians of all backends, GB/s, GFLOP/s and shares."""
    require("bench", "runs", args.runs, args.runs >= 1, ">= 1")
    ops = op_names(args.op)
    check_compute(args)
    args.model = None
    bandwidth = copy_bandwidth(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else bench_dtype(args.device)
    rates = {str(dtype): matmul_rate(args.device, dtype)}
    told = [args.device, args.dtype or "", str(args.threads), str(args.runs), str(bandwidth)]
    found = outcomes(_CHILD, told, ops, seconds=args.timeout_seconds, interpret=interpreted())
    return {
        **heading("ops", args, ("op", "device", "dtype", "runs", "threads")),
        "copy_gb_per_second": bandwidth / 1e9,
        "matmul_gflops": {dtype: rate / 1e9 for dtype, rate in rates.items()},
        "results": [row for outcome in found for row in outcome.rows],
        "failures": [f"{outcome.op}: {outcome.failure}" for outcome in found if outcome.failure],
    }


def child() -> None:
    """Called by `measure` with device, dtype or nothing, threads, runs, bandwidth and ops."""
    device, dtype, threads, runs, bandwidth, ops = sys.argv[1:]
    torch.set_num_threads(int(threads))

    def rows(op: str) -> Iterator[Row]:
        for case in cases(op, device, "bench", DTYPES.get(dtype)):
            yield _row(op, case, device, int(runs), float(bandwidth))

    with torch.inference_mode():
        serve(ops.split(","), rows)


def _row(op: str, case: Case, device: str, runs: int, bandwidth: float) -> Row:
    # The reference is for small shapes; what torch can do stands in as eager.
    slow = ("reference",) if case.eager is not None else ()
    names = [n for n in backends(op, device) if case.takes(n) and n not in slow]
    errors = {name: error_of(case, name) for name in names}
    for name, error in errors.items():
        assert error.within or name in ("torch", "reference"), f"{op}, {case.name}, {name}: {error}"

    def runner(name: str) -> Callable[[], object]:
        return lambda: case.run(name)

    contenders: dict[str, Callable[[], object]] = {name: runner(name) for name in names}
    if case.eager is not None:
        contenders["eager"] = case.eager
    seconds = median_seconds(contenders, device, runs)
    return {
        "op": op,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "num_bytes": case.num_bytes,
        "num_flops": case.num_flops,
        "median_us": {name: 1e6 * median for name, median in seconds.items()},
        "gb_per_second": {name: case.num_bytes / t / 1e9 for name, t in seconds.items()},
        "share_of_copy": {name: case.num_bytes / t / bandwidth for name, t in seconds.items()},
        "gflops": {name: case.num_flops / t / 1e9 for name, t in seconds.items()},
        "error": {name: error._asdict() for name, error in errors.items()},
    }


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "case", "type", "microseconds", "GB/s", "GFLOP/s", box=None)
    for row in result["results"]:
        cells = (
            "  ".join(f"{name} {value:,.{digits}f}" for name, value in row[field].items() if value)
            for field, digits in (("median_us", 1), ("gb_per_second", 0), ("gflops", 0))
        )
        table.add_row(row["op"], row["case"], row["dtype"], *cells)
    Console().print(table)
