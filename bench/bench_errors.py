"""The largest error of every op by backend and storage type, over all its cases on this machine.

Without a GPU, Triton's kernels run in Triton's interpreter, in a process of their own: their
arithmetic is then numpy's, in the same order and the same types.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from isolated import Row, outcomes, serve
from op_cases import CASES, check, op_names
from op_cases.case import Error, Scale

from vtts_rt.bench import script
from vtts_rt.bench.setting import add_compute_flags, add_output_flags, check_compute, heading
from vtts_rt.models.registry import DTYPES
from vtts_rt.ops.dispatch import interpreted
from vtts_rt.types import require

SCALES: tuple[Scale, ...] = ("check", "bench")
_CHILD = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); "
_CHILD += "from bench_errors import child; child()"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See `--help`."""
    add = parser.add_argument
    add("--op", default=",".join(CASES), help="comma-separated")
    add("--scale", default="check", help=f"of {', '.join(SCALES)}: small shapes, real ones")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--timeout-seconds", type=float, default=600.0, help="of one case")
    add_compute_flags(parser, threads=torch.get_num_threads(), dtype_help="default: all")
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    return "errors"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result's JSON; "failures": a sentence for each op that did not end or errs too much."""
    ops, scales = op_names(args.op), args.scale.split(",")
    check_compute(args)
    for name in scales:
        require("bench", "scale", name, name in SCALES, f"of {', '.join(SCALES)}")
    args.model = None
    found: list[Row] = []
    failures: list[str] = []
    for interpret in (False, True) if args.device == "cpu" else (False,):
        # In the interpreter only Triton's, on small shapes.
        where = ("check",) if interpret else scales
        for outcome in outcomes(
            [
                sys.executable,
                "-c",
                _CHILD,
                args.device,
                args.dtype or "",
                ",".join(where),
                str(args.threads),
            ],
            ops,
            seconds=args.timeout_seconds,
            interpret=interpret,
            jobs=args.jobs,
        ):
            rows = worst(outcome.rows)
            found += rows
            if outcome.failure is not None:
                failures.append(f"{outcome.op}: {outcome.failure}")
            failures += [
                f"{row['op']}, {row['backend']}, {row['dtype']}, {row['case']}: error "
                f"{row['found']:.3g}, allowed {row['allowed']:.3g}"
                for row in rows
                if not row["within"]
            ]
    found.sort(key=lambda row: (list(CASES).index(row["op"]), row["backend"]))
    flags = ("op", "device", "dtype", "scale", "threads")
    return {**heading("errors", args, flags), "results": found, "failures": failures}


def worst(rows: Iterable[Row]) -> list[Row]:
    """One row for each op, backend and storage type: the case nearest to its bound, or beyond."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row["op"], row["backend"], row["dtype"])
        error = Error(row["found"], row["eager"], row["allowed"])
        row = {**row, "within": error.within, "nearness": _nearness(error), "cases": 1}
        if (known := found.get(key)) is not None:
            nearer = row if row["nearness"] > known["nearness"] else known
            row = {**nearer, "cases": known["cases"] + 1}
        found[key] = row
    return list(found.values())


def _nearness(error: Error) -> float:
    """1 at the bound; what is not a number is farthest beyond it."""
    if not error.within:
        return float("inf")
    return error.found / error.allowed if error.allowed else 0.0


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "backend", "type", "cases", "error", "torch's", "allowed", box=None)
    for row in result["results"]:
        errors = (f"{row[name]:.2e}" for name in ("found", "eager", "allowed"))
        table.add_row(row["op"], row["backend"], row["dtype"], str(row["cases"]), *errors)
    Console().print(table)


# -- the child ----------------------------------------------------------------------------------


def _rows(op: str, device: str, dtype: str, scales: Iterable[Scale]) -> Iterator[Row]:
    for scale in scales:
        for case, backend, error in check(op, device, scale, DTYPES.get(dtype)):
            if interpreted() and backend != "triton":
                continue
            yield {
                "op": op,
                "backend": f"{backend}, interpreted" if interpreted() else backend,
                "dtype": str(case.dtype).removeprefix("torch."),
                "case": case.name,
                **error._asdict(),
            }


def child() -> None:
    """Called by `measure` with device, dtype or nothing, scales, threads and ops."""
    device, dtype, scales, threads, ops = sys.argv[1:]
    torch.set_num_threads(int(threads))
    chosen = [scale for scale in SCALES if scale in scales.split(",")]
    serve(ops.split(","), lambda op: _rows(op, device, dtype, chosen))


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__]))
