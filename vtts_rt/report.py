"""`vtts-rt report`: write the tables of README and docs from the results of benches."""

from __future__ import annotations

from collections.abc import Sequence

from vtts_rt.checkout import source_module


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables of a checkout; argv without the program's name. Returns the exit code."""
    return int(source_module("the tables", "report/__init__.py").main(argv))
