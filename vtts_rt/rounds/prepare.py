"""What a round shows and says, planned and encoded before it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vtts_rt import process
from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.models.tokenizer import EncodedPrompt, encode_prompt, least_tokens
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.strategy import build_prompt, find_strategy, first_pairs, plan_round
from vtts_rt.rounds.arguments import check_call
from vtts_rt.types import Prompt, SamplingParams, VideoMetadata, require
from vtts_rt.video.store import StoreProvider


@dataclass(slots=True)
class RoundRequest:
    """One question, ready to be looked at.

    videos: metadata in the order of `provider`'s video indices. perception: with the
    model's defaults applied. assume_clues: a clue per round that replaces the
    model's, whole-frame boxes; all rounds then run. deadline_seconds: `time.monotonic()` value.
    first: the first round, see `prepare`.
    """

    question: str
    videos: Sequence[VideoMetadata]
    provider: StoreProvider
    perception: ResolvedPerception
    sampling: SamplingParams
    templates: PromptTemplates
    options: Sequence[str] = ()
    context: str = ""
    assume_clues: Sequence[Clue] | None = None
    deadline_seconds: float | None = None
    member: int = 0
    history: list[RoundHistory] = field(default_factory=list)
    first: PreparedRound | None = None


@dataclass(slots=True)
class PreparedRound:
    """A round before it runs. encoded: with the conversation so far; None where that is too long,
    and num_tokens then a lower bound. began: `time.perf_counter()`."""

    plan: FramePlan
    prompt: Prompt
    encoded: EncodedPrompt | None
    num_tokens: int
    began: float


def prepare(engine: Engine, request: RoundRequest) -> None:
    """Plan and encode the first round of a question. Uses nothing that changes: any thread
    may call it. ValueError for what cannot be asked, without the ids of a prompt that is too
    long."""
    config, budget = request.perception, engine.token_budget
    num_pairs = first_pairs(config.strategy, config, request.videos)
    if num_pairs <= budget:  # a pair has at least one token
        request.first = prepared_round(engine, request, 0, None)
        if request.first.encoded is not None:
            return
        num_pairs = request.first.num_tokens
    raise ValueError(
        f"ask: prompt plus max_tokens must be <= {budget} tokens, got at least {num_pairs} + "
        f"{_fewest(request.sampling)}; lower total_pixels, max_frames or max_tokens, or "
        f"raise kv_bytes"
    )


def prepared_round(
    engine: Engine, request: RoundRequest, index: int, conversation: EncodedPrompt | None
) -> PreparedRound:
    """Plan and encode a round; conversation: what a strategy that continues goes on with."""
    began = time.perf_counter()
    config = request.perception
    plan = plan_round(config.strategy, config, request.videos, request.history, index)
    prompt = build_prompt(
        config.strategy,
        engine.model.chat,
        request.templates,
        question=request.question,
        options=request.options,
        context=request.context,
        round_index=index,
        max_rounds=config.max_rounds,
        plan=plan,
        history=request.history,
        text_first=config.text_first,
        dialect=config.dialect,
    )
    before = conversation if find_strategy(config.strategy).continues else None
    room = engine.token_budget - _fewest(request.sampling)
    num_tokens = 0 if before is None else len(before)
    num_tokens += least_tokens(engine.tokenizer, prompt, room - num_tokens)
    if num_tokens > room:
        return PreparedRound(plan, prompt, None, num_tokens, began)
    encoded = encode_prompt(engine.tokenizer, prompt)
    encoded = encoded if before is None else before + encoded
    num_tokens = len(encoded)
    fits = num_tokens <= room
    return PreparedRound(plan, prompt, encoded if fits else None, num_tokens, began)


def generation(
    engine: Engine, prompt: str | Prompt, sampling: SamplingParams | None
) -> GenerationRequest:
    """The request of `Runtime.generate`; ValueError for what it does not take."""
    check_call("generate", {"prompt": prompt, "sampling": sampling})
    encoded = _encode_text(engine, "generate", prompt)
    return GenerationRequest(encoded, sampling=sampling or SamplingParams())


def scoring(engine: Engine, prompt: str | Prompt, token_ids: Sequence[int]) -> GenerationRequest:
    """The request of `Runtime.score`; ValueError for what it does not take."""
    check_call("score", {"prompt": prompt, "token_ids": token_ids})
    ids, size = [int(index) for index in token_ids], engine.model.config.language.vocab_size
    require("score", "token_ids", ids, max(ids, default=0) < size, f"ids below {size}")
    return GenerationRequest(_encode_text(engine, "score", prompt), forced_ids=ids)


@process.native_calls()
def _encode_text(engine: Engine, what: str, prompt: str | Prompt) -> EncodedPrompt:
    """The tokens of a text prompt; ValueError where it has no chance to fit."""
    whole = Prompt((prompt,)) if isinstance(prompt, str) else prompt
    budget = engine.token_budget
    num_tokens = least_tokens(engine.tokenizer, whole, budget)
    if num_tokens > budget:
        rule = f"prompt must be <= {budget} tokens"
        raise ValueError(f"{what}: {rule}, got at least {num_tokens}")
    return encode_prompt(engine.tokenizer, whole)


def _fewest(sampling: SamplingParams) -> int:
    """Tokens of an answer that must fit: max_tokens, or one where it is cut to what fits."""
    return sampling.max_tokens or 1
