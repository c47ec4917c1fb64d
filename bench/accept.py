"""`make accept`: one line, PASS, FAIL or NOT RUN, for each line of the acceptance list.

A line passes only on evidence seen in this run: tests that ran and passed, a number read from a
result file, a command that did what it should. Exit status: 1 if a line failed, 0 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from accept_lines import LINES
from evidence import FAIL, NOT_RUN, PASS, Line, Verdict


def judge(line: Line, args: argparse.Namespace) -> Verdict:
    """FAIL if a check failed, NOT RUN if one did not run, else PASS."""
    verdicts = [check(args) for check in line.checks]
    for status in (FAIL, NOT_RUN):
        said = [verdict.evidence for verdict in verdicts if verdict.status == status]
        if said:
            return Verdict(status, "; ".join(said))
    return Verdict(PASS, "; ".join(verdict.evidence for verdict in verdicts))


def main(argv: Sequence[str] | None = None, lines: Sequence[Line] = LINES) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--issue", type=int, help="only the lines of this issue")
    parser.add_argument("--only", default="", help="only lines that begin so")
    parser.add_argument("--results", type=Path, help="folder of result files")
    parser.add_argument("--fresh-clone", action="store_true", help="also build a fresh clone")
    parser.add_argument("--needle-seed", type=int, help="also evaluate needle on this seed")
    parser.add_argument("--needle-num", type=int, default=500, help="clips of that evaluation")
    args = parser.parse_args(argv)
    failed = False
    for line in lines:
        if args.issue in (None, line.issue) and line.text.startswith(args.only):
            verdict = judge(line, args)
            failed |= verdict.status == FAIL
            print(
                f"{verdict.status:8}issue {line.issue}: {line.text} [{verdict.evidence}]",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
