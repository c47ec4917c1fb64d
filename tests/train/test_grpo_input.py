"""GRPO by TRL: the contract with TRL, and what is refused."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from grpo_tools import recipe

from vtts_rt import Runtime
from vtts_rt.data.rows import DataSet, write_manifest, write_rows
from vtts_rt.train import grpo, settings
from vtts_rt.train import trl as trainer_file
from vtts_rt.train.groups import Example
from vtts_rt.train.grpo import read_examples, trainer_of
from vtts_rt.types import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

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


def test_every_field_of_trl_s_settings_is_used_free_or_refused() -> None:
    from transformers import TrainingArguments
    from trl import GRPOConfig

    inherited = {f.name for f in fields(TrainingArguments)}
    known = {f.name for f in fields(GRPOConfig)}
    refused = {*settings.NOT_REPLAYED, *settings.NOT_OURS}
    kinds = [set(settings.USED), set(settings.FREE), refused - inherited]
    assert Counter(name for kind in kinds for name in kind) == Counter(known - inherited)
    assert refused <= known
    assert {name for name in known - inherited if grpo._FREE.fullmatch(name)} == set(settings.FREE)


def test_settings_without_an_effect_are_refused(runtime: Runtime, tmp_path: Path) -> None:
    from trl import GRPOConfig

    looks = runtime.perception(None)
    args = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, num_generations=2)
    rest = (looks, SamplingParams(), "all", None, 8)
    settings.check_settings(args, *rest)
    for name in (*settings.NOT_REPLAYED, *settings.NOT_OURS, *settings.NOT_RESUMED):
        kept = getattr(args, name)
        setattr(args, name, not kept if isinstance(kept, bool) else "other")
        with pytest.raises(ValueError, match=f"^train grpo: {name} must be left out"):
            settings.check_settings(args, *rest)
        setattr(args, name, kept)
    settings.check_settings(args, *rest)


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
    ({"grpo": {"chat_template_kwargs": {"a": 1}}}, "chat_template_kwargs must be left out: it has"),
    ({"grpo": {"num_iterations": 2, "save_steps": 3}}, "save_steps must be a multiple of 2"),
    ({"grpo": {"gradient_accumulation_steps": 8}}, "rows must be at least 8"),
    ({"grpo": {"no_such": 1}}, "of fields of GRPOConfig, got ['no_such']"),
    ({"perception": {"no_such": 1}}, "of fields of PerceptionConfig"),
    ({"perception": {"strategy": "official"}}, "max_rounds must be 1 with strategy official"),
    ({"train_round": "last"}, "train_round must be all with strategy append"),
    ({"perception": {"constrain_clues": True}}, "constrain_clues must be False"),
    ({"rewards": {"no_such": 1.0}}, "rewards: name must be one of"),
    ({"rewards": {}}, "rewards must be at least one"),
    ({"rewards": {"answer": math.nan}}, "weight of 'answer' must be a finite number"),
    ({"rewards": {"answer": True}}, "rewards must be a table of names and weights"),
    ({"rewards": {"clue_boxes": 1.0}}, "which reward 'clue_boxes' compares with"),
    ({"grpo": {"learning_rate": "fast"}}, "learning_rate must be a finite number"),
    ({"grpo": {"max_steps": "ten"}}, "max_steps must be a finite number"),
    ({"grpo": {"temperature": None}}, "temperature must be > 0"),
    ({"grpo": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size must be >= 1"),
    ({"grpo": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps must be >= 1"),
    ({"grpo": {"num_iterations": 0}}, "num_iterations must be >= 1"),
    ({"grpo": {"fp16": True}}, "fp16 must be left out"),
    ({"grpo": {"output_dir": "x"}}, "output_dir must be left out: output of the config says it"),
    ({"grpo": {"reward_weights": [1.0]}}, "reward_weights must be left out: rewards of the"),
    ({"grpo": {"max_completion_length": 64}}, "left out: max_tokens of the config says it"),
    ({"lora": {"use_dora": True}}, "a LoraConfig without DoRA"),
    ({"lora": {"lora_dropout": 0.1}}, "['lora_dropout']"),
    ({"lora": {"bias": "all"}}, "['bias']"),
    ({"lora": {"lora_bias": True}}, "['lora_bias']"),
    ({"lora": {"modules_to_save": ["norm"]}}, "['modules_to_save']"),
    ({"lora": {"init_lora_weights": "pissa"}}, "init_lora_weights must be true, false or gaussian"),
    ({"lora": {"r": "x"}}, "r must be a finite number"),
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
    folder = manifest.parent
    write_manifest("good.json", [DataSet("a", "video", "mc", folder, folder / "rows.json")])
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "llama"}')
    Path("grpo.yaml").write_text(text)
    assert main(["train", "grpo", "--config", "grpo.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err, err


def test_bad_rows_are_told_and_skipped_only_where_asked(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vtts_rt.cli import main

    monkeypatch.chdir(tmp_path)
    (good, *_), folder = read_examples(manifest), manifest.parent
    Path("text.mp4").write_text("this is no video")
    rows = [replace(good.row, media=str(folder / good.row.media)), replace(good.row, media="no")]
    rows += [replace(good.row, media="text.mp4"), replace(rows[0], spans=())]
    rows += [replace(rows[0], spans=(), pixel_boxes=((9e3, 9e3, 9e4, 9e4),))]
    write_rows("rows.json", rows)
    write_manifest("m.json", [DataSet("a", "video", "gqa", Path(), Path("rows.json"))])
    recipe = "manifest: m.json\noutput: o\nrewards: {clue_holds: 1}\ngrpo: {num_generations: 1}"
    Path("grpo.yaml").write_text(recipe)
    assert main(["train", "grpo", "--config", "grpo.yaml"]) == 2
    *told, last = capsys.readouterr().err.splitlines()
    wanted = [
        "row 2: row: media must be a file that can be opened: ",
        "row 3: row: media must be a file that can be opened: ",
        "row 4: row: row must be one with spans or boxes, which reward 'clue_holds' compares with",
        "row 5: Row: box must be inside",
    ]
    for line, start in zip(told, wanted, strict=True):
        assert line.startswith(f"rows.json, {start}")
    assert last == "vtts-rt train grpo: 4 bad (--skip-bad leaves them out)"
    assert read_examples("m.json", "skip", {"clue_holds": 1.0}) == [good._replace(row=rows[0])]
    assert "4 of 5 skipped: rows.json, row 2: " in caplog.text
    assert main(["train", "grpo", "--config", "grpo.yaml", "--skip-bad"]) == 2
    assert "num_generations must be >= 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rewards: name must be one of"):
        read_examples("m.json", "skip", {"no_such": 1.0})
    with pytest.raises(ValueError, match="weight of 'answer' must be a finite number"):
        read_examples("m.json", "skip", {"answer": math.nan})


def test_numbers_of_a_configuration(tmp_path: Path) -> None:
    text = "manifest: m\noutput: o\ngrpo: {learning_rate: 1e-6, max_steps: 3}\nrewards: {answer: 1}"
    (tmp_path / "a.yaml").write_text(text)
    read = grpo.read_recipe(tmp_path / "a.yaml")
    assert read.grpo == {"learning_rate": 1e-6, "max_steps": 3} and read.rewards == {"answer": 1}


def test_examples_name_their_media(manifest: Path) -> None:
    examples = read_examples(manifest)
    assert len(examples) == 6 and isinstance(examples[0], Example)
    assert all(example.task == "gqa" and example.media.is_file() for example in examples)
