"""Largest error of every op by backend and storage type, over all its cases on this machine.

Without a GPU, Triton's kernels run in Triton's interpreter, in a process of their own: their
arithmetic is then numpy's, in the same order and the same types.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

from vtts_rt.bench.ops import CASES, check
from vtts_rt.bench.ops.case import Error
from vtts_rt.bench.setting import add_output_flags, heading
from vtts_rt.ops.dispatch import interpreted

_INTERPRETED = """
import json, sys
from vtts_rt.bench.errors import rows
json.dump(rows(sys.argv[1].split(","), "cpu", "triton"), sys.stdout)
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench errors`."""
    add = parser.add_argument
    add("--op", default=",".join(CASES), help="comma-separated")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    return "errors"


def rows(ops: list[str], device: str, only: str | None = None) -> list[dict[str, Any]]:
    """One row for each op, backend and storage type: the case nearest to its bound, or beyond it.

    only: a backend; None for all that run here.
    """
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for op in ops:
        for case, backend, error in check(op, device):
            if only not in (None, backend):
                continue
            name = f"{backend}, interpreted" if interpreted() else backend
            key = (op, name, str(case.dtype).removeprefix("torch."))
            known = worst.get(key)
            row = {
                **dict(zip(("op", "backend", "dtype"), key, strict=True)),
                "cases": 1 + (known["cases"] if known else 0),
                "within": error.within and (known is None or known["within"]),
            }
            if known is None or _nearness(error) > known["nearness"]:
                row |= {"nearness": _nearness(error), "case": case.name, **error._asdict()}
            worst[key] = {**(known or {}), **row}
    return list(worst.values())


def _nearness(error: Error) -> float:
    """1 at the bound; what is not a number is farthest beyond it."""
    if not error.found <= error.allowed:
        return float("inf")
    return error.found / error.allowed if error.allowed else 0.0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result's JSON; status 1 is the caller's to give for rows that are not `within`."""
    torch.set_num_threads(args.threads)
    args.model = None
    ops = args.op.split(",")
    found = rows(ops, args.device)
    if args.device == "cpu" and not interpreted():
        found += _interpreted_rows(ops)
    found.sort(key=lambda row: (list(CASES).index(row["op"]), row["backend"]))
    return {**heading("errors", args, ("op", "device", "threads")), "results": found}


def _interpreted_rows(ops: list[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", _INTERPRETED, ",".join(ops)]
    with tempfile.TemporaryDirectory() as folder:  # `-c` looks for modules where it runs
        done = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "backend", "type", "cases", "error", "torch's", "allowed", "", box=None)
    for row in result["results"]:
        errors = (f"{row[name]:.2e}" for name in ("found", "eager", "allowed"))
        said = "" if row["within"] else f"TOO LARGE: {row['case']}"
        names = (row["op"], row["backend"], row["dtype"], str(row["cases"]))
        table.add_row(*names, *errors, said)
    Console().print(table)
