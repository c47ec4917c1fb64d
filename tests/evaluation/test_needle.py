from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtts_rt.config import PerceptionConfig, ResolvedPerception
from vtts_rt.data import needle as data
from vtts_rt.data.needle import make_question, make_scene, needle_row
from vtts_rt.evaluation import needle
from vtts_rt.models.base import VideoLM
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.types import Box, Region, TimeSpan


class _Oracle:
    """Stands for a runtime: knows the truth in round 3 and says A before."""

    name = "oracle"

    def __init__(self, difficulty: needle.Difficulty = "plain", weights: str = "of tiny") -> None:
        model: Any = SimpleNamespace(version=lambda part: f"{part} {weights}")
        model.weights_hash = lambda: VideoLM.weights_hash(model)
        self.engine = SimpleNamespace(model=model)
        self.asked: list[dict[str, Any]] = []
        self.cleared = 0
        self.rows = {}
        for seed in (5, 6, 7):
            scene = make_scene(seed, "held_out", False, difficulty)
            card = seed % len(scene.cards) if difficulty == "plain" else 0
            row = needle_row(scene, make_question(scene, card), "clip")
            self.rows[row.question, row.options] = row

    def perception(self, given: PerceptionConfig | None) -> ResolvedPerception:
        return (given or PerceptionConfig(strategy="append")).resolve(GEOMETRY)

    def clear_caches(self) -> None:
        self.cleared += 1

    def ask(self, video: Path, question: str, **options: Any) -> Any:
        assert video.is_file() and video.stat().st_size > 1000
        self.asked.append({"video": video, **options})
        row = self.rows[question, options["options"]]
        rounds = options["perception"].max_rounds
        done = rounds == 3
        region = (
            Region(row.spans[0], row.boxes[0]) if done else Region(TimeSpan(0, 1), Box(0, 0, 1, 1))
        )
        segment = SimpleNamespace(num_tokens=9)
        looks = [
            SimpleNamespace(
                regions=(region,),
                plan=SimpleNamespace(segments=[segment] * 4),
                answer=row.answer if index == 2 else "A",
                text="<think>A</think><answer>Definitely A</answer>",
                timings=SimpleNamespace(total=10.0),
            )
            for index in range(rounds)
        ]
        return SimpleNamespace(rounds=looks, total_ms=10.0 * rounds)


@pytest.fixture(autouse=True)
def _short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of each clip: what is encoded does not matter here."""
    write = data.write_clip

    def short(path: Path, scene: Any, codec: str) -> None:
        fields = ("split", "seed", "height", "width", "source_fps", "footage", "cards")
        write(path, type(scene)(num_frames=12, **{n: getattr(scene, n) for n in fields}), codec)

    monkeypatch.setattr(data, "write_clip", short)


def test_evaluate_counts_by_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    oracle = _Oracle()
    result = needle.evaluate(
        oracle,  # type: ignore[arg-type]
        seed=5,
        num=3,
        rounds=(1, 3),
        footage=False,
        progress=True,
    )
    assert {k: result[k] for k in ("task", "model", "strategy", "split", "seed", "num")} == {
        "task": "needle",
        "model": "oracle",
        "strategy": "append",
        "split": "held_out",
        "seed": 5,
        "num": 3,
    }
    first, third = result["rounds"]
    assert first["rounds"] == 1 and third["rounds"] == 3
    truths = [row.answer for row in oracle.rows.values()]
    assert first["accuracy"] == pytest.approx(truths.count("A") / 3, abs=1e-4)
    assert third["accuracy"] == third["span_iou"] == third["box_iou"] == 1.0
    assert first["span_iou"] < 0.2 and first["box_iou"] < 0.2
    assert (first["visual_tokens"], third["visual_tokens"]) == (36, 108)
    assert (first["ms"], third["ms"]) == (10.0, 30.0)
    out, err = capsys.readouterr()
    assert out == "" and "100%" in err
    assert oracle.cleared == len(oracle.asked) == 6
    assert not oracle.asked[0]["video"].exists()
    json.dumps(result)


def test_one_run_can_stand_for_fewer_rounds() -> None:
    apart, at_once = _Oracle(), _Oracle()
    arguments: dict[str, Any] = {"seed": 5, "num": 3, "rounds": (1, 3), "footage": False}
    separate = needle.evaluate(apart, **arguments)  # type: ignore[arg-type]
    together = needle.evaluate(at_once, together=True, **arguments)  # type: ignore[arg-type]
    assert len(at_once.asked) == 3 and len(apart.asked) == 6
    for name in ("rounds", "accuracy", "visual_tokens", "ms"):
        assert [r[name] for r in together["rounds"]] == [r[name] for r in separate["rounds"]]


def test_records_and_clips_are_kept_and_gone_on_from(tmp_path: Path) -> None:
    oracle, out = _Oracle(), tmp_path / "run.jsonl"
    arguments: dict[str, Any] = {"seed": 5, "rounds": (1, 3), "footage": False, "together": True}
    arguments |= {"clips": tmp_path / "clips", "out": out}
    needle.evaluate(oracle, num=2, **arguments)  # type: ignore[arg-type]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "clips").iterdir()}
    assert sorted(kept) == [f"needle_held_out_plain_textures_{seed}.mp4" for seed in (5, 6)]
    result = needle.evaluate(oracle, num=3, **arguments)  # type: ignore[arg-type]
    assert len(oracle.asked) == 3 and result["num"] == 3
    assert all((tmp_path / "clips" / k).stat().st_mtime_ns == v for k, v in kept.items())
    whole = needle.evaluate(_Oracle(), num=3, **{**arguments, "out": None})  # type: ignore[arg-type]
    assert {**whole, "rounds": 0} == {**result, "rounds": 0}
    assert len(out.read_text().splitlines()) == 4
    setting = json.loads(out.read_text().splitlines()[0])
    assert setting["weights"] == "language of tiny visual of tiny"  # in any process
    trained = _Oracle(weights="of tiny, trained further")
    with pytest.raises(ValueError, match="out must be a file of the same weights"):
        needle.evaluate(trained, num=3, **arguments)  # type: ignore[arg-type]


def test_of_graded_clips_the_first_card_is_asked_about() -> None:
    oracle = _Oracle("graded")
    result = needle.evaluate(
        oracle,  # type: ignore[arg-type]
        seed=5,
        num=3,
        rounds=(3,),
        footage=False,
        difficulty="graded",
    )
    assert result["rounds"][0]["accuracy"] == 1.0 and result["difficulty"] == "graded"
    levels = [make_scene(seed, "held_out", False, "graded").cards[0].level for seed in (5, 6, 7)]
    assert list(result["levels"]) == list(dict.fromkeys(levels))


def test_the_published_letter_rule_reads_another_option() -> None:
    """ "Definitely A" is D by that rule, which reads the text of the round itself."""
    oracle = _Oracle()
    arguments: dict[str, Any] = {"seed": 5, "num": 3, "rounds": (3,), "footage": False}
    result = needle.evaluate(oracle, letter="published", **arguments)  # type: ignore[arg-type]
    assert result["letter"] == "published" and result["parity"] == "release"
    truths = [row.answer for row in oracle.rows.values()]
    assert result["rounds"][0]["accuracy"] == pytest.approx(truths.count("D") / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"letter": "strict"}, "letter must be one of lenient, published"),
        ({"num": 0}, "num must be >= 1"),
        ({"rounds": ()}, "rounds must be numbers in 1..64"),
        ({"rounds": (0,)}, "rounds must be"),
        ({"codec": "gif"}, "codec must be one of"),
        ({"split": "dev"}, "split must be one of"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"seed": 0, "num": 1, "rounds": (1,), **change}
    with pytest.raises(ValueError, match=message):
        needle.evaluate(_Oracle(), **arguments)  # type: ignore[arg-type]


def test_the_command_takes_rounds_as_a_list() -> None:
    assert needle._rounds("1,2, 3") == [1, 2, 3]
    with pytest.raises(ValueError, match="rounds must be as 1,2,3"):
        needle._rounds("1-3")
