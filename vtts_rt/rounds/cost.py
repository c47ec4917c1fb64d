"""What a question would cost, before any frame is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.engine import Engine
from vtts_rt.perception.dialect import DIALECTS
from vtts_rt.perception.policy_grid import focus_pairs
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.reply import most_of_reply
from vtts_rt.perception.strategy import build_prompt, find_strategy, plan_round
from vtts_rt.rounds.ask import Ask
from vtts_rt.sampling import MAX_TOKENS
from vtts_rt.types import VideoMetadata


class RoundCost(TypedDict):
    """Of one round. The first is exact; a later one is an estimate, all the pairs that its policy
    would take of views as large as the first, or the longest reply of its dialect to one request,
    as the clue that leads it is not known yet."""

    index: int
    exact: bool
    frames: int
    pairs: int
    vision_tokens: int
    prompt_tokens: int


class Cost(TypedDict):
    """What `Runtime.plan` returns. memory_bytes: what the "frames", the "features" and the "kv" of
    all rounds together can fill, before budgets and eviction."""

    model: str
    strategy: str
    rounds: list[RoundCost]
    memory_bytes: dict[str, int]


def plan_cost(
    engine: Engine,
    templates: PromptTemplates,
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    ask: Ask,
    *,
    max_tokens: int | None,
    model: str,
) -> Cost:
    """What the rounds of one question would cost (see Runtime.plan)."""
    max_tokens = max_tokens or (ask.sampling and ask.sampling.max_tokens) or MAX_TOKENS
    first = plan_round(config.strategy, config, videos, [], 0)
    chat = engine.model.chat
    prompt = build_prompt(
        config.strategy,
        chat,
        templates,
        question=ask.question,
        options=ask.options,
        context=ask.context,
        round_index=0,
        max_rounds=config.max_rounds,
        plan=first,
        history=[],
        text_first=config.text_first,
        video_wrapper=config.video_wrapper,
    )
    vision = sum(segment.num_tokens for segment in first.segments)
    text = engine.tokenizer.count(chat.text(prompt)) - len(prompt.segments)  # one pad each
    num_tokens = text + vision
    pairs = first.num_pairs
    strategy, reply = find_strategy(config.strategy), DIALECTS[config.dialect].reply
    if strategy.focuses:
        pairs = focus_pairs(config, config.max_frames // 2, first.num_pairs)
    frames, later = 2 * pairs, pairs * (vision // first.num_pairs)
    if reply is not None:
        frames, later = most_of_reply(reply, config, videos)
        pairs = frames if reply.as_images else -(-frames // 2)
    rounds = [_cost(0, True, 2 * first.num_pairs, first.num_pairs, vision, num_tokens)]
    for index in range(1, config.max_rounds):
        before = num_tokens + max_tokens if strategy.continues else text
        num_tokens = before + later
        rounds.append(_cost(index, False, frames, pairs, later, num_tokens))
    all_vision = sum(r["vision_tokens"] for r in rounds)
    frame_bytes = max(3 * video.height * video.width for video in videos)
    pages = engine.pool.pages_for(rounds[-1]["prompt_tokens"] + max_tokens)
    return {
        "model": model,
        "strategy": config.strategy,
        "rounds": rounds,
        "memory_bytes": {
            "frames": sum(r["frames"] for r in rounds) * frame_bytes,
            "features": all_vision * engine.model.feature_dim * engine.model.dtype.itemsize,
            "kv": pages * engine.pool.page_bytes,
        },
    }


def _cost(index: int, exact: bool, frames: int, pairs: int, vision: int, tokens: int) -> RoundCost:
    return {
        "index": index,
        "exact": exact,
        "frames": frames,
        "pairs": pairs,
        "vision_tokens": vision,
        "prompt_tokens": tokens,
    }
