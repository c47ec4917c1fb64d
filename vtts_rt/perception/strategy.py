"""Strategies as data: which frames a round shows and how its prompt is laid out.

A name (`--strategy`) is looked up here and nowhere compared: what a strategy does stands in its
fields. A new one is a name in `types.StrategyName`, its traits in `config.STRATEGIES`, and a row of
the table below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vtts_rt.checks import check
from vtts_rt.config import STRATEGIES, ResolvedPerception, StrategyTraits
from vtts_rt.perception.chat import ChatFormat, Message
from vtts_rt.perception.dialect import DIALECTS
from vtts_rt.perception.layout import PROMPT_RULES, Turn, labelled_pairs, task_text, video_first
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.policy_grid import grid_pairs, plan_focus, plan_grid
from vtts_rt.perception.policy_official import official_pairs, plan_official
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.reply import plan_reply, reply_turn, requests_of
from vtts_rt.types import (
    Prompt,
    PromptPart,
    Region,
    StrategyName,
    VideoMetadata,
    VideoWrapper,
    require,
)

_Videos = Sequence[VideoMetadata]


@dataclass(frozen=True, slots=True)
class Strategy(StrategyTraits):
    """One strategy; what it is for is told in docs/strategies.md.

    plan: the frames of a round (arguments as `plan_round`). num_pairs: frame pairs of a first look
    at one of several videos, counted without its plan. lay_out: the parts of the user's turn.
    """

    name: StrategyName
    plan: Callable[[ResolvedPerception, _Videos, Sequence[RoundHistory], int], FramePlan]
    num_pairs: Callable[[ResolvedPerception, VideoMetadata, _Videos], int]
    lay_out: Callable[[Turn], list[PromptPart]]


_FUNCTIONS: Mapping[StrategyName, tuple[Any, ...]] = {
    "official": (plan_official, official_pairs, video_first),
    "grid": (plan_grid, grid_pairs, video_first),
    "refresh": (partial(plan_focus, only_new=False), grid_pairs, labelled_pairs),
    "append": (partial(plan_focus, only_new=True), grid_pairs, labelled_pairs),
}
_TABLE: Mapping[str, Strategy] = {
    name: Strategy(name, *_FUNCTIONS[name], **asdict(traits)) for name, traits in STRATEGIES.items()
}


def find_strategy(name: str, what: str = "ask") -> Strategy:
    """The strategy of a name. ValueError, which begins with `what`, for one that is unknown."""
    require(what, "strategy", name, name in _TABLE, f"one of {', '.join(STRATEGIES)}")
    return _TABLE[name]


def first_pairs(name: str, config: ResolvedPerception, videos: _Videos) -> int:
    """Frame pairs of a first look, counted without making its plan; arguments as `plan_round`."""
    strategy = find_strategy(name, "plan_round")
    _check(videos)
    return sum(1 if v.is_image else strategy.num_pairs(config, v, videos) for v in videos)


def plan_round(
    name: str,
    config: ResolvedPerception,
    videos: _Videos,
    history: Sequence[RoundHistory],
    round_index: int,
) -> FramePlan:
    """The frame plan of a round; the same arguments always give the same plan.

    name: of the strategy. videos: at least one, in the request's order. history: the finished
    rounds, oldest first; empty for the first look, and the last one's clue says where to look.
    round_index: from 0, recorded in the plan. A plan of a strategy that focuses may be empty, and
    its notes say why; others always have something to show. A later round shows what the dialect
    gives back, where the dialect says it.
    ValueError for an unknown strategy or a video without frames, size, rate or duration.
    """
    strategy = find_strategy(name, "plan_round")
    _check(videos)
    reply = DIALECTS[config.dialect].reply
    if history and reply is not None:
        return plan_reply(reply, config, videos, history, round_index)
    return strategy.plan(config, videos, history, round_index)


def clue_regions(
    config: ResolvedPerception, videos: _Videos, history: Sequence[RoundHistory]
) -> tuple[Region, ...]:
    """The last round's clue as geometry; () where it cannot be used."""
    reply = DIALECTS[config.dialect].reply
    if reply is None:
        return history[-1].regions(videos)
    return tuple(request.region for request in requests_of(reply, videos, history))


def build_prompt(
    name: str,
    chat: ChatFormat,
    templates: PromptTemplates,
    *,
    question: str,
    options: Sequence[str],
    context: str,
    round_index: int,
    max_rounds: int,
    plan: FramePlan,
    history: Sequence[RoundHistory],
    text_first: bool = True,
    dialect: str = "r1.5",
    video_wrapper: VideoWrapper = "outer",
) -> Prompt:
    """The prompt of one round, in the chat format and the wording of a model.

    question: not blank. options: may be empty, at most 26, none blank. context: subtitles or
    other long text, may be empty. round_index: from 0; the last of max_rounds asks for the
    answer only. plan: of this round. history: the finished rounds; where there are some and the
    strategy continues, the result is the part that the round adds after the model's last token,
    beginning with the end of its turn. text_first, video_wrapper: see PerceptionConfig. ValueError
    for a bad argument.
    """
    strategy = find_strategy(name)
    check("ask", PROMPT_RULES, {"question": question, "options": options, "context": context})
    goes_on = strategy.continues and bool(history)
    turn = Turn(
        chat,
        templates,
        task_text(templates, question, options, context),
        plan,
        is_later=bool(history),
        goes_on=goes_on,
        is_last=round_index >= max_rounds - 1,
        text_first=text_first,
        video_wrapper=video_wrapper,
    )
    reply = DIALECTS[dialect].reply if goes_on else None
    parts = strategy.lay_out(turn) if reply is None else reply_turn(reply, turn)
    return chat.render([Message("user", tuple(parts))], system=templates.system, goes_on=goes_on)


def _check(videos: _Videos) -> None:
    require("plan_round", "videos", videos, len(videos) > 0, "at least one video")
    for metadata in videos:
        sides = (metadata.height, metadata.width)
        require("plan_round", "num_frames", metadata.num_frames, metadata.num_frames >= 1, ">= 1")
        require("plan_round", "height, width", sides, min(sides) >= 1, ">= 1")
        if not metadata.is_image:
            for name in ("source_fps", "duration_seconds"):
                value = getattr(metadata, name)
                positive = math.isfinite(value) and value > 0.0
                require("plan_round", name, value, positive, "a finite number > 0")
