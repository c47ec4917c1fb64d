"""Rewards: published tasks, ours by round, the registry and groups."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reward_tools
from hypothesis import given
from hypothesis import strategies as st

from vtts_rt.data.rows import Row
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.dialect import DIALECTS
from vtts_rt.rollout.reward_input import Look, RewardInput
from vtts_rt.rollout.rewards import (
    BY_TASK,
    PUBLISHED,
    REWARDS,
    check_rewards,
    find_reward,
    group_advantages,
    reward,
    round_reward,
    score,
    score_group,
)
from vtts_rt.rollout.rows import Score
from vtts_rt.types import Box, Region, TimeSpan

BOX = (10.0, 20.0, 30.0, 60.0)
ROW = Row(
    *("clip.mp4", "which?"),
    options=("red", "green", "blue"),
    answer="B",
    spans=(TimeSpan(10.0, 20.0),),
    boxes=(Box(0.2, 0.2, 0.6, 0.6),),
    duration_seconds=60.0,
)


# -- published tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "text", "total"),
    [
        ("tg", "<answer>[(10, 20)]</answer>", 2.0),
        ("gqa", "<answer>B</answer><glue>[(10, 20)]</glue>", 3.0),
        ("gqa", "<answer>A</answer><glue>[(10, 15)]</glue>", 1.5),
        ("igqa", "<answer>B</answer><glue>[10, 20, 30, 60]</glue>", 2.2),
        ("detection", "<answer>[10, 20, 30, 60]</answer>", 2.0),
        ("detection", "[10, 20, 30, 60]", 1.0),
        ("mc", "<answer>B</answer>", 2.0),
        ("tracking", f"<answer>{[list(BOX)] * 8}</answer>", 2.0),
    ],
)
def test_tasks_are_plain_sums(task: str, text: str, total: float) -> None:
    row = Row("a", "b", answer="B", spans=ROW.spans, pixel_boxes=(BOX,) * 8)
    found = score(RewardInput.of_texts([text], row, task), PUBLISHED[task])
    assert found.reward == pytest.approx(total) and set(found.parts) == set(PUBLISHED[task])


def test_fractions_are_compared_in_pixels_of_the_view() -> None:
    row = Row("a", "b", media_type="image", boxes=(Box(0.1, 0.1, 0.5, 0.5),))
    look = Look("<answer>[10, 20, 50, 100]</answer>", resized_hw=(200, 100))
    assert score(RewardInput(row, (look,)), {"box_answer": 1.0}).reward == pytest.approx(1.0)


# -- never raises, never hangs ------------------------------------------------------------------

LARGE = 10**6
HOSTILE = {
    "openings": "<answer>" * (LARGE // 8),
    "closings": "<answer>" + "</answer>" * (LARGE // 9),
    "both": "<answer></answer>" * (LARGE // 17) + "<glue></glue>",
    "gaps": "<answer>" + "</answer> \n" * (LARGE // 11) + "</glue>",
    "spaces": "<answer></answer>" + " " * LARGE + "<glue></glue>x",
    "spans": "<glue>[" + "(1, 2), " * (LARGE // 8) + "]</glue>",
    "digits": "<glue>[(" + "9" * LARGE + ", 1)]</glue>",
    "brackets": "<answer>" + "[" * LARGE + "</answer>",
    "signs": "<answer>" + "-" * LARGE + "1</answer>",
    "lines": "<answer>\n" * (LARGE // 9),
    "capitals": "<answer>" + "The answer is" * (LARGE // 13) + "</answer>",
    "boxes": "<answer>[" + "[1, 2, 3, 4], " * (LARGE // 14) + "]</answer>",
    "nul": "<answer>\x00\ud800" * (LARGE // 10),
    "quotes": "<answer>'" + "\\" * LARGE + "</answer>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_long_texts_are_finite(name: str) -> None:
    """Every scanner is linear: of one that is not, 10^6 characters would take hours."""
    given_text = RewardInput(ROW, (Look(HOSTILE[name]),))
    for found in REWARDS.values():
        assert math.isfinite(found.function(given_text)), found.name


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_random_texts_are_finite(count: int) -> None:
    """All rewards, of an empty row too; bounded in [-1, 1] but for boxes that are reversed."""
    raw = {"box_answer", "box_glue", "tracking_iou"}
    bounded = [f for f in REWARDS.values() if f.name not in raw and not f.name.endswith("cost")]
    empty = Row("a", "b")
    for seed in range(count):
        text = reward_tools.text(random.Random(seed))
        given_text = RewardInput(ROW, (Look(text),))
        for found in bounded:
            assert 0.0 <= found.function(given_text) <= 1.0, (found.name, text)
        if seed % 20 == 0:
            judged = RewardInput.of_texts([text, text], ROW)
            unlabelled = RewardInput.of_texts([text], empty)
            for found in REWARDS.values():
                assert math.isfinite(found.function(judged)), (found.name, text)
                if not found.needs:
                    assert math.isfinite(found.function(unlabelled)), (found.name, text)


@given(st.text(), st.sampled_from(list(DIALECTS)))
def test_any_text_in_any_dialect_is_finite(text: str, dialect: str) -> None:
    judged = RewardInput.of_texts([text, text], ROW, dialect=DIALECTS[dialect])
    assert all(math.isfinite(found.function(judged)) for found in REWARDS.values())


# -- ours ---------------------------------------------------------------------------------------


def look(
    spans: Any = (), boxes: Any = (), said: str = "", closed: bool = True, tokens: int = 0
) -> Look:
    where = [TimeSpan(*s) for s in spans] or [TimeSpan(0.0, 60.0)] * bool(boxes)
    regions = [Region(s, Box(*b)) for s in where for b in boxes or [(0, 0, 1, 1)]]
    clue = Clue(spans=tuple(spans), boxes=tuple(boxes))
    return Look("", said, closed, clue, tuple(regions), tokens)


def test_clues_are_judged_by_round() -> None:
    looks = (look([(0, 20)]), look([(10, 20)], [(0.2, 0.2, 0.4, 0.6)]), look())
    values = {
        "clue_spans@0": 0.5,
        "clue_spans@1": 1.0,
        "clue_spans@2": 0.0,
        "clue_boxes@0": 0.0,
        "clue_boxes@1": 0.5,
        "clue_holds@0": 1.0,
        "clue_holds@1": 0.5,
        "clue_holds@2": 0.0,
    }
    found = score(RewardInput(ROW, looks), dict.fromkeys(values, 1.0))
    assert found.parts == pytest.approx(values)
    means = score(RewardInput(ROW, looks, last_is_final=True), {"clue_spans": 1.0})
    assert means.reward == 0.75
    assert score(RewardInput(ROW, looks), {"clue_spans": 1.0}).reward == 0.5
    assert score(RewardInput(ROW, looks[:2]), {"clue_spans@7": 1.0}).reward == 1.0
    assert score(RewardInput(ROW, ()), {"clue_spans": 1.0, "format": 1.0}).reward == 0.0


@pytest.mark.parametrize(
    ("spans", "evidence", "share"),
    [
        ([(0, 60)], [(10, 20)], 1.0),
        ([(15, 60)], [(10, 20)], 0.5),
        ([(10, 12), (11, 14)], [(10, 20)], 0.4),
        ([(0, 12)], [(10, 12), (30, 32)], 0.5),
        ([(0, 12)], [(11, 11)], 1.0),
        ([(0, 12)], [(13, 13)], 0.0),
    ],
)
def test_share_of_the_evidence(spans: Any, evidence: Any, share: float) -> None:
    row = Row("a", "b", spans=tuple(TimeSpan(*s) for s in evidence))
    found = score(RewardInput(row, (look(spans),)), {"clue_holds": 1.0})
    assert found.reward == pytest.approx(share)


def test_answers_after_every_round() -> None:
    looks = (look(said="A"), look(said="The answer is (B)."), look(said="green"))
    names = ("round_answer@0", "round_answer@1", "round_answer@2", "round_answer@5", "answer")
    found = score(RewardInput(ROW, looks, "green"), dict.fromkeys(names, 1.0))
    assert list(found.parts.values()) == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert score(RewardInput(ROW, looks), {"round_answer": 3.0}).reward == pytest.approx(2.0)
    final = RewardInput(ROW, looks, last_is_final=True)  # it was asked for its answer
    assert score(final, {"round_answer": 3.0}).reward == pytest.approx(2.0)
    free = Row("a", "b", answer="A red card")
    for said, value in (("a RED card.", 1.0), ("red card", 0.0), ("", 0.0)):
        assert score(RewardInput(free, (), said), {"answer": 1.0}).reward == value
    letter = Row("a", "b? A. x B. y", answer="B")
    assert score(RewardInput(letter, (), "(B) y"), {"answer": 1.0}).reward == 1.0
    assert score(RewardInput(letter, (), ""), {"answer": 1.0}).reward == 0.0


def test_costs() -> None:
    looks = (look(tokens=1500), look(tokens=500), look())
    found = score(RewardInput(ROW, looks), {"rounds_cost": 0.1, "tokens_cost": 0.25})
    assert found.parts == {"rounds_cost": -2.0, "tokens_cost": -2.0}
    assert found.reward == pytest.approx(-0.7)


@pytest.mark.parametrize(
    ("dialect", "texts", "values"),
    [
        ("r1.5", ["<answer>B</answer><glue>[(1, 2)]</glue>", "<answer>B</answer>"], [1, 1]),
        ("r1.5", ["<answer>B</answer>", "B"], [0, 0]),
        ("r1.5", ["<answer>B</answer><glue>none</glue>", "<answer>B"], [0, 0]),
        (
            "longvt",
            [
                '<tool_call>{"name": "crop_video", "arguments": {"video_path": "v", '
                '"start_time": 1, "end_time": 2}}</tool_call>',
                "<answer>B</answer>",
            ],
            [1, 1],
        ),
        ("longvt", ["<answer>B</answer>", "x"], [1, 0]),
        ("longvt", ["<tool_call>{</tool_call>", "<answer>B</answer>"], [0, 1]),
    ],
)
def test_format_by_dialect(dialect: str, texts: list[str], values: list[float]) -> None:
    judged = RewardInput.of_texts(texts, ROW, dialect=DIALECTS[dialect])
    assert list(score(judged, {"format@0": 1, "format@1": 1}).parts.values()) == values


# -- registry and groups ------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    values: dict[str, Any] = {"value": math.nan}

    def say(given: RewardInput) -> Any:
        if isinstance(values["value"], Exception):
            raise values["value"]
        return values["value"]

    for name in list(REWARDS):
        monkeypatch.setitem(REWARDS, name, REWARDS[name])
    monkeypatch.delitem(REWARDS, "own", raising=False)
    reward("own")(say)
    yield values  # type: ignore[misc]
    del REWARDS["own"]


def answered(*texts: str) -> Any:
    rounds = [
        SimpleNamespace(
            text=text, answer=text, answered=text, clue=Clue(), regions=(),
            plan=SimpleNamespace(segments=(), resized_hw=(0, 0)), is_final=False,
            token_ids=[*text.encode()],
        )
        for text in texts
    ]  # fmt: skip
    last = texts[-1] if texts else ""
    return SimpleNamespace(rounds=rounds, text=last, stop_reason="max_rounds", dialect="r1.5")


@pytest.mark.parametrize(
    ("text", "stop_reason", "value"),
    [
        ("<answer>B</answer><glue></glue>", "no_clue", 1.0),
        ("<answer>B</answer><glue> [] </glue>", "no_clue", 1.0),
        ("<answer>A</answer><glue></glue>", "no_clue", 0.0),
        ("<answer>B</answer><glue>here</glue>", "no_clue", 0.0),
        ("<answer>B</answer><glue>", "no_clue", 0.0),
        ("<answer>B</answer>", "no_clue", 0.0),
        ("<answer>B</answer><glue></glue>", "token_budget", 0.0),
    ],
)
def test_right_answers_may_end_the_rounds(text: str, stop_reason: str, value: float) -> None:
    member = answered(text)
    member.stop_reason = stop_reason
    member.rounds[0].answered = member.text = text[8:9]
    given = RewardInput.of_answer(member, ROW)
    names = ("clue_holds", "clue_holds@0", "clue_holds@1")
    assert score(given, dict.fromkeys(names, 1.0)).parts == dict.fromkeys(names, value)
    assert given.stopped == ("glue></" in text or "[]" in text) * (stop_reason == "no_clue")
    assert score(given, {"format": 1.0}).parts["format"] == float(given.stopped)


@pytest.mark.parametrize("stop_reason", ["max_rounds", "answer_stable", "timeout"])
def test_the_last_round_is_not_asked_for_a_clue(stop_reason: str) -> None:
    """However it ended; one that ends the rounds before the last was asked."""
    clue = Clue(spans=((10, 20),))
    member = answered("x", "<answer>B</answer>")
    member.stop_reason = stop_reason
    first, last = member.rounds
    first.clue, first.regions = clue, (Region(TimeSpan(10, 20), Box(0, 0, 1, 1)),)
    for is_final, value in ((True, 1.0), (False, 0.5)):
        last.is_final = is_final
        given = RewardInput.of_answer(member, ROW)
        found = score(given, {"clue_spans": 1.0, "format@1": 1.0})
        assert found.parts == {"clue_spans": value, "format@1": float(is_final)}
    member.rounds, last.is_final = [last], True  # one round in all
    given = RewardInput.of_answer(member, ROW)
    assert score(given, {"format": 1.0, "clue_spans": 1.0}).parts == {"format": 1, "clue_spans": 0}


def test_a_round_that_was_cut_before_its_first_token_is_none() -> None:
    """A deadline's: what is judged is what there is to train, the round before."""
    said = "<answer>B</answer><glue>[(10, 20)]</glue>"
    cut, whole = answered("<answer>A</answer>", said, ""), answered("<answer>A</answer>", said)
    cut.stop_reason, cut.rounds[-1].is_final = "timeout", True
    cut.text = whole.text = "B"
    weights = {**PUBLISHED["gqa"], "answer": 1.0, "round_answer": 1.0, "format": 1.0}
    weights |= {"rounds_cost": 1.0, "clue_spans": 1.0}
    found = [score(RewardInput.of_answer(member, ROW), weights) for member in (cut, whole)]
    assert found[0] == found[1] and found[0].parts["iou_glue"] == found[0].parts["letter"] == 1.0
    assert RewardInput.of_answer(answered(""), ROW).looks == ()


def test_members_of_a_group() -> None:
    members = (answered("A", "B"), TimeoutError("late"), answered("C"), answered())
    group: Any = SimpleNamespace(group_id="g", members=members)
    scores = score_group(group, ROW, {"answer": 2.0, "rounds_cost": 0.5}, "mc")
    assert scores[0] == Score(1.5, {"answer": 1.0, "rounds_cost": -1.0})
    assert scores[1] is None and [s.reward for s in scores[2:] if s] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "reward 'own' of group 'g', member 1 must be a finite number, got nan"),
        (-math.inf, "reward 'own' of group 'g', member 1 must be a finite number, got -inf"),
        ("x", "reward 'own' failed of group 'g', member 1: "),
        (KeyError("k"), "reward 'own' failed of group 'g', member 1: KeyError('k')"),
    ],
)
def test_a_bad_reward_is_named(own: dict[str, Any], value: Any, message: str) -> None:
    own["value"] = value
    group: Any = SimpleNamespace(group_id="g", members=(ValueError("x"), answered("B")))
    with pytest.raises(ValueError, match="^score_group: ") as error:
        score_group(group, ROW, {"answer": 1.0, "own": 1.0})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "weights", "message"),
    [
        (ROW, {}, "weights must be at least one"),
        (ROW, {"answr": 1.0}, "rewards: name must be one of "),
        (ROW, {"answer@1": 1.0}, "rewards: name must be one of "),
        (ROW, {"clue_spans@x": 1.0}, "rewards: name must be one of "),
        (ROW, {"clue_spans@": 1.0}, "rewards: name must be one of "),
        (ROW, {"answer": math.nan}, "weight of 'answer' must be a finite number"),
        (ROW, {"answer": True}, "weight of 'answer' must be a finite number"),
        (Row("a", "b"), {"letter": 1.0}, "one with answer, which reward 'letter' compares with"),
        (Row("a", "b"), {"box_glue": 1}, "one with boxes or pixel_boxes, which reward 'box_glue'"),
    ],
)
def test_what_cannot_be_scored(row: Row, weights: Any, message: str) -> None:
    group: Any = SimpleNamespace(group_id="g", members=(answered("B"),))
    with pytest.raises(ValueError) as error:
        score_group(group, row, weights)
    assert message in str(error.value)


def test_published_among_weights_is_that_of_the_task() -> None:
    group: Any = SimpleNamespace(group_id="g", members=(answered("B"),))
    for task, published in PUBLISHED.items():
        (alone,) = score_group(group, ROW, published, task)
        weights = {BY_TASK: 2.0, "answer": 3.0, "letter": 5.0}
        (mixed,) = score_group(group, ROW, weights, task)
        assert alone is not None and mixed is not None
        assert mixed.parts == {**alone.parts, "answer": 1.0, "letter": mixed.parts["letter"]}
        own = 3.0 + 5.0 * mixed.parts["letter"]
        assert mixed.reward == pytest.approx(2.0 * alone.reward + own)
    with pytest.raises(ValueError, match="score_group: task must be one of tg, gqa, .* got ''"):
        score_group(group, ROW, {BY_TASK: 1.0})
    with pytest.raises(ValueError, match="name must be a text without @, and not published"):
        reward(BY_TASK)(lambda x: 0.0)


def test_boxes_in_pixels_will_be_fractions_once_the_media_are_open() -> None:
    row = Row("a", "b", pixel_boxes=(BOX,))
    check_rewards("test", {"clue_boxes": 1.0, "clue_holds": 1.0, "box_answer": 1.0}, row, is_sized=False)  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match="one with boxes, which reward 'clue_boxes' compares"):
        check_rewards("test", {"clue_boxes": 1.0}, row)
    with pytest.raises(ValueError, match="one with boxes, which reward 'clue_boxes' compares"):
        check_rewards("test", {"clue_boxes": 1.0}, Row("a", "b"), is_sized=False)


def test_names_are_taken_once(own: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^reward: name must be one that is not taken, got 'own'"):
        reward("own")(lambda given: 0.0)
    with pytest.raises(ValueError, match="^reward: name must be a text without @, .*got 'a@b'"):
        round_reward("a@b")(lambda given, k: 0.0)
    assert find_reward("clue_holds@3").name == "clue_holds@3"
    assert set(REWARDS) >= {name for weights in PUBLISHED.values() for name in weights}


@given(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), max_size=8))
def test_advantages(rewards: list[float | None]) -> None:
    found = group_advantages([None if r is None else Score(r, {}) for r in rewards])
    known = np.array([r for r in rewards if r is not None])
    assert np.isnan(found).tolist() == [r is None for r in rewards]
    if len(known) > 1:
        expected = (known - known.mean()) / (
            np.sqrt(known.var() * len(known) / (len(known) - 1)) + 1e-4
        )
        np.testing.assert_allclose(found[~np.isnan(found)], expected, atol=1e-9)
    else:
        assert not np.nansum(np.abs(found))


def test_advantages_by_hand() -> None:
    found = group_advantages([Score(1.0, {}), Score(0.0, {}), None])
    assert found[:2] == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-4)] * np.array([1, -1]))
    assert group_advantages([Score(2.0, {})] * 3).tolist() == [0.0] * 3
