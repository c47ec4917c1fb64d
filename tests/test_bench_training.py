"""The bench of training, with fake evaluations: what is compared with what, and what is shown."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bench_training as bench
import pytest
from report.results import Result
from report.training import TABLES

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

    monkeypatch.setattr(bench, "evaluate", evaluate)


def _measure(tmp_path: Path, **options: Any) -> dict[str, Any]:
    evaluation = bench.Evaluation(tmp_path, 7, 40, lambda folder: nullcontext(int(folder)))
    given = {"models": {"sft": "3", "grpo": "2"}, "wide": {3: "4"}, "strategies": "grpo"}
    return bench.measure(evaluation, **{**given, **options}, max_rounds=5)


def test_models_are_compared_on_the_same_clips(tmp_path: Path) -> None:
    found = _measure(tmp_path)
    sides = ("less", "rounds_less", "more", "rounds_more")
    gains = {tuple(c[s] for s in sides): c for c in found["comparisons"]}
    assert gains["sft", 2, "grpo", 2]["difference"] == 0.5
    assert gains["sft", 3, "grpo", 3]["difference"] == 0.5
    assert gains["3 times the frames", 1, "sft", 3]["difference"] == 0.5
    assert gains["3 times the frames", 1, "grpo", 3]["difference"] == 1.0
    assert all(c["num"] == 40 and c["low"] <= c["difference"] for c in gains.values())
    assert list(found["strategies"]) == list(STRATEGIES)
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {
        "sft", "grpo", "wide3", *(f"grpo_{s}" for s in STRATEGIES)
    }  # fmt: skip
    assert _measure(tmp_path) == found


def test_tables_show_all_of_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": s, "reward": s / 100}) + "\n" for s in range(1, 51)))
    about = {"num": 40, "seed": 7, "split": "held_out", "dtype": "float32"}
    data = {**about, **_measure(tmp_path), "curves": {"GRPO": bench.curve(log, ["reward"])}}
    result = Result(tmp_path / "x.json", "training", "cpu", "202611", data)
    texts = {name: render(result) for name, (_, render) in TABLES.items()}
    assert "| sft, 3 | 50.0 (35.2–64.8) | 0.50 | 0.25 | 270 | 30 |" in texts["training"]
    assert "| grpo | 1 to 2 | +50.0 (+34.3 to +65.7) |" in texts["training"]
    assert "| sft, twin (20) | 0.0 | 0.0 | 0.0 | 100.0 | 100.0 |" in texts["training"]
    compared = texts["training-compared"]
    assert "| grpo, 3 rounds against 3 times the frames, 1 round | +100.0" in compared
    assert "| one round, 3 times the frames | 0.0" in compared
    assert "| `official`, 2 | 50.0" in texts["training-strategies"]
    curve = texts["training-curves"].splitlines()
    assert len(curve) == 2 + bench.POINTS and curve[-1] == "| 50 | 0.500 |"


def test_curves_are_read_from_the_trainer_too(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    history = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75, "kl": 0.1}, {"step": 3}]
    path.write_text(json.dumps({"log_history": history}))
    assert bench.curve(path, ["reward", "kl"]) == history[:2]
    with pytest.raises(ValueError, match="keys that the log has"):
        bench.curve(path, ["loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model must be given at least once"),
        (["--model", "sft"], "model must be as NAME=PATH"),
        (["--model", "sft=x", "--wide", "w=x"], "wide must be as K=FOLDER"),
        (["--model", "sft=x", "--strategies", "grpo"], "strategies must be the name of a model"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["--work", str(tmp_path), *arguments])
