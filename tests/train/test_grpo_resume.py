"""GRPO by TRL: what a run goes on with, what it is compared by, and what it must find installed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from grpo_tools import SIZE, recipe

from vtts_rt import PerceptionConfig, Runtime
from vtts_rt.rollout.rows import RolloutRow
from vtts_rt.train.groups import trained_rows
from vtts_rt.train.grpo import (
    SETTINGS_FILE,
    GrpoRecipe,
    check_resumed,
    read_examples,
    run,
    settings_of,
)
from vtts_rt.train.settings import longest_said
from vtts_rt.types import SamplingParams


def settings(asked: GrpoRecipe, runtime: Runtime, processes: int = 1, rows: int = 6) -> Any:
    """Without the trainer, of which four attributes are read."""
    args = SimpleNamespace(world_size=processes, per_device_train_batch_size=SIZE)
    args.per_device_train_batch_size = asked.grpo["per_device_train_batch_size"]
    trainer = SimpleNamespace(
        runtime=runtime,
        examples=read_examples(asked.manifest)[:rows],
        perception=runtime.perception(PerceptionConfig(**asked.perception)),
        args=args,
    )
    return settings_of(asked, trainer)


@pytest.fixture
def kept(runtime: Runtime, manifest: Path, tmp_path: Path) -> GrpoRecipe:
    """Of a run whose settings lie in its folder."""
    asked = recipe(manifest, tmp_path, grpo={"beta": 0.05, "max_steps": 9, "save_steps": 3})
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(settings(asked, runtime)))
    return asked


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"rewards": {"answer": 1.0}}, "rewards must be {'answer': 1.0, 'clue_spans': 1.0, 'format'"),
    ({"rewards": None}, "rewards must be {'answer'"),
    ({"max_tokens": 41}, "max_tokens must be 40, that of the checkpoints in"),
    ({"train_round": "last"}, "train_round must be 'all'"),
    ({"lora": {}}, "lora must be False"),
    ({"perception": {"max_rounds": 3, "max_frames": 8}}, "perception.max_rounds must be 2"),
    ({"perception": {"max_rounds": 2}}, "perception.max_frames must be 8"),
    ({"grpo": {"beta": 0.04}}, "grpo.beta must be 0.05"),
    ({"grpo": {"beta": None}}, "grpo.beta must be 0.05"),
    ({"grpo": {"temperature": 0.9}}, "grpo.temperature must be 1.0"),
    ({"grpo": {"seed": 1}}, "grpo.seed must be 42"),
    ({"grpo": {"per_device_train_batch_size": 2 * SIZE}}, "x processes must be 4"),
]


@pytest.mark.parametrize(("more", "message"), OTHERS, ids=[m for _, m in OTHERS])
def test_a_run_does_not_go_on_with_other_settings(
    kept: GrpoRecipe, runtime: Runtime, more: dict[str, Any], message: str
) -> None:
    grpo = {**kept.grpo, **more.get("grpo", {})}
    grpo = {name: value for name, value in grpo.items() if value is not None}
    changed = replace(kept, **{**more, "grpo": grpo})
    with pytest.raises(ValueError) as error:
        check_resumed(Path(kept.output), settings(changed, runtime))
    told = str(error.value)
    assert told.startswith("train grpo: ") and message in told and ", got " in told
    assert "\n" not in told


def test_other_rows_weights_and_prompts_are_seen(
    kept: GrpoRecipe, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(rule: str, now: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"train grpo: {rule}"):
            check_resumed(tmp_path, now)

    refused("manifest must be '6 rows, SHA-256 .*got '5 rows", settings(kept, runtime, rows=5))
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"cue_look": "Look!"}')
    worded = replace(kept, perception={**kept.perception, "prompts": str(prompts)})
    refused("prompts.cue_look must be '', .*got 'Look!'", settings(worded, runtime))
    monkeypatch.setattr(runtime.engine.model, "version", lambda part: part)
    refused("model must be '[0-9a-f]+ [0-9a-f]+', .*got 'language visual'", settings(kept, runtime))


def test_what_changes_no_number_may_change(
    kept: GrpoRecipe, runtime: Runtime, tmp_path: Path
) -> None:
    free = {"max_steps": 90, "save_steps": 6, "logging_steps": 5, "report_to": "none"}
    same = {"epsilon": 0.2, "gradient_accumulation_steps": 1}  # the defaults, now said
    grpo = {**kept.grpo, **free, **same, "per_device_train_batch_size": SIZE // 2}
    moved = replace(kept, output=tmp_path / "elsewhere", grpo=grpo)
    check_resumed(tmp_path, settings(moved, runtime, processes=2))
    (tmp_path / SETTINGS_FILE).write_text("[")
    with pytest.raises(ValueError, match=r"settings.json must be a JSON object, got 'Expecting"):
        check_resumed(tmp_path, settings(kept, runtime))
    (tmp_path / SETTINGS_FILE).unlink()  # of an earlier version
    check_resumed(tmp_path, settings(replace(kept, max_tokens=3), runtime))


@pytest.mark.parametrize(
    ("strategy", "max_tokens", "expected"),
    [("append", 40, 120), ("refresh", 40, 40), ("append", None, 3 * 2048)],
)
def test_a_loss_is_divided_by_what_a_row_may_say(
    strategy: Any, max_tokens: int | None, expected: int, runtime: Runtime
) -> None:
    perception = runtime.perception(PerceptionConfig(strategy=strategy, max_rounds=3))
    assert longest_said(perception, SamplingParams(max_tokens=max_tokens)) == expected


def test_the_last_round_is_one_in_which_something_was_said() -> None:
    def row(member: int, index: int, said: int) -> RolloutRow:
        mask = np.arange(5) >= 5 - said
        logprobs, positions = np.where(mask, -1.0, np.nan), np.zeros((3, 5), np.int64)
        ids = np.arange(5)
        return RolloutRow(ids, mask, logprobs, positions, rollout_id=member, round=index)

    rows = [row(0, 0, 2), row(0, 1, 1), row(1, 0, 2), row(1, 1, 2), row(1, 2, 0), row(2, 0, 0)]
    assert {member: made.round for member, made in trained_rows(rows).items()} == {0: 1, 1: 1}


def test_a_torchvision_that_does_not_import_is_one_sentence(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = importlib.import_module

    def broken(name: str, *args: Any) -> Any:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms\ndoes not exist")
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError) as error:
        run(recipe(manifest, tmp_path))
    told = f"beside torch {torch.__version__} (operator torchvision::nms does not exist): pip"
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_training_needs_no_torchvision(manifest: Path, tmp_path: Path) -> None:
    code = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "torchvision"
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from pathlib import Path
from vtts_rt.train.grpo import GrpoRecipe, run
grpo = {"num_generations": 2, "per_device_train_batch_size": 2, "max_steps": 1, "report_to": "none"}
perception = {"max_rounds": 1, "max_frames": 4}
run(GrpoRecipe(manifest=sys.argv[1], output=sys.argv[2], rewards={"answer": 1.0}, max_tokens=8,
               perception=perception, grpo=grpo))
assert "torchvision" not in sys.modules
"""
    words = [sys.executable, "-c", code, str(manifest), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model/config.json").is_file()
