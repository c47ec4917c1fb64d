"""Rounds: look, answer, read the clue, look again where it points.

RoundScheduler turns questions into streams of events, many at once over one engine. Each question
is a state machine, plan -> fetch -> prefill -> decode -> parse -> next | done, written as a
generator that asks for a generation and is sent what the engine makes of it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import (
    Completion,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    TokenEvent,
)
from vtts_rt.models.tokenizer import EncodedPrompt
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.dialect import DIALECTS
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.policy_grid import finer_frames
from vtts_rt.perception.published import clue_stream
from vtts_rt.perception.region import RawRegion
from vtts_rt.perception.strategy import clue_regions, find_strategy, plan_round
from vtts_rt.rounds.grammar import ClueGrammar, GrammarState
from vtts_rt.rounds.prepare import RoundRequest, prepared_round
from vtts_rt.rounds.results import (
    AnswerReady,
    ClueFound,
    RoundEvent,
    RoundFinished,
    RoundResult,
    RoundStarted,
    TokenGenerated,
    reply_of,
)
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.sampling import resolve
from vtts_rt.types import PairRef, SamplingParams, StopReason
from vtts_rt.video.store import StoreProvider

logger = logging.getLogger(__name__)

_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")


@dataclass(slots=True)
class RequestFailed:
    """The request ended with an error; others go on.

    The error's traceback is logged (debug) and dropped: its frames, and those that called them,
    hold the error and all of the request, which would stay until a garbage collection.
    """

    error: Exception

    def __post_init__(self) -> None:
        logger.debug("a request failed", exc_info=self.error)
        part: BaseException | None = self.error
        while part is not None and part.__traceback__ is not None:
            part.__traceback__ = None
            part = part.__cause__ or part.__context__


# What a task yields: events as they come, a generation to run, or None for the next of its events.
_Yield = RoundEvent | list[Completion] | GenerationRequest | None
_Task = Generator[_Yield, TokenEvent | FinishedEvent, None]
Output = RoundEvent | list[Completion] | RequestFailed


class RoundScheduler:
    """Runs the rounds of many questions over an engine, and plain generations beside them.

    Not thread-safe: one thread calls `add`, `step`, `abort`. speculative_fetch: see RuntimeConfig.
    """

    def __init__(self, engine: Engine, *, speculative_fetch: bool = True) -> None:
        self._engine = engine
        self._speculative_fetch = speculative_fetch
        self._tasks: dict[int, _Task] = {}
        self._waiting_on: dict[int, int] = {}  # engine request -> task
        self._ready: list[tuple[int, Output]] = []
        self._next_id = 0
        self._grammars: dict[bool, ClueGrammar] = {}

    def add(self, request: RoundRequest | Sequence[GenerationRequest]) -> int:
        """Begin a question, or plain generations, which run one after another; returns an id.
        Errors come out of `step`."""
        self._next_id += 1
        self._tasks[self._next_id] = (
            self._rounds(request) if isinstance(request, RoundRequest) else _generations(request)
        )
        self._advance(self._next_id, None)
        return self._next_id

    def step(self) -> list[tuple[int, Output]]:
        """One forward pass; (id, output) in order. A question's last output is AnswerReady, that
        of generations their Completions; or RequestFailed."""
        if not self._ready:
            for event in self._engine.step():
                if (task_id := self._waiting_on.get(event.request_id)) is not None:
                    if not isinstance(event, TokenEvent):
                        del self._waiting_on[event.request_id]
                    self._advance(task_id, event)
        outputs, self._ready = self._ready, []
        return outputs

    def abort(self, request_id: int) -> None:
        """Forget a request; what it has computed stays in the caches."""
        task = self._tasks.pop(request_id, None)
        # The engine first: it fetches frames, which closing the task gives up.
        for engine_id in [e for e, task_id in self._waiting_on.items() if task_id == request_id]:
            del self._waiting_on[engine_id]
            self._engine.abort(engine_id)
        if task is not None:
            task.close()

    @property
    def has_work(self) -> bool:
        return bool(self._tasks or self._ready)

    def _advance(
        self, task_id: int, event: TokenEvent | FinishedEvent | FailedEvent | None
    ) -> None:
        """Send an engine event to a task and collect what it says until it wants another."""
        task = self._tasks.get(task_id)
        if task is None:
            return
        try:
            if isinstance(event, FailedEvent):
                said = task.throw(event.error)
            else:
                said = next(task) if event is None else task.send(event)
            while isinstance(said, RoundEvent | list):
                self._ready.append((task_id, said))
                said = next(task)
            if isinstance(said, GenerationRequest):
                self._waiting_on[self._engine.add(said)] = task_id
        except StopIteration:
            self.abort(task_id)
        except Exception as error:
            self.abort(task_id)
            self._ready.append((task_id, RequestFailed(error)))

    # -- one question -----------------------------------------------------------------------

    def _rounds(self, request: RoundRequest) -> _Task:
        """The rounds of a question; however they end, nothing is fetched for it after that."""
        try:
            yield from self._looks(request)
        finally:
            request.provider.cancel()

    def _looks(self, request: RoundRequest) -> _Task:
        config, strategy = request.perception, find_strategy(request.perception.strategy)
        chat, dialect = self._engine.model.chat, DIALECTS[config.dialect]
        sampling = request.sampling
        if dialect.stop:
            own = resolve(sampling, self._engine.model.config.sampling).stop
            sampling = replace(sampling, stop=(*own, *dialect.stop))
        conversation: EncodedPrompt | None = None
        results, clues_given = request.results, request.ask.clues
        stop: StopReason = "max_rounds"
        upcoming = request.provider
        assert request.first is not None
        ready = request.first
        for index in range(config.max_rounds):
            deadline = request.deadline_seconds
            if deadline is not None and time.monotonic() >= deadline:
                stop = "timeout"
                break
            if index > 0:
                ready = prepared_round(request, index, conversation)
            plan, encoded = ready.plan, ready.encoded
            upcoming.keep_guesses(_frames_by_video(p for s in plan.segments for p in s.pairs))
            # A forced clue always gets its round, even if that shows nothing new.
            if plan.empty and not request.history[-1].forced:
                stop = "no_clue"
                break
            if encoded is None:
                stop = "token_budget"
                break
            yield RoundStarted(index, plan)
            clues = clue_stream(strategy.literal_clues, dialect)
            provider, upcoming = upcoming, request.provider.fresh()
            ahead = self._speculative_fetch and index + 1 < config.max_rounds
            if ahead and strategy.on_grid and dialect.reply is None:
                for video, frames in finer_frames(request.videos, plan, config.sample_fps).items():
                    provider.passing(video, frames)
            # What follows a final answer is not fetched; nor what a forced clue will replace.
            looks_ahead = ahead and clues_given is None
            num_fed = 0
            event = yield GenerationRequest(
                encoded,
                provider=provider,
                sampling=sampling,
                parity=config.parity,
                round_index=index,
                member=request.ask.member or 0,
                deadline_seconds=request.deadline_seconds,
                earlier_answers=[result.token_ids for result in results],
                constraint=self._constraint(config),
            )
            while isinstance(event, TokenEvent):
                yield TokenGenerated(index, event.token_id, event.logprob, event.text)
                new = clues.feed(event.text)
                if new and looks_ahead:
                    self._fetch_ahead(request, plan, clues.so_far(), upcoming)
                yield from (_told(index, region) for region in new)
                num_fed += len(event.text)
                event = yield None
            completion = event.completion
            # What a deadline cut off while it might have become a stop text.
            yield from (_told(index, region) for region in clues.feed(completion.text[num_fed:]))
            said = clues.finish()
            forced = clues_given[index] if clues_given and index < len(clues_given) else None
            look = RoundHistory(plan, forced or said, forced is not None, chat.box_unit)
            is_cut = completion.finish_reason == "length" and not clues.has_closed("answer")
            answer = _letter(completion.text, request.ask.options) if is_cut else said.answer
            request.history.append(look)
            before = None if conversation is None else results[-1].transcript
            results.append(
                reply_of(
                    RoundResult,
                    completion,
                    provider,
                    ready.began,
                    index=index,
                    prompt=chat.text(ready.prompt),
                    answer=answer,
                    clue=look.clue,
                    regions=clue_regions(config, request.videos, request.history),
                    plan=plan,
                    is_final=index == config.max_rounds - 1,
                    transcript=Transcript.of_round(encoded, completion, config.parity, before),
                )
            )
            yield RoundFinished(results[-1])
            if completion.finish_reason == "timeout":
                stop = "timeout"
                break
            if strategy.continues:
                conversation = encoded.extended(self._without_end(completion, sampling))
            if self._settled(request):
                stop = "answer_stable"
                break
        request.weights_version = self._engine.weights_version
        yield AnswerReady(request.answer(stop))

    def _fetch_ahead(
        self,
        request: RoundRequest,
        plan: FramePlan,
        clue: Clue,
        provider: StoreProvider,
    ) -> None:
        """Start decoding what the next round would show if no more clues were to come.

        A guess: if it fails, the next round asks for its frames itself.
        """
        config = request.perception
        look = RoundHistory(plan, clue, box_unit=self._engine.model.chat.box_unit)
        history = [*request.history, look]
        try:
            ahead = plan_round(config.strategy, config, request.videos, history, len(history))
            # Frames whose features are cached are not asked for.
            pairs = [(segment, pair) for segment in ahead.segments for pair in segment.pairs]
            wanted = _frames_by_video(p for s, p in pairs if not self._engine.has_features(s, p))
            for video in range(len(request.videos)):
                provider.guess(video, wanted.get(video, []))
        except Exception as error:
            logger.warning("frames cannot be fetched ahead: %s", error)

    def _constraint(self, config: ResolvedPerception) -> GrammarState | None:
        """What keeps the clues of a round parseable, by the rule that reads them."""
        if not config.constrain_clues:
            return None
        literal = find_strategy(config.strategy).literal_clues
        if literal not in self._grammars:
            self._grammars[literal] = ClueGrammar(self._engine.tokenizer, literal=literal)
        return self._grammars[literal].start()

    def _without_end(self, completion: Completion, sampling: SamplingParams) -> list[int]:
        """The tokens of an answer; the next round's text closes the turn itself."""
        token_ids, ends = completion.token_ids, self._engine.tokenizer.eos_token_ids
        if completion.finish_reason == "stop":
            ends = ends.union(sampling.stop_token_ids or ())
        return token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids

    @staticmethod
    def _settled(request: RoundRequest) -> bool:
        results = request.results
        if not request.perception.stop_when_stable or len(results) < 2:
            return False
        if request.ask.clues is not None:
            return False
        return results[-1].answered == results[-2].answered != ""


def _generations(requests: Sequence[GenerationRequest]) -> _Task:
    """Plain generations: their tokens are not told, their completions are."""
    completions = []
    for request in requests:
        event = yield request
        while isinstance(event, TokenEvent):
            event = yield None
        completions.append(event.completion)
    yield completions


def _told(index: int, region: RawRegion) -> ClueFound:
    """A region with a time and a box is told as its time."""
    kind = "span" if region.span else "box" if region.box else "region"
    return ClueFound(index, kind, region.span or region.box or ())


def _frames_by_video(pairs: Iterable[PairRef]) -> dict[int, list[int]]:
    """Video -> frame indices, repeats included."""
    wanted: dict[int, list[int]] = {}
    for pair in pairs:
        wanted.setdefault(pair.video, []).extend((pair.frame_a, pair.frame_b))
    return wanted


def _letter(text: str, options: Sequence[str]) -> str | None:
    """`text` if it is the letter of an option and nothing else."""
    match = _LETTER.fullmatch(text.strip())
    return text if match is not None and ord(match[1]) - ord("A") < len(options) else None
