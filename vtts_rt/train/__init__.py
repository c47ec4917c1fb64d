"""`vtts-rt train TASK`: reinforcement learning with rollouts in rounds, and the embedded model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from vtts_rt.checkout import source_module
from vtts_rt.checks import CommandParser

# Task -> (module with a `main(argv)`, or its file in the checkout's bench/; help).
_TASKS = {
    "grpo": ("vtts_rt.train.grpo", "GRPO on the rows of a manifest; `vtts-rt train grpo --help`"),
    "sft": ("tiny/sft.py", "make the embedded model; `vtts-rt train sft --help`"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(prog="vtts-rt train", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, (_, text) in _TASKS.items():
        tasks.add_parser(name, help=text, add_help=False)
    task = parser.parse_args(arguments[:1]).task
    name = _TASKS[task][0]
    if name.endswith(".py"):
        module = source_module(f"the parts of `vtts-rt train {task}`", name)
        return int(module.main(arguments))  # its own parser names the task
    return int(import_module(name).main(arguments[1:]))
