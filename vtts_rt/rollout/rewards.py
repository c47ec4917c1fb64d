"""Rewards: pure functions from what a member of a group saw and said to a number, by name.

The published ones are in published_rewards.py and here under their names; PUBLISHED says which make
up a task, and among weights the name `published` stands for those of a row's task. Ours judge
rounds: `clue_spans@0` is that of the first, `clue_spans` the mean over all rounds in which a clue
was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from vtts_rt.checks import is_number
from vtts_rt.data.rows import Row
from vtts_rt.perception.region import (
    box_area,
    box_iou,
    hull,
    intersect_spans,
    span_iou,
    span_seconds,
)
from vtts_rt.rollout import published_rewards as published
from vtts_rt.rollout.reward_input import Look, RewardInput
from vtts_rt.rollout.rows import Group, Score
from vtts_rt.types import Box, TimeSpan, require

RewardFunction: TypeAlias = Callable[[RewardInput], float]
RoundReward: TypeAlias = Callable[[RewardInput, int], float]
RewardWeights: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reward:
    """A registered reward. needs: fields of the row, of which one at least must hold something.
    of_round: its value for one round, of a reward that has one."""

    name: str
    function: RewardFunction
    needs: tuple[str, ...] = ()
    of_round: RoundReward | None = None


REWARDS: dict[str, Reward] = {}
BY_TASK = "published"  # a name among weights: the published rewards of a row's task


def reward(name: str, *, needs: Sequence[str] = ()) -> Callable[[RewardFunction], RewardFunction]:
    """Register a function of a RewardInput under a name. ValueError for one that is taken."""

    def add(function: RewardFunction) -> RewardFunction:
        _register(Reward(name, function, tuple(needs)))
        return function

    return add


def round_reward(
    name: str, *, needs: Sequence[str] = (), of_clue: bool = True
) -> Callable[[RoundReward], RoundReward]:
    """Register a function of a RewardInput and a round, from 0, as `name@k` for each round and
    `name` for their mean.

    A round after the last counts as the last: rounds that end early because the answer is stable
    lose nothing. of_clue: the mean leaves out the final one of several rounds, asked for no clue.
    """

    def add(function: RoundReward) -> RoundReward:
        def mean(given: RewardInput) -> float:
            num = len(given.looks)
            num -= of_clue and given.last_is_final and num > 1
            return math.fsum(function(given, k) for k in range(num)) / num if num > 0 else 0.0

        def of_round(given: RewardInput, k: int) -> float:
            return function(given, min(k, len(given.looks) - 1)) if given.looks else 0.0

        _register(Reward(name, mean, tuple(needs), of_round))
        return function

    return add


def _register(new: Reward) -> None:
    ok = bool(new.name) and "@" not in new.name and new.name != BY_TASK
    require("reward", "name", new.name, ok, f"a text without @, and not {BY_TASK}")
    require("reward", "name", new.name, new.name not in REWARDS, "one that is not taken")
    REWARDS[new.name] = new


def find_reward(name: str) -> Reward:
    """The reward of a name, `name@k` included. ValueError for one that is unknown."""
    base, at, number = name.partition("@")
    rule = f"one of {', '.join(sorted(REWARDS))}, or one of a round as name@k"
    found = REWARDS.get(base)
    ok = found is not None and (not at or (found.of_round is not None and number.isdecimal()))
    require("rewards", "name", name, ok and len(number) < 4, rule)
    assert found is not None
    if not at:
        return found
    of_round = found.of_round
    assert of_round is not None
    return Reward(name, lambda given: of_round(given, int(number)), found.needs)


def weights_of_task(what: str, weights: RewardWeights, task: str) -> RewardWeights:
    """Weights by the names of rewards, of a row of this task: `published` stands for each of the
    PUBLISHED ones. ValueError for a weight that is not finite, and for another task."""
    for name, weight in weights.items():
        ok = is_number(weight) and math.isfinite(weight)
        require(what, f"weight of {name!r}", weight, ok, "a finite number")
    if BY_TASK not in weights:
        return weights
    require(what, "task", task, task in PUBLISHED, f"one of {', '.join(PUBLISHED)}")
    found = {name: weights[BY_TASK] * weight for name, weight in PUBLISHED[task].items()}
    for name in weights.keys() - {BY_TASK}:
        found[name] = found.get(name, 0.0) + weights[name]
    return found


def check_rewards(
    what: str, weights: RewardWeights, row: Row, task: str = "", *, is_sized: bool = True
) -> None:
    """ValueError for no weights, an unknown name, a weight that is not finite, and for a row
    without what a reward compares with. task: of the row. is_sized: False before its media are
    opened, when boxes in pixels are not yet fractions of the frame (`Row.sized`)."""
    require(what, "weights", weights, len(weights) > 0, "at least one, by name")
    for name in weights_of_task(what, weights, task):
        needs = find_reward(name).needs
        has = not needs or any(getattr(row, need) for need in needs)
        has = has or (not is_sized and "boxes" in needs and bool(row.pixel_boxes))
        rule = f"one with {' or '.join(needs)}, which reward {name!r} compares with"
        require(what, "row", row, has, rule)


def score(given: RewardInput, weights: RewardWeights, where: str = "") -> Score:
    """The parts by name and their weighted sum. where: what messages say of it.

    ValueError as `check_rewards`; and, with its name, for a reward that raises or is not finite.
    """
    check_rewards("score_group", weights, given.row, given.task)
    weights = weights_of_task("score_group", weights, given.task)
    parts: dict[str, float] = {}
    for name in weights:
        found = find_reward(name)
        try:
            value = float(found.function(given))
        except Exception as error:
            raise ValueError(
                f"score_group: reward {name!r} failed{where}: {error!r:.300}"
            ) from error
        what = f"reward {name!r}{where}"
        require("score_group", what, value, math.isfinite(value), "a finite number")
        parts[name] = value
    total = math.fsum(weights[name] * value for name, value in parts.items())
    require("score_group", f"reward{where}", total, math.isfinite(total), "a finite number")
    return Score(total, parts)


def score_group(
    group: Group, row: Row, weights: RewardWeights, task: str = ""
) -> list[Score | None]:
    """The score of each member of a group, None of one that failed: it has no rows and no
    advantage. One that was out of time is judged by the rounds that it finished.

    weights: name -> weight; task: of the row. ValueError as `score`, naming group and member.
    """
    return [
        None
        if isinstance(member, Exception)
        else score(
            RewardInput.of_answer(member, row, task),
            weights,
            f" of group {group.group_id!r}, member {number}",
        )
        for number, member in enumerate(group.members)
    ]


def group_advantages(scores: Sequence[Score | None]) -> np.ndarray:
    """(G,) float64: (r - mean) / (std + 1e-4) with the unbiased std (n - 1), as published; NaN for
    members without a score, which count in neither; 0 where only one has one."""
    rewards = np.array([math.nan if one is None else one.reward for one in scores], np.float64)
    known = rewards[~np.isnan(rewards)]
    if len(known) < 2:
        return rewards * 0.0
    advantages: np.ndarray = (rewards - known.mean()) / (known.std(ddof=1) + 1e-4)
    return advantages


# -- published ----------------------------------------------------------------------------------

# Task -> the rewards whose plain sum is its reward. tracking: written there, never trained with.
PUBLISHED: Mapping[str, RewardWeights] = {
    "tg": {"iou_answer": 1.0, "format_answer": 1.0},
    "gqa": {"iou_glue": 1.0, "letter": 1.0, "format_gqa": 1.0},
    "igqa": {"box_glue": 0.2, "letter": 1.0, "format_igqa": 1.0},
    "detection": {"box_answer": 1.0, "format_answer": 1.0},
    "mc": {"letter": 1.0, "format_answer": 1.0},
    "tracking": {"tracking_iou": 1.0, "tracking_format": 1.0},
}
_SPANS, _BOXES, _ANSWER = ("spans",), ("boxes", "pixel_boxes"), ("answer",)


def _first_box(given: RewardInput) -> tuple[float, float, float, float]:
    return given.true_boxes[0]


for _name, _needs, _function in (
    ("iou_answer", _SPANS, lambda x: published.span_reward(x.text, "answer", x.row.spans)),
    ("iou_glue", _SPANS, lambda x: published.span_reward(x.text, "glue", x.row.spans)),
    ("letter", _ANSWER, lambda x: published.letter_reward(x.text, x.row.answer or "")),
    ("box_answer", _BOXES, lambda x: published.box_reward(x.text, "answer", _first_box(x))),
    ("box_glue", _BOXES, lambda x: published.box_reward(x.text, "glue", _first_box(x))),
    ("tracking_iou", _BOXES, lambda x: published.tracking_reward(x.text, x.true_boxes)),
    ("format_answer", (), lambda x: published.answer_format(x.text)),
    ("format_gqa", (), lambda x: published.clue_format(x.text)),
    ("format_igqa", (), lambda x: published.box_format(x.text)),
    ("tracking_format", (), lambda x: published.tracking_format(x.text)),
):
    reward(_name, needs=_needs)(_function)


# -- ours ---------------------------------------------------------------------------------------


@reward("answer", needs=("answer",))
def _answer(given: RewardInput) -> float:
    """1 where what the rounds came to is right."""
    return float(given.is_right(given.answer))


@round_reward("round_answer", needs=("answer",), of_clue=False)
def _round_answer(given: RewardInput, k: int) -> float:
    """1 where the answer after round k is right."""
    return float(given.is_right(given.looks[k].answered))


@round_reward("clue_spans", needs=("spans",))
def _clue_spans(given: RewardInput, k: int) -> float:
    """IoU in time of the clue of round k with the evidence; 0 for a clue without spans."""
    spans = _spans_of(given.looks[k])
    return span_iou(spans, given.row.spans) if spans else 0.0


@round_reward("clue_boxes", needs=("boxes",))
def _clue_boxes(given: RewardInput, k: int) -> float:
    """IoU on the frame of the box around the clue's boxes with that around the evidence."""
    boxes = _boxes_of(given.looks[k])
    return box_iou(hull(boxes), hull(given.row.boxes)) if boxes else 0.0


@round_reward("clue_holds", needs=("spans", "boxes"))
def _clue_holds(given: RewardInput, k: int) -> float:
    """Share of the evidence that lies in the clue of round k: of its seconds, times of the box
    around its boxes. A clue without spans or without boxes holds all of the time, of the frame, and
    no clue nothing: weigh it together with a cost. An empty one that ends the rounds with the right
    answer needs no further look: 1."""
    look, row = given.looks[k], given.row
    spans, boxes = _spans_of(look), _boxes_of(look)
    if not look.regions:
        ends = given.stopped and k == len(given.looks) - 1
        return float(ends and row.answer is not None and given.is_right(given.answer))
    share = 1.0
    if row.spans and spans:
        seconds = span_seconds(row.spans)
        if seconds > 0.0:
            share = span_seconds(intersect_spans(spans, row.spans)) / seconds
        else:
            inside = (any(_within(t.start_seconds, s) for s in spans) for t in row.spans)
            share = float(all(inside))
    if row.boxes and boxes:
        a, b = hull(boxes), hull(row.boxes)
        both = Box(max(a.x0, b.x0), max(a.y0, b.y0), min(a.x1, b.x1), min(a.y1, b.y1))
        share *= box_area(both) / box_area(b)
    return min(share, 1.0)


@round_reward("format", of_clue=False)
def _format(given: RewardInput, k: int) -> float:
    """1 where the text of round k keeps to the dialect: a final one holds a closed answer; another
    a clue without problems beside it (`r1.5`), or either of the two (dialects of calls). One that
    ends the rounds by an empty clue counts as final."""
    look = given.looks[k]
    asked = not ((given.last_is_final or given.stopped) and k == len(given.looks) - 1)
    clue = look.clue.usable and not look.clue.problems
    if asked and given.dialect.request.holds == "numbers":
        return float(look.closed and clue)
    return float(look.closed or (asked and clue))


@reward("rounds_cost")
def _rounds_cost(given: RewardInput) -> float:
    """-1 for every round after the first."""
    return -float(max(len(given.looks) - 1, 0))


@reward("tokens_cost")
def _tokens_cost(given: RewardInput) -> float:
    """-1 for every 1,000 visual tokens that the rounds showed."""
    return -sum(look.visual_tokens for look in given.looks) / 1000.0


def _spans_of(look: Look) -> list[TimeSpan]:
    """The regions' times in the first video, of a clue that says any."""
    raw = look.clue.regions
    timed = any(
        r.span or r.frames or r.ordinals or r.frame_number_at_seconds is not None for r in raw
    )
    return [r.span for r in look.regions if r.video == 0] if look.clue.spans or timed else []


def _boxes_of(look: Look) -> list[Box]:
    """The regions' boxes in the first video, of a clue that says any."""
    return [r.box for r in look.regions if r.video == 0] if look.clue.boxes else []


def _within(moment: float, span: TimeSpan) -> bool:
    return span.start_seconds <= moment <= span.end_seconds
