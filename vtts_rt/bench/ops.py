"""What an op costs against torch's operators on this machine, each checked before it is timed.

One table of the source checkout's micro-benchmarks (`pytest bench --benchmark-only`). A crash or a
hang in one op costs no other.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from typing import Any

import torch

import vtts_rt.ops  # noqa: F401  (registers the ops)
from vtts_rt.bench.setting import add_compute_flags, add_output_flags, check_compute, heading
from vtts_rt.checkout import source_file, source_module
from vtts_rt.ops.dispatch import interpreted, registry
from vtts_rt.types import require


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench ops`."""
    add = parser.add_argument
    add("--op", default=",".join(sorted(registry)), help="comma-separated")
    add("--runs", type=int, default=25, help="timed runs of each backend")
    add_compute_flags(
        parser, threads=torch.get_num_threads(), dtype_help="default: bfloat16, on a CPU float32"
    )
    add("--timeout-seconds", type=float, default=600.0, help="of one case")
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "ops"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row for each case: errors and medians of all backends, GB/s, GFLOP/s and shares."""
    require("bench", "runs", args.runs, args.runs >= 1, ">= 1")
    ops, known = args.op.split(","), sorted(registry)
    for op in ops:
        require("bench", "op", op, op in known, f"one of {', '.join(known)}")
    check_compute(args)
    file = source_file("the micro-benchmarks", "test_ops.py")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise RuntimeError("bench: pytest-benchmark is not installed: pip install 'vtts_rt[test]'")
    args.model = None
    command = [sys.executable, "-m", "pytest", str(file), "--benchmark-only", "--stream", "-sx"]
    command += ["-p", "no:cacheprovider", "--device", args.device, "--runs", str(args.runs)]
    command += ["--threads", str(args.threads), *(["--dtype", args.dtype] if args.dtype else [])]
    isolated = source_module("the micro-benchmarks", "isolated.py")
    limits, *found = isolated.outcomes(
        [*command, "--op"],
        ["limits", *ops],
        seconds=args.timeout_seconds,
        interpret=interpreted(),
    )
    if limits.failure is not None:
        raise RuntimeError(f"bench: the limits of the machine: {limits.failure}")
    copy, product = limits.rows
    bandwidth = copy["num_bytes"] / copy["median"]
    return {
        **heading("ops", args, ("op", "device", "dtype", "runs", "threads")),
        "copy_gb_per_second": bandwidth / 1e9,
        "matmul_gflops": {product["dtype"]: product["num_flops"] / product["median"] / 1e9},
        "results": [row for outcome in found for row in _rows(outcome.rows, bandwidth)],
        "failures": [f"{outcome.op}: {outcome.failure}" for outcome in found if outcome.failure],
    }


def _rows(benchmarks: Iterable[dict[str, Any]], bandwidth: float) -> list[dict[str, Any]]:
    """One row for each case, of all its backends."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in benchmarks:
        cases.setdefault((found["case"], found["dtype"]), []).append(found)
    rows = []
    for backends in cases.values():
        about = {name: backends[0][name] for name in ("op", "case", "dtype")}
        num_bytes, num_flops = (backends[0][name] for name in ("num_bytes", "num_flops"))
        seconds = {found["backend"]: found["median"] for found in backends}
        rows.append(
            {
                **about,
                "num_bytes": num_bytes,
                "num_flops": num_flops,
                "median_us": {name: 1e6 * t for name, t in seconds.items()},
                "gb_per_second": {name: num_bytes / t / 1e9 for name, t in seconds.items()},
                "share_of_copy": {name: num_bytes / t / bandwidth for name, t in seconds.items()},
                "gflops": {name: num_flops / t / 1e9 for name, t in seconds.items()},
                "error": {f["backend"]: f["error"] for f in backends if "error" in f},
            }
        )
    return rows


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
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
