"""Result files, bench/results/<theme>_<hardware>_<yyyymm>.json, and tables of Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?P<theme>[a-z0-9]+)_(?P<hardware>.+)_(?P<month>\d{6})")


@dataclass(frozen=True, slots=True)
class Result:
    """One result file: its parsed JSON and what its name says."""

    path: Path
    theme: str
    hardware: str
    month: str
    data: dict[str, Any]


def load_results(folder: Path, theme: str) -> list[Result]:
    """The newest result of a theme for each hardware, ordered by hardware.

    Raises ValueError for a file that is not a JSON object.
    """
    newest: dict[str, Result] = {}
    for path in sorted(folder.glob(f"{theme}_*.json")):
        name = _NAME.fullmatch(path.stem)
        if name is None or name["theme"] != theme:
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"report: {path} must be JSON, got {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"report: {path} must be a JSON object, got {type(data).__name__}")
        known = newest.get(name["hardware"])
        if known is None or known.month < name["month"]:
            newest[name["hardware"]] = Result(path, theme, name["hardware"], name["month"], data)
    return [newest[hardware] for hardware in sorted(newest)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table: the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
