"""`vtts-rt train TASK`: reinforcement learning with rollouts in rounds, and the embedded model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vtts_rt.checkout import source_module
from vtts_rt.checks import CommandParser

# Task of the package, or of the checkout's bench/ -> help.
_TASKS = {
    "grpo": "GRPO on the rows of a manifest; `vtts-rt train grpo --help`",
    "tiny": "make the embedded model; `vtts-rt train tiny --help`",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(prog="vtts-rt train", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, text in _TASKS.items():
        tasks.add_parser(name, help=text, add_help=False)
    if parser.parse_args(arguments[:1]).task == "grpo":
        from vtts_rt.train import grpo

        return grpo.main(arguments[1:])
    module = source_module("the parts of `vtts-rt train tiny`", "tiny/command.py")
    return int(module.main(arguments))  # its own parser names the task
