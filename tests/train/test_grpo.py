"""GRPO by TRL: twenty steps in small, and what a run must keep to."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim
import yaml

from vtts_rt.data.rows import DataSet, Row, write_manifest, write_rows
from vtts_rt.models.checkpoint import load_extras, resolve_model
from vtts_rt.types import TimeSpan

torchvision_shim.install()
from vtts_rt import EngineConfig, Runtime  # noqa: E402
from vtts_rt.models.registry import load_model  # noqa: E402
from vtts_rt.ops import native  # noqa: E402
from vtts_rt.rollout.rows import RolloutRow  # noqa: E402
from vtts_rt.train import groups, grpo  # noqa: E402
from vtts_rt.train import trl as trainer_file  # noqa: E402
from vtts_rt.train.groups import Example, ScoredGroup, examples_of  # noqa: E402
from vtts_rt.train.grpo import GrpoRecipe, read_examples, run, trainer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PATTERNS = ["red green / blue yellow", "blue red / green yellow", "green red / yellow blue"]
SIZE, STEPS, SAVED = 4, 20, 16


@pytest.fixture(scope="module")
def manifest(clips: list[Path]) -> Path:
    """Six questions about two clips."""
    folder = clips[0].parent
    rows = [
        Row(
            media=clip.name,
            question=f"Which pattern is on the {colour} card?",
            options=tuple(PATTERNS),
            answer="ABC"[number],
            spans=(TimeSpan(2.0 * number, 2.0 * number + 3.0),),
        )
        for clip in clips
        for number, colour in enumerate(("red", "green", "blue"))
    ]
    write_rows(folder / "rows.json", rows)
    sets = [DataSet("cards", "video", "gqa", Path(), Path("rows.json"))]
    write_manifest(folder / "manifest.json", sets)
    return folder / "manifest.json"


def recipe(manifest: Path, output: Path, /, **more: Any) -> GrpoRecipe:
    grpo = {
        "num_generations": SIZE,
        "per_device_train_batch_size": SIZE,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        **more.pop("grpo", {}),
    }
    given: dict[str, Any] = {
        "rewards": {"answer": 1.0, "clue_spans": 1.0, "format": 0.5},
        "perception": {"max_rounds": 2, "max_frames": 8},
        "max_tokens": 40,
        **more,
    }
    return GrpoRecipe(manifest=manifest, output=output, grpo=grpo, **given)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.from_pretrained("tiny", engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


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


def steps_of(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in logged if "loss" in entry]


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
    wanted = {"reward", "rewards/answer/mean", "clue/span_iou_round_1", "clue/span_iou_round_2"}
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
    folder = Path(__file__).parent
    logs = {}
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        size = {"per_device_train_batch_size": 2 * SIZE // ranks}
        asked = recipe(manifest, output, grpo={**steps, **size})
        text = yaml.safe_dump(
            {f.name: getattr(asked, f.name) for f in fields(asked)}
            | {"manifest": str(manifest), "output": str(output)}
        )
        (tmp_path / "grpo.yaml").write_text(text)
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        done = subprocess.run(
            [sys.executable, *command, str(folder / "rank.py"), str(tmp_path / "grpo.yaml")],
            capture_output=True,
            text=True,
            timeout=240,
        )
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


def test_the_last_round_of_fresh_prompts_and_a_member_that_failed(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = runtime.rollouts

    def one_failed(*args: Any, **options: Any) -> Any:
        group = rollouts(*args, **options)
        return replace(group, members=(RuntimeError("lost"), *group.members[1:]))

    monkeypatch.setattr(runtime, "rollouts", one_failed)
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
    assert all(row is None or row.round == 1 for row in trainer._generation.rows)
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


# -- the contract with TRL ------------------------------------------------------------------------


def test_trl_is_the_one_that_this_was_written_for() -> None:
    import trl

    assert trl.__version__ == trainer_file.TRL_VERSION
    changed = [
        name
        for name, digits in trainer_file.HOOKS.items()
        if not hashlib.sha256(inspect.getsource(getattr(trl.GRPOTrainer, name)).encode())
        .hexdigest()
        .startswith(digits)
    ]
    assert not changed, f"read these again, then renew their hashes: {changed}"


def test_another_trl_is_refused(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(RuntimeError, match="trl 1.16.0 is needed, got 1.17.0"):
        trainer_of(recipe(manifest, tmp_path), runtime, read_examples(manifest))


# -- bad input ----------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"grpo": {"num_generations": 1}}, "num_generations must be >= 2"),
    ({"grpo": {"temperature": 0.0}}, "temperature must be > 0"),
    ({"grpo": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}}, "is split"),
    ({"grpo": {"top_p": 0.9}}, "top_p must be left out"),
    ({"grpo": {"top_k": 50}}, "top_k must be left out"),
    ({"grpo": {"repetition_penalty": 1.1}}, "repetition_penalty must be left out"),
    ({"grpo": {"generation_kwargs": {"min_p": 0.1}}}, "generation_kwargs must be left out"),
    ({"grpo": {"use_vllm": True}}, "use_vllm must be left out"),
    ({"grpo": {"num_iterations": 2, "save_steps": 3}}, "save_steps must be a multiple of 2"),
    ({"grpo": {"gradient_accumulation_steps": 8}}, "rows must be at least 8"),
    ({"grpo": {"no_such": 1}}, "of fields of GRPOConfig, got ['no_such']"),
    ({"perception": {"no_such": 1}}, "of fields of PerceptionConfig"),
    ({"perception": {"strategy": "official"}}, "max_rounds must be 1 with strategy official"),
    ({"train_round": "last"}, "train_round must be all with strategy append"),
    ({"perception": {"constrain_clues": True}}, "constrain_clues must be False"),
    ({"rewards": {"no_such": 1.0}}, "rewards: name must be one of"),
    ({"rewards": {}}, "rewards must be at least one"),
    ({"lora": {"use_dora": True}}, "a LoraConfig without DoRA"),
    ({"lora": {"target_modules": ["qkv", "q_proj"]}}, "the tower is frozen"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_trained_is_refused(
    runtime: Runtime, manifest: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        trainer_of(recipe(manifest, tmp_path, **more), runtime, read_examples(manifest))
    told = str(error.value)
    assert message in told and "\n" not in told


BAD_FILES = [
    ("", "config must be a table"),
    ("a: [", "config must be a readable YAML file"),
    ("manifest: m.json", "output must be in the config"),
    ("manifest: m.json\noutput: o\nepochs: 3", "fields of GrpoRecipe, got ['epochs']"),
    ("manifest: m.json\noutput: o\nmax_tokens: 0", "max_tokens must be a whole number >= 1"),
    ("manifest: m.json\noutput: o", "manifest must be a file"),
    ("manifest: empty.json\noutput: o", "manifest must be one with rows"),
    ("manifest: rows.json\noutput: o", "files are missing"),
    ("manifest: good.json\noutput: o\nmodel: other", "model_type must be one of"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[m for _, m in BAD_FILES])
def test_bad_input_is_one_line(
    text: str,
    message: str,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vtts_rt.cli import main

    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("{}")
    one = Row(media="gone.mp4", question="What?")
    write_rows("gone.json", [one])
    write_manifest("rows.json", [DataSet("a", "video", "mc", Path(), Path("gone.json"))])
    folder = manifest.parent
    write_manifest("good.json", [DataSet("a", "video", "mc", folder, folder / "rows.json")])
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "llama"}')
    Path("grpo.yaml").write_text(text)
    assert main(["train", "grpo", "--config", "grpo.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


def test_numbers_of_a_configuration(tmp_path: Path) -> None:
    text = "manifest: m\noutput: o\ngrpo: {learning_rate: 1e-6, max_steps: 3}\nrewards: {answer: 1}"
    (tmp_path / "a.yaml").write_text(text)
    read = grpo.read_recipe(tmp_path / "a.yaml")
    assert read.grpo == {"learning_rate": 1e-6, "max_steps": 3} and read.rewards == {"answer": 1}


def test_examples_name_their_media(manifest: Path) -> None:
    examples = read_examples(manifest)
    assert len(examples) == 6 and isinstance(examples[0], Example)
    assert all(example.task == "gqa" and example.media.is_file() for example in examples)
