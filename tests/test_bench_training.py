"""The bench of training, with fake evaluations: what is compared with what, and what is shown."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bench_training
import pytest
from report.results import load_results
from report.training import TABLES

from vtts_rt import bench
from vtts_rt.config import STRATEGIES
from vtts_rt.evaluation.records import Records, summarise


@pytest.fixture(autouse=True)
def _answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of "skill" s is right from round s on in every other clip, always from s + 1 on."""

    def evaluate(skill: int, **given: Any) -> dict[str, Any]:
        records = Records(given["out"], {"strategy": given["perception"].strategy})
        for seed in range(given["seed"], given["seed"] + given["num"]):
            if seed in records.seeds:
                continue
            looks = [
                {"rounds": k, "right": k >= skill + seed % 2, "span_iou": 0.5, "box_iou": 0.25}
                | {"visual_tokens": 90 * k, "ms": 10.0 * k}
                for k in given["rounds"]
            ]
            records.add({"seed": seed, "level": ("far", "twin")[seed % 2], "rounds": looks})
        return {"num": given["num"], **summarise(records.all)}

    monkeypatch.setattr(bench_training, "evaluate", evaluate)


MODELS = {"sft": "3", "answer": "2", "grpo": "1"}


def _compared(tmp_path: Path) -> dict[str, Any]:
    evaluation = bench_training.Evaluation(tmp_path, 7, 40, lambda f: nullcontext(int(f)))
    return bench_training.compared(evaluation, MODELS, {3: "4"}, "grpo", max_rounds=5)


def test_models_are_compared_on_the_same_clips(tmp_path: Path) -> None:
    found = _compared(tmp_path)
    sides = ("less", "rounds_less", "more", "rounds_more")
    gains = {tuple(c[s] for s in sides): c for c in found["comparisons"]}
    assert gains["sft", 2, "answer", 2]["difference"] == 0.5
    assert gains["sft", 3, "grpo", 3]["difference"] == 0.5
    assert gains["answer", 2, "grpo", 2]["difference"] == 0.5  # the ablation
    assert gains["3 times the frames", 1, "sft", 3]["difference"] == 0.5
    assert gains["3 times the frames", 1, "grpo", 3]["difference"] == 1.0
    assert len(gains) == 3 * 5 + 3
    assert all(c["num"] == 40 and c["low"] <= c["difference"] for c in gains.values())
    assert list(found["strategies"]) == list(STRATEGIES)
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {
        "sft", "answer", "grpo", "wide3", *(f"grpo_{s}" for s in STRATEGIES)
    }  # fmt: skip
    assert _compared(tmp_path) == found


def test_a_run_is_filed_and_its_tables_show_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = bench_training.Runtime
    monkeypatch.setattr(load, "from_pretrained", lambda folder, **_: nullcontext(int(folder)))
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": s, "reward": s / 100}) + "\n" for s in range(1, 51)))
    models = [word for pair in MODELS.items() for word in ("--model", "=".join(pair))]
    flags = ["--work", str(tmp_path / "work"), *models, "--wide", "3=4", "--strategies", "grpo"]
    flags += ["--curve", f"GRPO={log}:reward", "--seed", "7", "--num", "40", "--device", "cpu"]
    assert bench.script(bench_training, [*flags, "--result-dir", str(tmp_path)]) == 0
    (result,) = load_results(tmp_path, "training")
    texts = {n: render(result) for n, (theme, render) in TABLES.items() if theme == "training"}
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts.values())
    for name in MODELS:
        for rounds in range(1, 6):
            (line,) = re.findall(rf"^\| {name}, {rounds} \|.*$", texts["training"], re.MULTILINE)
            assert line.endswith(f" | 0.50 | 0.25 | {90 * rounds} | {10 * rounds} |")
        for step in ("1 to 2", "2 to 3", "3 to 5", "3 to 4"):
            assert re.search(
                rf"\| {name} \| {step} \| [+-]\S+ \(\S+ to \S+\) \|", texts["training"]
            )
    assert "| sft, 3 | 50.0 (35.2–64.8) |" in texts["training"]
    assert "| answer | 1 to 2 | +50.0 (+34.3 to +65.7) |" in texts["training"]
    assert "| sft, twin (20) | 0.0 | 0.0 | 0.0 | 100.0 | 100.0 |" in texts["training"]
    compared = texts["training-compared"]
    assert "| grpo, 3 rounds against sft, 3 rounds | +50.0 (" in compared
    assert "| grpo, 3 rounds against answer, 3 rounds | +0.0 (" in compared
    assert "| grpo, 3 rounds against 3 times the frames, 1 round | +100.0" in compared
    assert "| one round, 3 times the frames | 0.0" in compared
    for strategy in STRATEGIES:
        assert f"| `{strategy}`, 5 | 100.0" in texts["training-strategies"]
    curve = texts["training-curves"].splitlines()
    assert len(curve) == 2 + bench_training.POINTS and curve[-1] == "| 50 | 0.480 |"  # of 46 to 50
    assert str(tmp_path) not in json.dumps(result.data)  # of no machine


def test_curves_are_read_from_the_trainer_too(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    history = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75, "kl": 0.1}, {"step": 3}]
    path.write_text(json.dumps({"log_history": history}))
    assert bench_training.curve(path, ["reward", "kl"]) == history[:2]
    for keys in (["loss"], ["reward", "loss"]):
        with pytest.raises(ValueError, match="keys that the log has"):
            bench_training.curve(path, keys)
    folder = tmp_path / "run"
    for step in (9, 10):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        line = {"step": step, "reward": 1.0}
        text = json.dumps({"log_history": [line, {"step": step + 1, "reward": math.nan}]})
        (folder / f"checkpoint-{step}/trainer_state.json").write_text(text)
    assert bench_training._curves([f"a={folder}:reward"])["a"][0] == line


def test_stages_of_one_log_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    stages = (("sketch", 3), ("language", 2), ("language_wide3", 2))
    lines = [{"stage": s, "step": k, "loss": float(len(s))} for s, n in stages for k in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, stage in (("", "language"), ("@sketch", "sketch")):
        (found,) = bench_training._curves([f"a={path}{name}:loss"]).values()
        assert found == [{"step": k, "loss": float(len(stage))} for k in range(dict(stages)[stage])]
    with pytest.raises(ValueError, match="of a stage of sketch, language, language_wide3, got 'x'"):
        bench_training._curves([f"a={path}@x:loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model must be given at least once"),
        (["--model", "sft"], "model must be as NAME=PATH"),
        (["--model", "sft=x", "--wide", "w=x"], "wide must be as K=FOLDER"),
        (["--model", "sft=x", "--wide", "6=x"], "wide must be as K=FOLDER, K in 1..5"),
        (["--model", "sft=x", "--model", "sft=y"], "model must be of names that differ"),
        (["--model", "sft=x", "--num", "0"], "num must be >= 1"),
        (["--model", "sft=x", "--curve", "a=gone:x"], "curve must be of a log that is there"),
        (["--model", "sft=x", "--strategies", "grpo"], "strategies must be the name of a model"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.script(bench_training, ["--work", str(tmp_path), *arguments])
