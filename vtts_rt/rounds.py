"""Rounds: look, answer, read the clue, look again where it points.

RoundScheduler turns one question into a stream of events. The perception layer says what to
look at and how a prompt is laid out; the engine computes what is new; this file connects them
and decides when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vtts_rt.config import PerceptionConfig
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, GenerationRequest, TokenEvent
from vtts_rt.models.tokenizer import EncodedPrompt, encode_prompt
from vtts_rt.perception.clue import Clue, ClueStream, option_letter
from vtts_rt.perception.layout import build_prompt
from vtts_rt.perception.policy import RoundHistory, plan_round
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.results import (
    ClueFound,
    RoundEvent,
    RoundFinished,
    RoundResult,
    RoundsEnded,
    RoundStarted,
    TokenGenerated,
)
from vtts_rt.types import SamplingParams, StopReason, VideoMetadata
from vtts_rt.video.store import StoreProvider


@dataclass(slots=True)
class RoundRequest:
    """One question, ready to be looked at.

    videos: metadata in the order of `provider`'s video indices. perception: with the model's
    defaults applied and a strategy set. assume_clues: a clue per round that replaces the
    model's, whole-frame boxes; all rounds then run. deadline_seconds: `time.monotonic()` value.
    """

    question: str
    videos: Sequence[VideoMetadata]
    provider: StoreProvider
    perception: PerceptionConfig
    sampling: SamplingParams
    options: Sequence[str] = ()
    context: str = ""
    assume_clues: Sequence[Clue] | None = None
    deadline_seconds: float | None = None
    member: int = 0
    history: list[RoundHistory] = field(default_factory=list)


class RoundScheduler:
    """Runs the rounds of one question over an engine."""

    def __init__(self, engine: Engine, templates: PromptTemplates) -> None:
        self._engine = engine
        self._templates = templates

    def run(self, request: RoundRequest) -> Iterator[RoundEvent]:
        """Events in order, the last is RoundsEnded. Closing the iterator aborts the round."""
        config = request.perception
        assert config.strategy is not None
        conversation: EncodedPrompt | None = None
        results: list[RoundResult] = []
        stop: StopReason = "max_rounds"
        for index in range(config.max_rounds):
            if _expired(request.deadline_seconds):
                stop = "timeout"
                break
            plan = plan_round(config.strategy, config, request.videos, request.history, index)
            # A forced clue always gets its round, even if that shows nothing new.
            if plan.empty and not request.history[-1].forced:
                stop = "no_clue"
                break
            began = time.perf_counter()
            prompt = build_prompt(
                config.strategy,
                self._templates,
                question=request.question,
                options=request.options,
                context=request.context,
                round_index=index,
                max_rounds=config.max_rounds,
                plan=plan,
                history=request.history,
            )
            encoded = encode_prompt(self._engine.tokenizer, prompt)
            if config.strategy == "append" and conversation is not None:
                encoded = conversation + encoded
            if self._too_long(encoded, request.sampling):
                if index == 0:
                    raise ValueError(self._length_message(encoded, request.sampling))
                stop = "token_budget"
                break
            yield RoundStarted(index, plan)
            clues = ClueStream()
            completion: Completion | None = None
            for event in self._engine.generate(
                GenerationRequest(
                    encoded,
                    provider=request.provider,
                    sampling=request.sampling,
                    mrope=config.mrope,
                    round_index=index,
                    member=request.member,
                    deadline_seconds=request.deadline_seconds,
                )
            ):
                if isinstance(event, TokenEvent):
                    yield TokenGenerated(index, event.token_id, event.logprob, event.text)
                    for found in clues.feed(event.text):
                        yield ClueFound(index, found.kind, found.value)
                else:
                    completion = event.completion
            assert completion is not None
            said = clues.finish()
            forced = _forced(request.assume_clues, index)
            look = RoundHistory(plan, forced or said, forced=forced is not None)
            result = _result(index, prompt.text, completion, said.answer, look, request)
            result.timings.total = 1e3 * (time.perf_counter() - began)
            request.history.append(look)
            results.append(result)
            yield RoundFinished(result)
            if completion.finish_reason == "timeout":
                stop = "timeout"
                break
            if config.strategy == "append":
                conversation = encoded.extended(self._without_end(completion.token_ids))
            if self._settled(request, results):
                stop = "answer_stable"
                break
        text, option = _answer(results, request.options)
        yield RoundsEnded(stop, text, option)

    def _without_end(self, token_ids: list[int]) -> list[int]:
        """The next round's text closes the turn itself."""
        if token_ids and token_ids[-1] in self._engine.tokenizer.eos_token_ids:
            return token_ids[:-1]
        return token_ids

    def _too_long(self, encoded: EncodedPrompt, sampling: SamplingParams) -> bool:
        return len(encoded.token_ids) + sampling.max_tokens > self._token_budget

    @property
    def _token_budget(self) -> int:
        """Tokens of one sequence: the model's positions and the whole KV pool bound it."""
        engine = self._engine
        return min(
            engine.model.config.language.max_position_embeddings,
            engine.pool.num_pages * engine.pool.page_size,
        )

    def _length_message(self, encoded: EncodedPrompt, sampling: SamplingParams) -> str:
        return (
            f"ask: prompt plus max_tokens must be <= {self._token_budget} tokens, got "
            f"{len(encoded.token_ids)} + {sampling.max_tokens}; lower total_pixels, max_frames or "
            f"max_tokens, or raise kv_bytes"
        )

    @staticmethod
    def _settled(request: RoundRequest, results: list[RoundResult]) -> bool:
        config = request.perception
        if not config.stop_when_stable or config.strategy == "official" or len(results) < 2:
            return False
        if request.assume_clues is not None:
            return False
        last, before = (_answer([r], request.options) for r in results[-2:])
        return last == before and last[0] != ""


def _forced(assume_clues: Sequence[Clue] | None, index: int) -> Clue | None:
    if assume_clues is None or index >= len(assume_clues):
        return None
    return assume_clues[index]


def _expired(deadline_seconds: float | None) -> bool:
    return deadline_seconds is not None and time.monotonic() >= deadline_seconds


def _result(
    index: int,
    prompt: str,
    completion: Completion,
    answer: str | None,
    look: RoundHistory,
    request: RoundRequest,
) -> RoundResult:
    counts = request.provider.take_counts()
    reuse = completion.reuse
    reuse.frames_decoded = counts.frames_decoded
    reuse.frames_codec_decoded = counts.frames_codec_decoded
    reuse.frames_reused = counts.frames_reused
    return RoundResult(
        index=index,
        prompt=prompt,
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        answer=answer,
        clue=look.clue,
        regions=look.regions(request.videos),
        plan=look.plan,
        prompt_tokens=completion.num_prompt_tokens,
        reuse=reuse,
        timings=completion.timings,
    )


def _answer(results: list[RoundResult], options: Sequence[str]) -> tuple[str, int | None]:
    """The latest round that answered: its `<answer>`, or its whole text if it wrote no tag."""
    for result in reversed(results):
        text = (result.text if result.answer is None else result.answer).strip()
        if text:
            return text, option_letter(text, options) if options else None
    return "", None
