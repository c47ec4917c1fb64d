"""What a question would cost, before any frame is decoded."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TypedDict

from vtts_rt import process
from vtts_rt.perception.dialect import DIALECTS
from vtts_rt.perception.policy_grid import focus_pairs
from vtts_rt.perception.reply import most_of_reply
from vtts_rt.perception.strategy import find_strategy, plan_round
from vtts_rt.rounds.ask import Ask
from vtts_rt.rounds.prepare import Resources, round_prompt, with_videos_open
from vtts_rt.sampling import MAX_TOKENS


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


@process.native_calls()
def plan_cost(resources: Resources, called: float, ask: Ask, max_tokens: int | None) -> Cost:
    """See `Runtime.plan`. called: as `Resources.open`."""
    engine = resources.engine
    with ExitStack() as stack:
        request = with_videos_open(resources, called, ask, stack)
    config, videos = request.perception, request.videos
    max_tokens = max_tokens or request.sampling.max_tokens or MAX_TOKENS
    first = plan_round(config.strategy, config, videos, [], 0)
    prompt = round_prompt(request, first)
    vision = sum(segment.num_tokens for segment in first.segments)
    # Of each segment the text holds one pad.
    text = engine.tokenizer.count(engine.model.chat.text(prompt)) - len(prompt.segments)
    seen = {(p.video, f) for s in first.segments for p in s.pairs for f in (p.frame_a, p.frame_b)}
    pairs = first.num_pairs
    strategy, reply = find_strategy(config.strategy), DIALECTS[config.dialect].reply
    if strategy.focuses:
        pairs = focus_pairs(config, config.max_frames // 2, first.num_pairs)
    frames = -(-pairs * len(seen) // first.num_pairs)
    later = pairs * (vision // first.num_pairs)
    if reply is not None:
        frames, later = most_of_reply(reply, config, videos)
        pairs = frames if reply.as_images else -(-frames // 2)
    of_first, of_later = (len(seen), first.num_pairs, vision), (frames, pairs, later)
    rounds: list[RoundCost] = []
    for index in range(config.max_rounds):
        num_frames, num_pairs, num_vision = of_later if index else of_first
        before = text
        if index and strategy.continues:
            before = rounds[-1]["prompt_tokens"] + max_tokens
        rounds.append(
            RoundCost(
                index=index,
                exact=index == 0,
                frames=num_frames,
                pairs=num_pairs,
                vision_tokens=num_vision,
                prompt_tokens=before + num_vision,
            )
        )
    all_vision = sum(r["vision_tokens"] for r in rounds)
    frame_bytes = max(3 * video.height * video.width for video in videos)
    pages = engine.pool.pages_for(rounds[-1]["prompt_tokens"] + max_tokens)
    return {
        "model": resources.model,
        "strategy": config.strategy,
        "rounds": rounds,
        "memory_bytes": {
            "frames": sum(r["frames"] for r in rounds) * frame_bytes,
            "features": all_vision * engine.model.feature_dim * engine.model.dtype.itemsize,
            "kv": pages * engine.pool.page_bytes,
        },
    }
