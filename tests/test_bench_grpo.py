"""bench_grpo.py with a run that is not one: what it asks for, and what it makes of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_grpo
import pytest
from report.results import Result
from report.training import TABLES

from vtts_rt import bench
from vtts_rt.train import grpo


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[grpo.GrpoRecipe]:
    """The recipes that were run; a step takes as many seconds as it has number."""
    recipes: list[grpo.GrpoRecipe] = []

    def run(recipe: grpo.GrpoRecipe) -> list[dict[str, Any]]:
        recipes.append(recipe)
        counts = {f"group/{name}": 10.0 for name in bench_grpo.COUNTS}
        logged = {"loss": 0.0, "completions/mean_length": 40.0, **counts}
        logged["sampling/sampling_logp_difference/max"] = 1e-5
        steps = range(1, recipe.grpo["max_steps"] + 1)
        times = [dict.fromkeys(bench_grpo.PHASES.values(), float(step)) for step in steps]
        return [*({**logged, **own} for own in times), {"train_runtime": 1.0}]

    monkeypatch.setattr(grpo, "run", run)
    monkeypatch.setattr(bench_grpo, "write_needle", lambda *_: None)
    monkeypatch.setattr(bench_grpo, "allow_broken_torchvision", lambda: None)
    return recipes


def test_the_first_step_is_left_out(asked: list[grpo.GrpoRecipe], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    flags = ["--steps", "4", "--groups", "3", "--device", "cpu", "--output-json", str(path)]
    assert bench.script(bench_grpo, flags) == 0
    result = json.loads(path.read_text())
    theme, table = TABLES["grpo"]
    text = table(Result(path, theme, "cpu", "202611", result))
    assert (
        "| rollout | 3.000 |" in text and "`tiny`, needle, 3 groups of 8 a step, 3 rounds" in text
    )
    assert result["seconds"] == dict.fromkeys(bench_grpo.PHASES, 3.0)
    assert result["of_a_group"] == dict.fromkeys(bench_grpo.COUNTS, 10.0)
    (recipe,) = asked
    assert recipe.grpo["use_cpu"] is True
    assert recipe.grpo["per_device_train_batch_size"] == 3 * 8
    said = "bench_grpo.py --model tiny --groups 3 --members 8 --rounds 3 --max-tokens 64 --steps 4"
    assert f"{said} --clips 6 --device cpu" in result["command"]


def test_wrong_flags_are_named(asked: list[grpo.GrpoRecipe]) -> None:
    with pytest.raises(ValueError, match="bench: steps must be >= 2"):
        bench.script(bench_grpo, ["--steps", "1"])
    assert not asked
