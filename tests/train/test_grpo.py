"""GRPO by TRL: twenty steps in small, and what a run must keep to."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from grpo_tools import PATTERNS, SIZE, recipe, steps_of
from transformers.trainer_utils import get_last_checkpoint

from vtts_rt import Runtime
from vtts_rt.models.checkpoint import load_extras, resolve_model
from vtts_rt.models.registry import load_model
from vtts_rt.ops import native
from vtts_rt.perception.clue import Clue
from vtts_rt.rollout.reward_input import RewardInput
from vtts_rt.rollout.rewards import PUBLISHED, score
from vtts_rt.rollout.rows import RolloutRow
from vtts_rt.train import groups
from vtts_rt.train import trl as trainer_file
from vtts_rt.train.groups import ScoredGroup, examples_of
from vtts_rt.train.grpo import SETTINGS_FILE, GrpoRecipe, read_examples, run, trainer_of
from vtts_rt.train.weights import put_in_place
from vtts_rt.types import TimeSpan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS, SAVED = 20, 16


# -- twenty steps -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GrpoRecipe, list[dict[str, Any]], list[ScoredGroup], int]:
    """A run, what it logged, its groups, and how many videos it opened."""
    output = tmp_path_factory.mktemp("run")
    steps = {"num_iterations": 2, "max_steps": STEPS, "save_steps": SAVED, "beta": 0.05}
    asked = recipe(manifest, output, grpo=steps)
    seen: list[ScoredGroup] = []
    opened: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        roll_out, open_video = groups.roll_out, prepare().open_video
        patch.setattr(
            trainer_file, "roll_out", lambda *a, **k: seen.append(roll_out(*a, **k)) or seen[-1]
        )
        patch.setattr(
            prepare(), "open_video", lambda *a, **k: opened.append(a[0]) or open_video(*a, **k)
        )
        logged = run(asked)
    return asked, logged, seen, sum(isinstance(video, Path) for video in opened)


def prepare() -> Any:
    import vtts_rt.rounds.prepare

    return vtts_rt.rounds.prepare


def test_losses_are_finite_and_ratios_one_on_fresh_weights(trained: Any) -> None:
    steps = steps_of(trained[1])
    assert len(steps) == STEPS
    for entry in steps:
        assert all(math.isfinite(entry[name]) for name in ("loss", "grad_norm", "entropy", "kl"))
    fresh = [entry for entry in steps if "seconds/rollout" in entry]
    assert len(fresh) == STEPS / 2
    for entry in fresh:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        for end in ("min", "max"):
            ratio = entry[f"sampling/importance_sampling_ratio/{end}"]
            assert ratio == pytest.approx(1.0, abs=1e-4 * 80)  # of a sequence of some 80 tokens
    assert any(entry["grad_norm"] > 0.0 for entry in steps)
    assert steps[-1]["kl"] > 0.0
    wanted = {"reward", "rewards/answer/mean", "clue/span_iou@0", "clue/span_iou@1"}
    wanted |= {"completions/mean_length", "seconds/step", "seconds/weights", "seconds/scores"}
    assert wanted <= fresh[0].keys()


def test_a_group_opens_decodes_encodes_and_prefills_once(trained: Any) -> None:
    _, _, seen, opened = trained
    assert len(seen) == opened == STEPS / 2
    shown: set[Any] = set()
    for scored in seen:
        answers, counts = scored.group.answers, scored.metrics()
        assert len(answers) == SIZE
        new = scored.features.keys() - shown
        frames = {(key.split(":")[0], f) for key in new for f in key.split(":")[1].split(",")}
        assert counts["group/pairs_encoded"] == len(new)
        assert counts["group/frames_decoded"] <= len(frames)
        shown |= new
        first = [answer.rounds[0].reuse for answer in answers]
        prompt = answers[0].rounds[0].prompt_tokens
        # A member of its own prefills what it ends on: the last token of the shared prompt.
        assert sum(reuse.tokens_prefilled for reuse in first) <= prompt + SIZE - 1


def test_a_run_that_goes_on_gives_the_numbers_of_one_that_never_ended(
    trained: Any, tmp_path: Path
) -> None:
    """From a checkpoint of the second epoch, in place of the later ones."""
    asked, logged, _, _ = trained
    shutil.copytree(Path(asked.output) / f"checkpoint-{SAVED}", tmp_path / f"checkpoint-{SAVED}")
    again = run(replace(asked, output=tmp_path))
    timed = ("seconds", "step_time", "train_")
    for one, other in zip(steps_of(logged), steps_of(again), strict=True):
        kept = {name: value for name, value in one.items() if not name.startswith(timed)}
        same = {name: other[name] for name in kept}
        shared = {n: v for n, v in kept.items() if not n.startswith(("group/", "epoch"))}
        assert shared == {n: same[n] for n in shared}
    models = [load_model(Path(folder) / "model") for folder in (asked.output, tmp_path)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    folders = set(tmp_path.glob("checkpoint-*"))
    finished = run(replace(asked, output=tmp_path))  # it has had all of its steps
    assert steps_of(finished) == steps_of(again)
    assert set(tmp_path.glob("checkpoint-*")) == folders
    for a, b in zip(models[1].parameters(), load_model(tmp_path / "model").parameters(), strict=True):  # fmt: skip  # noqa: E501
        assert torch.equal(a, b)
    texts = [(Path(f) / SETTINGS_FILE).read_text() for f in (asked.output, tmp_path)]
    assert texts[0] == texts[1] != ""  # a folder of an earlier version has none at first
    with pytest.raises(
        ValueError, match=f"max_tokens must be 40, that of .*{tmp_path.name}, got 41"
    ):
        run(replace(asked, output=tmp_path, max_tokens=41))


def test_a_checkpoint_is_one_of_ours_and_of_transformers(trained: Any, manifest: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folder = Path(trained[0].output) / f"checkpoint-{STEPS}"
    assert load_extras(folder) == load_extras(resolve_model("tiny")) != {}
    ours = load_model(folder)
    theirs = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)
    state = ours.export(torch.float32)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, state[name]), name
    tiny = load_model("tiny").export(torch.float32)
    changed = {name for name in state if not torch.equal(state[name], tiny[name])}
    assert changed and not [name for name in changed if "visual" in name]
    media = read_examples(manifest)[0].media
    with Runtime.from_pretrained(folder) as runtime:
        answer = runtime.ask(media, "Which pattern is on the red card?", options=PATTERNS)
    assert answer.strategy == "append"
    assert not (Path(trained[0].output) / "incomplete").exists()
    assert list(Path(trained[0].output).glob("runs/*/events.*")) or list(
        Path(trained[0].output).rglob("events.*")
    )


# -- other ways to train ------------------------------------------------------------------------


def test_lora_with_accumulated_gradients(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    grpo = {"gradient_accumulation_steps": 2, "max_steps": 2, "beta": 0.1}
    more = {"save_steps": 2, "gradient_checkpointing": True}
    asked = recipe(manifest, tmp_path, lora={"r": 4, "init_lora_weights": False}, grpo=grpo | more)
    before = {n: t.clone() for n, t in runtime.engine.model.export(torch.float32).items()}
    trainer = trainer_of(asked, runtime, read_examples(manifest))
    trainer.train()
    for entry in steps_of(trainer.state.log_history):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    trainer.sync_weights()
    ours = {n: t.clone() for n, t in runtime.engine.model.export(torch.float32).items()}
    runtime.update_weights(before)
    folder = tmp_path / "checkpoint-2"
    merged = load_model(folder).export(torch.float32)
    moved = 0
    for name, tensor in merged.items():
        assert torch.allclose(tensor, ours[name], atol=1e-6), name
        moved += not torch.equal(tensor, before[name])
    assert moved == 4 * 7  # layers, and linear maps of each
    theirs = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32)
    assert any(".lora_A" in name for name, _ in theirs.named_parameters())


def test_groups_that_roll_out_together_are_reproducible(
    runtime: Runtime, manifest: Path, tmp_path: Path
) -> None:
    if native.supports("cpu") is not None:
        pytest.skip("torch sums a row as its batch has it")
    before = {n: t.clone() for n, t in runtime.engine.model.export(torch.float32).items()}
    steps = {"per_device_train_batch_size": 2 * SIZE, "max_steps": 2, "save_strategy": "no"}
    losses = []
    for _ in range(2):
        trainer = trainer_of(
            recipe(manifest, tmp_path, grpo=steps), runtime, read_examples(manifest)
        )
        trainer.train()
        logged = steps_of(trainer.state.log_history)
        losses.append([(entry["loss"], entry["grad_norm"], entry["reward"]) for entry in logged])
        runtime.update_weights(before)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_train_as_one(manifest: Path, tmp_path: Path) -> None:
    """Of two groups a step each holds one; SGD, as AdamW's first steps have the size of the rate
    however small a difference of gradients is."""
    steps = {"max_steps": 2, "save_steps": 1, "optim": "sgd", "learning_rate": 0.1, "beta": 0.1}
    logs = {}
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        size = {"per_device_train_batch_size": 2 * SIZE // ranks}
        done = run_ranks(recipe(manifest, output, grpo={**steps, **size}), ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((output / "checkpoint-2/trainer_state.json").read_text())
        logs[ranks] = steps_of(state["log_history"])
    for one, two in zip(logs[1], logs[2], strict=True):
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert two["sampling/sampling_logp_difference/max"] < 1e-4
        assert one["group/pairs_encoded"] == two["group/pairs_encoded"]
    models = [load_model(tmp_path / f"{ranks}/checkpoint-2") for ranks in (1, 2)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_lost", [SIZE - 1, SIZE])
def test_a_process_that_loses_its_group(manifest: Path, tmp_path: Path, num_lost: int) -> None:
    """One member that is left has no advantage; where none is, all processes end."""
    done = run_ranks(
        recipe(manifest, tmp_path, grpo={"max_steps": 1, "save_steps": 1}), 2, num_lost
    )
    kept = tmp_path / "checkpoint-1"
    if num_lost == SIZE:
        assert done.returncode != 0 and not kept.exists()
        assert re.search(
            r"RuntimeError: train grpo: no rollout of .*\.mp4 ended: lost", done.stderr
        )
        return
    assert done.returncode == 0, done.stderr[-3000:]
    (entry,) = steps_of(json.loads((kept / "trainer_state.json").read_text())["log_history"])
    assert entry["group/failed"] == num_lost / 2 and math.isfinite(entry["loss"])


def run_ranks(asked: GrpoRecipe, ranks: int, num_lost: int = 0) -> subprocess.CompletedProcess[str]:
    """A run of several processes; num_lost: members of each group of the last one that fail."""
    said = {f.name: getattr(asked, f.name) for f in fields(asked)}
    said |= {"manifest": str(asked.manifest), "output": str(asked.output)}
    config = Path(asked.output).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(said))
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    script = str(Path(__file__).parent / "rank.py")
    return subprocess.run(
        [sys.executable, *command, script, str(config), str(num_lost)],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_last_round_of_fresh_prompts_and_a_member_that_failed(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, seen = runtime.rollouts, list[Any]()

    def one_failed_and_one_was_cut(*args: Any, **options: Any) -> Any:
        group = rollouts(*args, **options)
        _, cut, *others = group.members
        *before, last = cut.rounds
        silent = replace(last.transcript, generated=np.zeros_like(last.transcript.generated))
        last = replace(last, transcript=silent, token_ids=[], text="", answer=None, clue=Clue())
        cut = replace(cut, rounds=[*before, last])
        seen.append((cut, replace(cut, rounds=before)))
        return replace(group, members=(RuntimeError("lost"), cut, *others))

    monkeypatch.setattr(runtime, "rollouts", one_failed_and_one_was_cut)
    before = {n: t.clone() for n, t in runtime.engine.model.export(torch.float32).items()}
    perception = {"strategy": "refresh", "max_rounds": 2, "max_frames": 8}
    asked = recipe(
        *(manifest, tmp_path),
        perception=perception,
        train_round="last",
        rewards=None,
        grpo={"max_steps": 1, "save_strategy": "no"},
    )
    trainer = trainer_of(asked, runtime, read_examples(manifest))
    trainer.train()
    entry = steps_of(trainer.state.log_history)[0]
    assert entry["group/failed"] == 1.0 and math.isfinite(entry["loss"])
    assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    assert {"rewards/letter/mean", "rewards/iou_glue/mean", "rewards/format_gqa/mean"} <= set(entry)
    rounds = [row and row.round for row in trainer._generation.rows]
    assert rounds == [None, 0, 1, 1]
    # Its reward is that of the round that is trained.
    row, names = trainer.examples[trainer._asked[0]].row, list(trainer.reward_func_names)
    (cut, before_it), parts = seen[0], trainer._logs["rewards"]
    told = {name: parts[name][1] for name in names if name in PUBLISHED["gqa"]}
    judged = (score(RewardInput.of_answer(a, row), dict.fromkeys(told, 1.0)) for a in (cut, before_it))  # fmt: skip  # noqa: E501
    assert [pytest.approx(told), pytest.approx(told)] == [found.parts for found in judged]
    assert trainer.max_completion_length == 40  # of one round
    runtime.update_weights(before)


def test_what_is_not_finite_stops_with_the_batch_saved(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(manifest, tmp_path, grpo={"max_steps": 1, "save_strategy": "no"})
    trainer = trainer_of(asked, runtime, read_examples(manifest))
    scores = trainer_file.tree_logprobs

    def broken(*args: Any, **options: Any) -> Any:
        found = scores(*args, **options)
        return found._replace(logprobs=found.logprobs * math.nan)

    monkeypatch.setattr(trainer_file, "tree_logprobs", broken)
    with pytest.raises(RuntimeError, match="of step 1 is not finite; the batch is in"):
        trainer.train()
    kept = torch.load(tmp_path / "nan-step-1-rank-0.pt", weights_only=True)
    rows = [RolloutRow.from_dict(row) for row in kept["rows"]]
    assert len(rows) == SIZE == len(kept["inputs"]["advantages"])
    assert rows[0].mask.any()


def test_a_checkpoint_that_was_not_finished_is_none(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(trainer_file, "complete_checkpoint", killed)
    before = {n: t.clone() for n, t in runtime.engine.model.export(torch.float32).items()}
    asked = recipe(manifest, tmp_path, grpo={"max_steps": 1, "save_steps": 1})
    trainer = trainer_of(asked, runtime, read_examples(manifest))
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert any((tmp_path / "incomplete/checkpoint-1").iterdir())
    assert get_last_checkpoint(str(tmp_path)) is None
    monkeypatch.undo()
    trainer = trainer_of(asked, runtime, read_examples(manifest))
    trainer.train()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / "incomplete").exists()
    runtime.update_weights(before)


def test_inside_a_generation_there_is_no_checkpoint(
    runtime: Runtime, manifest: Path, tmp_path: Path
) -> None:
    """As of the last of an odd number of steps, from which a longer run could not go on exactly."""
    steps = {"num_iterations": 2, "max_steps": 3, "save_steps": 2}
    trainer = trainer_of(recipe(manifest, tmp_path, grpo=steps), runtime, read_examples(manifest))
    for done, folders in ((1, []), (2, ["checkpoint-2"]), (3, ["checkpoint-2"])):
        trainer._step = trainer.state.global_step = done
        trainer.create_optimizer_and_scheduler(3)
        trainer._save_checkpoint(trainer.model, None)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == folders


@pytest.mark.parametrize("kill_at", range(7))
def test_a_checkpoint_of_the_step_is_whole_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """Killed before any of its steps, and once more."""
    for _ in range(2):
        made = tmp_path / "incomplete" / "checkpoint-12"
        made.mkdir(parents=True)
        for folder in (made, tmp_path / "checkpoint-12")[: 1 + (not any(tmp_path.glob("ch*")))]:
            folder.mkdir(exist_ok=True)
            for name in ("weights", "state"):
                (folder / name).write_text("whole")
        steps = iter(range(7))

        def dies(step: Any, steps: Any = steps) -> Any:
            def counted(*args: Any) -> Any:
                if next(steps) == kill_at:
                    raise KeyboardInterrupt
                return step(*args)

            return counted

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "rename", dies(Path.rename))
            patch.setattr(shutil, "rmtree", dies(shutil.rmtree))
            put_in_place(made, tmp_path)
            assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]
        last = get_last_checkpoint(str(tmp_path))
        assert last is not None and len(list(Path(last).iterdir())) == 2
        for path in tmp_path.glob("checkpoint-*"):
            assert len(list(path.iterdir())) == 2
        shutil.rmtree(tmp_path / "incomplete", ignore_errors=True)


def test_rows_of_a_dataset_that_fills_fields_with_none(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"video": "a.mp4", "question": "What?", "answer": "A", "options": ["x"], "glue": None},
        {"video": "b.mp4", "question": "When?", "glue": [[1.0, 2.0]]},
    ]
    made = examples_of(datasets.Dataset.from_list(rows), tmp_path, "gqa")
    assert [example.media for example in made] == [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    assert made[0].row.spans == () and made[1].row.answer is None
    assert made[1].row.spans == (TimeSpan(1.0, 2.0),)
