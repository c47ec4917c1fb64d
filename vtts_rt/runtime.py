"""Runtime: the public face. Owns the frame store, the engine and the rounds."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from vtts_rt import process
from vtts_rt.config import EngineConfig, PerceptionConfig, ResolvedPerception
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion
from vtts_rt.engine.staging import StagedWeights
from vtts_rt.models.quantize import quantize
from vtts_rt.models.qwen2_5_vl import (
    Qwen2_5_VL,
    load_extras,
    load_model,
    resolve_device,
    resolve_model,
    write_checked,
)
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates, prompts_from_dict, resolve_prompts
from vtts_rt.rounds.arguments import check_call, check_requests
from vtts_rt.rounds.batch import Batch
from vtts_rt.rounds.cost import plan_cost
from vtts_rt.rounds.driver import Driver, set_threads
from vtts_rt.rounds.prepare import generation, scoring
from vtts_rt.rounds.question import Question, StreamEvent, open_videos
from vtts_rt.rounds.results import Answer, AnswerReady, RoundEvent
from vtts_rt.rounds.scheduler import RoundScheduler
from vtts_rt.rounds.streams import Opener, complete, stream, stream_async
from vtts_rt.types import Prompt, SamplingParams
from vtts_rt.video import FrameStore

logger = logging.getLogger(__name__)


class Runtime:
    """Answers questions about videos in rounds.

    A context manager. Thread-safe: questions asked from many threads, or as coroutines, run
    together in the same forward passes, and what one decoded, encoded or prefilled serves the
    others.
    It ends with its process, however that ends, and when nothing refers to it any more. A forked
    child makes a Runtime of its own: all methods of its parent's raise RuntimeError there, but for
    `close`, which does nothing.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        templates: PromptTemplates | None = None,
        engine: EngineConfig | None = None,
        frame_store: FrameStore | None = None,
    ) -> None:
        began = time.perf_counter()
        check_call("Runtime", {"engine": engine, "frame_store": frame_store})
        self.name = name
        self.config = engine or EngineConfig()
        set_threads(self.config.threads)
        self._templates = templates or PromptTemplates()
        self._templates.check_control(model.chat)
        self._engine = Engine(model, tokenizer, self.config)
        self._rounds = RoundScheduler(self._engine)
        self._driver = Driver(
            self._rounds, finish=self._engine.close, threads=self.config.threads or None
        )
        weakref.finalize(self, self._driver.begin_closing).atexit = False
        self._own_store = frame_store is None
        if frame_store is None:
            settings = self.config
            frame_store = FrameStore(settings.frame_store_bytes, settings.device_frame_store_bytes)
        self._store = frame_store
        place = model.device
        ordinal = place.index or 0 if place.type == "cuda" else None
        decoder, limits = self.config.decoder, self.config.media_limits
        self._decoding = {"decoder": decoder, "device": ordinal, "limits": limits}
        self._staged = StagedWeights(model)
        self.load_ms = 1e3 * (time.perf_counter() - began)

    @classmethod
    @process.native_calls()
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        quantization: str | None = None,
        engine: EngineConfig | None = None,
        frame_store: FrameStore | None = None,
    ) -> Runtime:
        """Load a Qwen2.5-VL-family checkpoint.

        model: "tiny" (embedded), a local directory, or a hub id. dtype: "auto" is the
        checkpoint's own on an accelerator and float32 on the CPU, where half precision is
        slower; or "float32", "bfloat16", "float16". device: "auto" is cuda where there is one.
        quantization: None, "int8" (a float32 model on the CPU) or "fp8": 8-bit weights of the
        language tower, see `models.quantize`; such a runtime takes no `update_weights`.
        frame_store: decoded frames shared with other users of it (a `RolloutDataFeed`, another
        runtime); it keeps its own budget and is not closed with the runtime.
        Raises ValueError for a checkpoint or a quantization that does not fit, RuntimeError for
        a checkpoint that cannot be had.
        """
        began = time.perf_counter()
        given = {"model": model, "dtype": dtype, "device": device, "quantization": quantization}
        check_call("Runtime", {**given, "engine": engine, "frame_store": frame_store})
        set_threads()
        place = resolve_device(device)
        path = resolve_model(model)
        extras = load_extras(path)
        kind: str | torch.dtype = dtype
        if dtype == "auto" and place.type == "cpu":
            kind = torch.float32
        loaded = load_model(path, dtype=kind, device=place)
        if quantization is not None:
            quantize(loaded, quantization)
        runtime = cls(
            loaded,
            Tokenizer.from_pretrained(path, loaded.chat),
            name=str(model),
            templates=prompts_from_dict(extras.get("prompts", {})),
            engine=engine,
            frame_store=frame_store,
        )
        runtime.load_ms = 1e3 * (time.perf_counter() - began)
        logger.info("loaded %s on %s in %.0f ms", model, place, runtime.load_ms)
        return runtime

    # -- questions --------------------------------------------------------------------------

    def ask(
        self,
        video: Any,
        question: str,
        *,
        on_event: Callable[[RoundEvent], None] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question about a video; arguments as `stream`. `on_event` sees every event."""
        check_call("ask", {"on_event": on_event})
        for event in stream(self._driver, self._opener("ask", video, question, options)):
            if isinstance(event, AnswerReady):
                return event.answer
            if on_event is not None:
                on_event(event)
        raise AssertionError("a stream ends with its answer")

    def ask_batch(
        self, requests: Sequence[Mapping[str, Any]], *, return_exceptions: bool = False
    ) -> list[Any]:
        """Answers in order, all requests at once; each holds the arguments of `ask` by name.

        return_exceptions: put the error of a request that failed in the place of its answer;
        otherwise the first such error is raised once all have ended, and before any has begun
        where the arguments of a request are wrong.
        """
        self._driver.check_process()
        called = time.monotonic()
        refused = check_requests(requests, return_exceptions)

        def open_question(stack: ExitStack, **request: Any) -> Question:
            return self._question(stack, called, **request)

        most = self.config.max_sequences
        outcomes = Batch(self._driver, open_question, requests, most, refused).run()
        del refused
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        try:
            if errors and not return_exceptions:
                raise errors[0]
            return outcomes
        finally:
            del outcomes, errors  # an error's traceback holds this frame

    def ask_group(
        self,
        video: Any,
        question: str,
        *,
        num_answers: int,
        return_exceptions: bool = False,
        **options: Any,
    ) -> list[Any]:
        """Answers of the members 0 .. num_answers - 1 of a rollout group, all at once.

        They share every page of the prompt and branch where their tokens differ; what several
        of them look at in later rounds is decoded and encoded once. Arguments as `stream`, but
        what `sampling` leaves unset is a rollout's (`vtts_rt.sampling.rollout_sampling`);
        return_exceptions as in `ask_batch`: a member that fails does not lose the others.
        """
        request = {"video": video, "question": question, **options}
        given = {"num_answers": num_answers, "return_exceptions": return_exceptions}
        check_call("ask_group", {**request, **given})
        members = [{**request, "member": member} for member in range(num_answers)]
        return self.ask_batch(members, return_exceptions=return_exceptions)

    def stream(self, video: Any, question: str, **options: Any) -> Iterator[StreamEvent]:
        """Events of one question: round_started, token, clue, round_finished, rounds_ended,
        answer. Closing the iterator aborts.

        video: path, bytes, uint8 array (T, H, W, 3) with source_fps, image, or a list of these.
        Keyword arguments, all optional:
        options: texts to choose from, named A, B, ... context: subtitles or other long text.
        perception: PerceptionConfig, sampling: SamplingParams. assume_clues: a clue per round
        that replaces the model's: `[[start, end], ...]` in seconds, or {"spans": ...,
        "boxes": ...} with boxes as fractions of the whole frame; rounds beyond the list use what
        the model says. source_fps, timestamps_seconds: of an array (of a list of videos, a list of
        times or None). start_seconds, end_seconds: the part of the video that exists. decoder,
        limits: as `open_video`, in place of EngineConfig's. timeout_seconds: stop with what there
        is, counted from the call; TimeoutError before the video is open. allow_urls: video may be
        a URL. member: index in a rollout group, part of the noise; `sampling` is then a rollout's.
        """
        return stream(self._driver, self._opener("stream", video, question, options))

    async def ask_async(self, video: Any, question: str, **options: Any) -> Answer:
        """`ask` as a coroutine; cancelling it aborts the question."""
        opener = self._opener("ask_async", video, question, options)
        async for event in stream_async(self._driver, opener):
            if isinstance(event, AnswerReady):
                return event.answer
        raise AssertionError("a stream ends with its answer")

    def stream_async(
        self, video: Any, question: str, **options: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        """`stream` as an asynchronous iterator; closing it or cancelling its task aborts."""
        return stream_async(self._driver, self._opener("stream_async", video, question, options))

    def _opener(
        self, function: str, video: Any, question: str, options: Mapping[str, Any]
    ) -> Opener:
        """A call's question, its arguments checked; its time counts from here on."""
        self._driver.check_process()
        called = time.monotonic()
        check_call(function, {"video": video, "question": question, **options})
        return lambda stack: self._question(stack, called, video, question, **options)

    @process.native_calls()
    def _question(
        self,
        stack: ExitStack,
        called: float,
        video: Any,
        question: str,
        *,
        perception: PerceptionConfig | ResolvedPerception | None = None,
        **options: Any,
    ) -> Question:
        config = self.perception(perception)
        return Question(
            stack,
            self._store,
            self._engine,
            called,
            video,
            question,
            perception=config,
            templates=self._prompts(config),
            model=self.name,
            load_ms=self.load_ms,
            **{**self._decoding, **options},
        )

    def plan(
        self,
        video: Any,
        question: str,
        *,
        options: Sequence[str] = (),
        context: str = "",
        perception: PerceptionConfig | ResolvedPerception | None = None,
        max_tokens: int | None = None,
        **opening: Any,
    ) -> dict[str, Any]:
        """What a question would cost, before any frame is decoded.

        Arguments as `ask`; max_tokens: of a round, 2,048 if None; `opening`: as `open_video`.
        Returns {"model", "strategy", "rounds": [{"index", "exact", "frames", "pairs",
        "vision_tokens", "prompt_tokens"}], "memory_bytes": {"frames", "features", "kv"}}. Round 1
        is exact; a later one is an estimate, all the pairs that its policy would take of views
        as large as the first, because the clue that leads it is not known yet. Memory is what
        all rounds together can fill, before budgets and eviction.
        """
        self._driver.check_process()
        given = {"options": options, "context": context, "max_tokens": max_tokens}
        request = {"video": video, "question": question, "perception": perception}
        check_call("plan", {**request, **given, **opening})
        config = self.perception(perception)
        with process.native_calls(), ExitStack() as stack:
            sources = open_videos(stack, video, **{**self._decoding, **opening})
            return plan_cost(
                self._engine,
                self._prompts(config),
                config,
                [source.metadata for source in sources],
                question=question,
                options=options,
                context=context,
                max_tokens=max_tokens,
                model=self.name,
            )

    def perception(
        self, perception: PerceptionConfig | ResolvedPerception | None = None
    ) -> ResolvedPerception:
        """`perception` with the model's own settings where it leaves them to the model."""
        self._driver.check_process()
        check_call("perception", {"perception": perception})
        if isinstance(perception, ResolvedPerception):
            return perception
        return (perception or PerceptionConfig()).resolve(self._engine.model.config.perception)

    # -- tokens -----------------------------------------------------------------------------

    def generate(self, prompt: str | Prompt, sampling: SamplingParams | None = None) -> Completion:
        """Continue a text prompt (special tokens in it are recognised)."""
        self._driver.check_process()
        return complete(self._driver, generation(self._engine, prompt, sampling))

    def score(self, prompt: str | Prompt, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (natural log) of each token id after a text prompt."""
        self._driver.check_process()
        request = scoring(self._engine, prompt, token_ids)
        return complete(self._driver, request).logprobs if request.forced_ids else []

    # -- upkeep -----------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        self._driver.check_process()
        return self._engine

    def update_weights(
        self,
        tensors: Mapping[str, Tensor],
        *,
        finish: bool = True,
        in_flight: Literal["drain", "abort"] = "drain",
    ) -> None:
        """Replace weights in place: transformers' names, any subset of the checkpoint's, heads too.

        finish: False keeps a copy in host memory; True applies these tensors and all that were
        kept, at once (see `StagedWeights`). in_flight: what becomes of questions in work then:
        "drain" finishes their rounds first, "abort" fails them; none sees two sets of weights.
        KV is dropped if a byte has changed, features if one of the vision tower has. ValueError for
        what does not fit (`check_hf`, NaN too): nothing is changed and what was kept stays.
        """
        check_call("update_weights", {"tensors": tensors, "finish": finish, "in_flight": in_flight})

        def update(whole: dict[str, Tensor]) -> None:
            self._driver.drain(abort=in_flight == "abort")
            if whole:
                self._engine.update_weights(lambda model: write_checked(model, whole))

        last = (lambda whole: self._driver.call(lambda: update(whole))) if finish else None
        self._driver.check_process()
        self._staged.take(tensors, last)

    def discard_staged_weights(self) -> None:
        """Drop what `update_weights(..., finish=False)` has kept."""
        self._driver.check_process()
        self._staged.discard()

    @property
    def weights_version(self) -> int:
        """How many updates were applied since the model was loaded; answers carry it."""
        return self._engine.weights_version

    def stats(self) -> dict[str, Any]:
        """Counters of the scheduler, of every cache and of weights kept for an update."""
        self._driver.check_process()
        kept = {"frame_store": self._store.stats(), "staged_weights": self._staged.stats()}
        return self._engine.stats() | kept

    def clear_caches(self) -> None:
        """Forget decoded frames, features and KV (for cold measurements)."""
        self._driver.check_process()
        self._store.clear()
        self._driver.call(self._engine.clear_caches)

    def close(self) -> None:
        """Fail what is pending or in work, whatever became of its event loop, and give memory back.

        May be called again, from any thread and while others ask.
        """
        if self._driver.close():
            self._staged.discard()
            if self._own_store:
                self._store.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- helpers ----------------------------------------------------------------------------

    def _prompts(self, config: ResolvedPerception) -> PromptTemplates:
        return resolve_prompts(config, self._templates, self._engine.model.chat)
