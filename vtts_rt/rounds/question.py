"""Question: what a caller asks, checked and with its videos open, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from vtts_rt.config import ResolvedPerception
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion
from vtts_rt.perception.clue import clue_from_json
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.rounds.driver import Ticket
from vtts_rt.rounds.prepare import RoundRequest, prepare
from vtts_rt.rounds.results import (
    Answer,
    AnswerReady,
    RoundEvent,
    RoundFinished,
    RoundResult,
    RoundsEnded,
)
from vtts_rt.rounds.scheduler import Output, RequestFailed
from vtts_rt.sampling import rollout_sampling
from vtts_rt.types import SamplingParams
from vtts_rt.video import FrameSource, FrameStore, open_video

StreamEvent = RoundEvent | AnswerReady


class Question:
    """One question in work. request: for a RoundScheduler; answer: None until it is there.

    Arguments as `Runtime.stream`, checked by `arguments.check_call`; `stack` closes the videos.
    called: `time.monotonic()` of the call, from which timeout_seconds counts. engine: what will
    run it; a first round that is too long for it is refused here, on the caller's thread.
    Raises TimeoutError when its time passes before the videos are open.
    """

    def __init__(
        self,
        stack: ExitStack,
        store: FrameStore,
        engine: Engine,
        called: float,
        video: Any,
        question: str,
        *,
        perception: ResolvedPerception,
        templates: PromptTemplates,
        model: str,
        load_ms: float,
        options: Sequence[str] = (),
        context: str = "",
        sampling: SamplingParams | None = None,
        assume_clues: Sequence[Any] | None = None,
        timeout_seconds: float | None = None,
        member: int | None = None,
        **opening: Any,
    ) -> None:
        self._began = time.perf_counter()
        self._engine = engine
        self._model = model
        self._load_ms = load_ms
        self._results: list[RoundResult] = []
        self.answer: Answer | None = None
        deadline = None
        if timeout_seconds is not None:
            deadline = called + timeout_seconds
        sampling = sampling or SamplingParams()
        clues = None if assume_clues is None else [clue_from_json(item) for item in assume_clues]
        try:
            sources = open_videos(stack, video, deadline_seconds=deadline, **opening)
        except TimeoutError as error:
            raise TimeoutError(
                f"ask: timeout_seconds ({timeout_seconds}) passed before the video was open"
            ) from error
        self.request = RoundRequest(
            question=question,
            videos=[source.metadata for source in sources],
            provider=store.provider(sources),
            perception=perception,
            sampling=sampling if member is None else rollout_sampling(sampling),
            templates=templates,
            options=options,
            context=context,
            assume_clues=clues,
            deadline_seconds=deadline,
            member=member or 0,
        )
        prepare(engine, self.request)

    def seconds_left(self, ticket: Ticket) -> float | None:
        """How long to wait for the next output before the question ends as `timed_out` says. None:
        until it comes, as the driver ends in time what it has begun."""
        deadline = self.request.deadline_seconds
        if deadline is None or ticket.request_id is not None:
            return None
        return max(0.0, deadline - time.monotonic())

    def timed_out(self) -> RoundsEnded:
        """How it ends when its time passes before the driver has begun it."""
        return RoundsEnded("timeout", "", None, self._engine.weights_version)

    def events(self, output: Output) -> list[StreamEvent]:
        """What to tell of an output; the answer follows the last. A failure is raised."""
        if isinstance(output, RequestFailed):
            try:
                raise output.error
            finally:
                del output  # the error's traceback holds this frame
        assert not isinstance(output, Completion)
        if isinstance(output, RoundFinished):
            self._results.append(output.result)
        if not isinstance(output, RoundsEnded):
            return [output]
        request = self.request
        self.answer = Answer(
            text=output.text,
            option=None if output.option is None else chr(65 + output.option),
            stop_reason=output.stop_reason,
            rounds=self._results,
            model=self._model,
            strategy=request.perception.strategy,
            parity=request.perception.parity,
            dialect=request.perception.dialect,
            seed=request.sampling.seed or 0,
            videos=list(request.videos),
            load_ms=self._load_ms,
            total_ms=1e3 * (time.perf_counter() - self._began),
            weights_version=output.weights_version,
        )
        return [output, AnswerReady(self.answer)]


def open_videos(
    stack: ExitStack, video: Any, timestamps_seconds: Any = None, **options: Any
) -> list[FrameSource]:
    """Open a video or a list of them; options as `open_video`. `stack` closes them.

    timestamps_seconds: of a list, a list as long, with None for a video that has times.
    """
    if not isinstance(video, (list, tuple)):
        return [_opened(stack, video, timestamps_seconds, options)]
    if timestamps_seconds is None:
        timestamps_seconds = [None] * len(video)
    both = zip(video, timestamps_seconds, strict=True)
    return [_opened(stack, item, times, options) for item, times in both]


def _opened(stack: ExitStack, video: Any, times: Any, options: dict[str, Any]) -> FrameSource:
    return stack.enter_context(open_video(video, timestamps_seconds=times, **options))
