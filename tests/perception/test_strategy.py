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
    assert get_args(StrategyName) == STRATEGIES
    assert [find_strategy(name).name for name in STRATEGIES] == list(STRATEGIES)
    for name in ("", "Official", "dense"):
        with pytest.raises(ValueError, match=f"^ask: strategy must be one of {STRATEGIES[0]}, .*"):
            find_strategy(name)


def test_strategies_differ_by_their_fields() -> None:
    continuing = [name for name in STRATEGIES if find_strategy(name).continues]
    literal = [name for name in STRATEGIES if find_strategy(name).literal_clues]
    focusing = [name for name in STRATEGIES if find_strategy(name).focuses]
    assert (continuing, literal, focusing) == (["append"], ["official"], ["refresh", "append"])


def _names(node: ast.AST) -> Iterator[object]:
    """The constants on one side of a comparison, those of a literal collection included."""
    for part in ast.walk(node) if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]:
        if isinstance(part, ast.Constant):
            yield part.value


def test_nobody_compares_a_strategy_by_name() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            patterns = [node.value] if isinstance(node, ast.MatchValue) else []
            if any(name in STRATEGIES for side in sides + patterns for name in _names(side)):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found
