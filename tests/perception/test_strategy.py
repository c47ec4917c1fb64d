"""Strategies: one table, and nobody compares a name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from vtts_rt.config import STRATEGIES
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.types import StrategyName

PACKAGE = Path(__file__).resolve().parents[2] / "vtts_rt"


def test_every_name_has_its_strategy() -> None:
    assert get_args(StrategyName) == tuple(STRATEGIES)
    assert [find_strategy(name).name for name in STRATEGIES] == list(STRATEGIES)
    for name in ("", "Official", "dense"):
        with pytest.raises(ValueError, match="^ask: strategy must be one of official, grid, .*"):
            find_strategy(name)


def test_strategies_differ_by_their_fields() -> None:
    continuing = [name for name in STRATEGIES if find_strategy(name).continues]
    literal = [name for name in STRATEGIES if find_strategy(name).literal_clues]
    focusing = [name for name in STRATEGIES if find_strategy(name).focuses]
    assert (continuing, literal, focusing) == (["append"], ["official"], ["refresh", "append"])
    early = [name for name in STRATEGIES if find_strategy(name).may_stop_early]
    assert early == ["grid", "refresh", "append"]


def _names(node: ast.AST) -> Iterator[object]:
    """The constants on one side of a comparison, those of collections in it included."""
    whole = isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict | ast.Call)
    for part in ast.walk(node) if whole else [node]:
        if isinstance(part, ast.Constant):
            yield part.value


def test_no_code_compares_or_lists_strategies_by_name() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            sides: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                sides = [node.value]
            elif isinstance(node, ast.Tuple | ast.List | ast.Set):
                sides = list(node.elts)
            elif isinstance(node, ast.Dict):
                sides = [key for key in node.keys if key is not None]
            names = {name for side in sides for name in _names(side) if name in STRATEGIES}
            # A dialect's rounds may go on by `append`, which is a way as well as a name.
            if names - (set() if isinstance(node, ast.Compare) else {"append"}):
                found.append((f"{path.relative_to(PACKAGE)}", ast.unparse(node)[:60]))
    tables = [place for place, _ in found]
    # The names, their traits, and their functions.
    assert tables == ["config.py", "perception/strategy.py", "types.py"], found
