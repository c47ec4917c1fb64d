"""bench_tree_step.py on a small model: its sides agree; no times are judged."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import bench_tree_step
import pytest
from report.answers import TABLES
from report.results import load_results

from vtts_rt import bench


class Inline(Executor):
    """In this process, so that torch is not loaded three times more."""

    def submit(self, call: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*args, **kwargs))
        return done


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(bench_tree_step, "processes", Inline)
    small = ["--device", "cpu", "--shape", "1m", "--threads", "1", "--members", "2", "--runs", "1"]
    return [*small, "--dtype", "float32"]


def test_all_sides_score_the_same(flags: list[str], tmp_path: Path) -> None:
    more = ["--case", "150/3,280/5", "--pixels-answer", "3", "--result-dir", str(tmp_path)]
    assert bench.script(bench_tree_step, [*flags, *more]) == 0
    (result,) = load_results(tmp_path, "treestep")
    said = "--members 2 --shape 1m --dtype float32 --runs 1 --pixels-answer 3"
    assert f"bench_tree_step.py --case 150/3,280/5 {said}" in result.data["command"]
    first, second = result.data["runs"]
    assert list(first["sides"]) == ["pixels", "cached", "tree"]
    assert list(second["sides"]) == ["cached", "tree"]
    assert (first["tree_tokens"], first["row_tokens"]) == (150 + 2 * 3, 2 * 153)
    assert first["worst_logprob"] < 1e-4 and first["worst_gradient"] < 1e-4
    theme, table = TABLES["treestep"]
    lines = table(result).splitlines()
    assert theme == "treestep" and "| 1m, float32, 280 / 5 | – |" in lines[3]


def test_sides_that_differ_fail(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench_tree_step, "TOLERANCES", {"float32": (0.0, 1.0)})
    path = tmp_path / "result.json"
    more = ["--case", "150/3", "--output-json", str(path)]
    assert bench.script(bench_tree_step, [*flags, *more]) == 1
    assert "logprob differs by" in capsys.readouterr().err
    assert len(json.loads(path.read_text())["failures"]) == 1


@pytest.mark.parametrize("wrong", [["--case", "9"], ["--members", "1"], ["--dtype", "int8"]])
def test_wrong_flags_are_named(flags: list[str], wrong: list[str]) -> None:
    with pytest.raises(ValueError, match=f"bench: {wrong[0][2:]} must be"):
        bench.script(bench_tree_step, [*flags, *wrong])
