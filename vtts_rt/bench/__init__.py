"""`vtts-rt bench KIND`: what rounds, concurrent requests, ops and decoders cost.

Benches that only a source checkout needs (memory over time, feeds, errors of ops, a GPU against
transformers) are scripts in its bench/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from vtts_rt.checks import CommandParser


class Bench(Protocol):
    """What a module of this package, or a script of bench/, defines."""

    def add_flags(self, parser: argparse.ArgumentParser) -> None: ...

    def theme(self, args: argparse.Namespace) -> str:
        """What its result is filed under."""
        ...

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The result; "failures": sentences that make the exit status 1."""
        ...

    def print_table(self, result: dict[str, Any]) -> None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vtts-rt bench`; argv without the program's name. Returns the exit code."""
    from vtts_rt.bench import ops, rounds, serve, video

    benches: dict[str, Bench] = {"rounds": rounds, "serve": serve, "decode": video, "ops": ops}
    parser = CommandParser(prog="vtts-rt bench", description=__doc__)
    kinds = parser.add_subparsers(dest="bench", required=True)
    for name, bench in benches.items():
        about = (bench.__doc__ or "").split("\n")[0]
        bench.add_flags(kinds.add_parser(name, help=about, description=about))
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    return run(benches[args.bench], args)


def script(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Entry point of a script in bench/, `script(sys.modules[__name__])`: its own flags."""
    parser = CommandParser(description=(bench.__doc__ or "").split("\n")[0])
    bench.add_flags(parser)
    return run(bench, parser.parse_args(argv))


def run(bench: Bench, args: argparse.Namespace) -> int:
    """Measure, print the table and write the result where the flags say. Returns the exit code."""
    from vtts_rt.bench.setting import results_name, write_result

    result = bench.measure(args)
    bench.print_table(result)
    places = [] if args.output_json is None else [args.output_json]
    if args.result_dir is not None:
        places.append(args.result_dir / results_name(bench.theme(args)))
    for path in places:
        write_result(path, result)
    failures: list[str] = result.get("failures", [])
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
