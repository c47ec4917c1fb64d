"""`vtts-rt eval`: the evaluations by name."""

from __future__ import annotations

from collections.abc import Sequence

from vtts_rt.checks import CommandParser
from vtts_rt.evaluation import needle, strategies

TASKS = {
    "needle": (needle, "accuracy by number of rounds on generated clips"),
    "strategies": (strategies, "what each strategy keeps from round to round, and its accuracy"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vtts-rt eval`; argv without the program's name. Returns the exit status."""
    parser = CommandParser(prog="vtts-rt eval", description="Evaluate.")
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (module, text) in TASKS.items():
        task = tasks.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        module.add_flags(task)
        task.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return int(args.run(args))
