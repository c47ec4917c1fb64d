"""Ops in processes of their own: a crash or a hang in one does not lose what the others say.

A child works through a list of ops and prints a JSON object a line, {"row": ...} or {"done": op};
when it ends early or is silent for too long, that op has failed and another child goes on with the
ones behind it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

Row = dict[str, Any]


class Outcome(NamedTuple):
    """Rows of an op, as far as they came, and why no more did."""

    op: str
    rows: list[Row]
    failure: str | None


def serve(ops: Iterable[str], rows_of: Callable[[str], Iterable[Row]]) -> None:
    """In the child: print what `rows_of` yields for each op. An exception ends the process, since
    a CUDA context does not outlive a fault. What else is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        for op in ops:
            for row in rows_of(op):
                print(json.dumps({"row": row}), file=stdout, flush=True)
            print(json.dumps({"done": op}), file=stdout, flush=True)


def outcomes(
    command: Sequence[str],
    ops: Sequence[str],
    *,
    seconds: float,
    interpret: bool = False,
    jobs: int = 1,
) -> list[Outcome]:
    """What children `command... ops` say of each op, in the order of `ops`.

    seconds: the longest silence, between two rows. interpret: with Triton's interpreter, which is
    chosen for a whole process. jobs: children at a time.
    """
    shares = [list(ops[first::jobs]) for first in range(min(jobs, len(ops)))]

    def run(share: list[str]) -> list[Outcome]:
        return list(_run(command, share, seconds, interpret))

    with ThreadPoolExecutor(max(len(shares), 1)) as pool:
        found = {outcome.op: outcome for part in pool.map(run, shares) for outcome in part}
    return [found[op] for op in ops]


def _run(
    command: Sequence[str], ops: Sequence[str], seconds: float, interpret: bool
) -> Iterator[Outcome]:
    # pytest-benchmark takes a worker of pytest-xdist, which may have started us, for its own.
    dropped = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    left = list(ops)
    while left:
        with (
            tempfile.TemporaryDirectory() as folder,  # `-c` looks for modules where it runs
            tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
            subprocess.Popen(
                [*command, ",".join(left)],
                env=env,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            ) as process,
        ):
            rows: list[Row] = []
            silence = _Silence(process, seconds)
            assert process.stdout is not None
            for line in process.stdout:
                silence.broken()
                if not line.startswith("{"):
                    continue
                said = json.loads(line)
                if "done" in said:
                    yield Outcome(left.pop(0), rows, None)
                    rows = []
                else:
                    rows.append(said["row"])
            silence.end()
            process.wait()
            if left:
                stderr.seek(0)
                last = stderr.read().strip().splitlines()[-1:] or [f"status {process.returncode}"]
                why = f"silent for {seconds:.0f} s" if silence.too_long else last[0][-500:]
                yield Outcome(left.pop(0), rows, f"{why} (after {len(rows)} rows)")


class _Silence:
    """Kills a process that says nothing for `seconds`."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self._process, self._seconds = process, seconds
        self.too_long = False
        self._begin()

    def _begin(self) -> None:
        self._timer = threading.Timer(self._seconds, self._kill)
        self._timer.start()

    def _kill(self) -> None:
        self.too_long = True
        self._process.kill()

    def broken(self) -> None:
        self.end()
        self._begin()

    def end(self) -> None:
        self._timer.cancel()
