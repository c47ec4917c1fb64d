"""What strategies keep from round to round is counted on prompts that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_strategies as strategies
import numpy as np
import pytest

from vtts_rt.config import STRATEGIES
from vtts_rt.evaluation import needle
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import load_extras, resolve_model
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates, prompts_from_dict

VIDEO = strategies._videos(20)[0]
CLUES = [(5.0, 9.0), (6.0, 8.0)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model("tiny"), CHAT)


def contexts(strategy: Any, tokenizer: Tokenizer) -> list[strategies._Context]:
    return list(strategies._contexts(strategy, VIDEO, CLUES, tokenizer, GEOMETRY))


def test_append_keeps_all_that_stood_before(tokenizer: Tokenizer) -> None:
    first, second, third = contexts("append", tokenizer)
    assert first.pairs < second.pairs < third.pairs and first.frames < second.frames
    for (frames, pairs, prefix, tokens), before, now in zip(
        strategies._shares([first, second, third]), (first, second), (second, third), strict=True
    ):
        assert frames == len(before.frames) / len(now.frames)
        assert pairs == len(before.pairs) / len(now.pairs)
        assert np.array_equal(now.tokens[: len(before.tokens)], before.tokens)
        assert before.num_prompt < len(before.tokens) < now.num_prompt
        assert (prefix, tokens) == (len(before.tokens) / now.num_prompt, now.num_prompt)


def test_grid_keeps_the_prompt_up_to_the_first_new_pair(tokenizer: Tokenizer) -> None:
    """20 cells of 1 s, 4 of them in the span: one half cell comes in at 7.5 s, one cell goes."""
    first, second, _ = contexts("grid", tokenizer)
    assert len(first.pairs) == len(second.pairs) == 20 and len(first.pairs & second.pairs) == 19
    ((_, pairs, prefix, tokens),) = strategies._shares([first, second])
    assert pairs == 0.95
    visual = np.flatnonzero(first.tokens[:, 1])
    per_pair = len(visual) // 20
    assert round(prefix * tokens) == visual[0] + 8 * per_pair


def test_official_keeps_the_text_before_the_video(tokenizer: Tokenizer) -> None:
    first, second, _ = contexts("official", tokenizer)
    ((_, pairs, prefix, tokens),) = strategies._shares([first, second])
    assert pairs < 0.1
    assert round(prefix * tokens) == np.flatnonzero(first.tokens[:, 1])[0]


def test_refresh_keeps_the_question_and_half_of_the_frames(tokenizer: Tokenizer) -> None:
    """A finer level begins its cells where the coarse one begins or halves its own."""
    first, second, _ = contexts("refresh", tokenizer)
    ((frames, pairs, prefix, tokens),) = strategies._shares([first, second])
    assert pairs == 0.0 and 0.2 < frames <= 0.5
    text = tokenizer.decode(second.tokens[: round(prefix * tokens), 0].tolist())
    assert strategies.QUESTION in text and strategies.OPTIONS[-1] in text


@pytest.mark.parametrize(
    ("column", "expected"), [(0, 3), (1, 3), (2, 3), (None, 5)], ids=["id", "picture", "place", "-"]
)
def test_a_prefix_ends_where_anything_differs(column: int | None, expected: int) -> None:
    before = np.arange(25).reshape(5, 5)
    now = np.concatenate([before, before])
    if column is not None:
        now[3, column] += 1
    assert strategies._common_prefix(before, now) == expected
    assert strategies._common_prefix(now, before) == expected


def test_clues_lie_in_the_video_and_the_second_in_the_first() -> None:
    for (start, end), (inner_start, inner_end) in strategies._clues(
        np.random.default_rng(0), 60, 50
    ):
        assert 0.0 <= start <= inner_start < inner_end <= end <= 60.0
        assert 3.0 <= end - start <= 18.0
        assert inner_end - inner_start == pytest.approx((end - start) / 2)


def test_every_strategy_is_asked_about_the_same_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def evaluate(runtime: Any, *, perception: Any, **arguments: Any) -> dict[str, Any]:
        asked.append({"strategy": perception.strategy, **arguments})
        return {"strategy": perception.strategy, "rounds": []}

    monkeypatch.setattr(needle, "evaluate", evaluate)
    runtime: Any = object()
    embedded = prompts_from_dict(load_extras(resolve_model("tiny"))["prompts"])
    results = strategies.accuracy(runtime, embedded, seed=3, num=7)
    assert [r["strategy"] for r in results] == [a["strategy"] for a in asked] == list(STRATEGIES)
    assert {(a["seed"], a["num"], a["rounds"]) for a in asked} == {(3, 7, (1, 2, 3))}
    assert [a["together"] for a in asked] == [False, False, True, True]
    asked.clear()
    strategies.accuracy(runtime, PromptTemplates(), num=1)  # its last cue asks for the answer only
    assert not any(a["together"] for a in asked)


def test_the_script_files_the_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(strategies, "DURATIONS_SECONDS", (20,))

    def run(*flags: str) -> None:
        model = str(resolve_model("tiny"))
        flags = ("--num", "0", "--device", "cpu", "--result-dir", str(tmp_path), *flags)
        flags = ("--model", model, *flags)
        monkeypatch.setattr("sys.argv", ["bench_strategies.py", *flags])
        strategies.main()

    run("--plans", "2")
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert result["accuracy"] == []
    assert [row["strategy"] for row in result["kept"][::2]] == list(STRATEGIES)
    with pytest.raises(ValueError, match="plans must be >= 1, got 0"):
        run("--plans", "0")
