from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import command, recipe
from tiny.stages import (
    STAGES,
    Recipe,
    export,
    run_language,
    run_sketch,
    run_vision,
    write_questions,
)
from torch import Tensor

from vtts_rt.data.rows import read_manifest
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import load_model
from vtts_rt.models.tokenizer import Tokenizer

RUNS = {"vision": run_vision, "sketch": run_sketch, "language": run_language}


@pytest.fixture(autouse=True)
def _no_footage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtts_rt.data.needle.footage_available", lambda: False)


def _recipe(folder: Path) -> Recipe:
    return Recipe(folder, num_clips=3, workers=0, batch_views=6, batch_tokens=700)


def _weights(folder: Path, stage: str) -> dict[str, Tensor]:
    state = torch.load(folder / f"{stage}.pt", weights_only=True)
    modules: dict[str, Tensor] = state["modules"]
    return modules


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of every stage in one go."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtts_rt.data.needle.footage_available", lambda: False)
        for stage in STAGES:
            skills = RUNS[stage](_recipe(folder), steps=3)
            assert skills
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_stages_end_with_the_same_weights(
    trained: Path, tmp_path: Path, stage: str
) -> None:
    for earlier in STAGES[: STAGES.index(stage)]:  # type: ignore[arg-type]
        (tmp_path / f"{earlier}.pt").write_bytes((trained / f"{earlier}.pt").read_bytes())
    RUNS[stage](_recipe(tmp_path), steps=3, stop_after=1)
    assert not _same(_weights(tmp_path, stage), _weights(trained, stage))
    RUNS[stage](_recipe(tmp_path), steps=3)
    assert _same(_weights(tmp_path, stage), _weights(trained, stage))


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _copied(trained: Path, folder: Path) -> Path:
    for path in (*trained.glob("*.pt"), *trained.glob("*.npz")):
        shutil.copyfile(path, folder / path.name)
    return folder


def _strip(path: Path) -> None:
    """Leave what an earlier version wrote."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        del state["made_with"]
        torch.save(state, path)
        return
    with np.load(path) as bank:
        arrays = [bank[name] for name in bank.files if name.startswith("arr_")]
    np.savez(path, *arrays)


@pytest.mark.parametrize(
    ("stage", "other", "message"),
    [
        ("vision", {"seed": 1}, "seed must be 0, that of .*vision.pt, got 1"),
        ("vision", {"batch_views": 5}, "batch_views must be 6"),
        ("sketch", {"batch_tokens": 600}, "batch_tokens must be 700"),
        ("language", {"num_clips": 2}, "clips must be 3, that of .*language.pt, got 2"),
        ("language", {"seed": 1}, "seed must be 0, that of .*vision.pt, got 1"),
    ],
)
def test_checkpoints_of_another_run_are_refused(
    trained: Path, tmp_path: Path, stage: str, other: dict[str, int], message: str
) -> None:
    recipe = replace(_recipe(_copied(trained, tmp_path)), **other)
    with pytest.raises(ValueError, match=f"^train tiny: {message}"):
        RUNS[stage](recipe, steps=3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_has_steps_to_go_is_refused(trained: Path, tmp_path: Path, stage: str) -> None:
    recipe = _recipe(_copied(trained, tmp_path))
    state = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / f"{stage}.pt")
    message = f"^train tiny: steps of .*{stage}.pt must be 3, all of stage {stage}: .*, got 2$"
    with pytest.raises(ValueError, match=message):
        export(recipe, tmp_path / "model") if stage == "language" else run_language(recipe, 3)
    assert not (tmp_path / "model").exists()


def test_features_of_another_tower_are_refused(trained: Path, tmp_path: Path) -> None:
    recipe = _recipe(_copied(trained, tmp_path))
    state = torch.load(tmp_path / "vision.pt", weights_only=True)
    state["modules"]["visual.patch_embed.weight"] += 1
    torch.save(state, tmp_path / "vision.pt")
    with pytest.raises(ValueError, match=r"vision must be '\w+', that of .*bank.npz, got '\w+'"):
        run_language(recipe, steps=3)
    with pytest.raises(ValueError, match=r"vision must be '\w+', that of .*language.pt, got"):
        export(recipe, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_files_of_earlier_versions_are_taken_as_they_are(trained: Path, tmp_path: Path) -> None:
    recipe = replace(_recipe(_copied(trained, tmp_path)), seed=1)
    for path in (*tmp_path.glob("*.pt"), *tmp_path.glob("*.npz")):
        _strip(path)
    for stage in STAGES:
        RUNS[stage](recipe, steps=3)
        assert _same(_weights(tmp_path, stage), _weights(trained, stage))
    export(recipe, tmp_path / "model")


def test_export_writes_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    export(_recipe(trained), tmp_path / "model")
    model = load_model(tmp_path / "model", dtype="float32")
    tower = _weights(trained, "vision")["visual.patch_embed.weight"]
    rounded = tower.to(torch.bfloat16).float()
    torch.testing.assert_close(model.visual.patch_embed.weight, rounded, rtol=0, atol=0)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model", CHAT)
    assert len(tokenizer) == model.config.language.vocab_size
    assert model.config.perception == recipe.perception_fields()
    assert model.config.perception["strategy"] == "append"


def test_the_baseline_sees_more_frames_in_one_round(trained: Path, tmp_path: Path) -> None:
    for stage in ("vision", "sketch"):
        (tmp_path / f"{stage}.pt").write_bytes((trained / f"{stage}.pt").read_bytes())
    wide = replace(_recipe(tmp_path), wide=3, batch_tokens=2100)
    run_language(wide, steps=1)
    export(wide, tmp_path / "model")
    config = load_model(tmp_path / "model", dtype="float32").config
    assert (config.perception["max_rounds"], config.perception["max_frames"]) == (1, 72)
    with np.load(tmp_path / "bank_wide3.npz") as bank:
        features = [bank[name] for name in bank.files if name.startswith("arr_")]
    assert len(features) == 3 and all(22 <= len(f) <= 36 for f in features)  # pairs of 15 to 24 s


def test_the_log_says_the_wall_time_of_all_runs(tmp_path: Path) -> None:
    run_sketch(_recipe(tmp_path), steps=2, stop_after=1)
    state = torch.load(tmp_path / "sketch.pt", weights_only=True)
    torch.save({**state, "elapsed": 100.0}, tmp_path / "sketch.pt")
    run_sketch(_recipe(tmp_path), steps=2)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["elapsed_seconds"] > 100


def test_the_last_stage_needs_the_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="run the stage vision first"):
        run_language(_recipe(tmp_path), steps=1)


def test_questions_of_the_last_stage_make_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtts_rt.data.needle.DURATION_SECONDS", (15.0, 15.0))
    monkeypatch.setattr("vtts_rt.data.needle.write_clip", lambda path, *_: path.write_bytes(b"x"))
    manifest = write_questions(_recipe(tmp_path), 3)
    ((name, rows),) = ((s.name, list(s.rows())) for s in read_manifest(manifest))
    assert name == "needle_graded" and len({media for media, _ in rows}) == len(rows) == 3
    assert all(media.is_file() and row.answer and row.spans and row.boxes for media, row in rows)
    config = (Path(command.__file__).parent / "grpo.yaml").read_text()
    assert f"manifest: runs/tiny/{manifest.relative_to(tmp_path)}" in config


def test_the_ablation_differs_in_its_rewards_alone() -> None:
    folder = Path(command.__file__).parent
    full, ablation = (
        yaml.safe_load((folder / name).read_text()) for name in ("grpo.yaml", "grpo_answer.yaml")
    )
    assert ablation == {**full, "rewards": {"answer": 1.0}, "output": full["output"] + "_answer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be >= 1"),
        (["--clips", "2"], "clips must be >= 16"),
        (["--steps", "5"], "stage must be one stage when steps are given"),
        (["--wide", "0"], "wide must be in 1..8"),
        (["--threads", "0"], "threads must be >= 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(["tiny", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_the_command_runs_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(command._RUNS, "sketch", lambda *args: seen.append(args))
    status = command.main(
        ["tiny", str(tmp_path), "--stage", "sketch", "--steps", "4", "--seed", "9"]
    )
    assert status == 0
    recipe, steps, stop_after = seen[0]
    assert (recipe.seed, recipe.folder, steps, stop_after) == (9, tmp_path, 4, None)
