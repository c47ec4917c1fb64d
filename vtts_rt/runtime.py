"""Runtime: the public face. Owns the frame store, the engine and the rounds."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from vtts_rt import process
from vtts_rt.checks import check
from vtts_rt.config import EngineConfig, ResolvedPerception, RuntimeConfig
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion
from vtts_rt.engine.staging import StagedWeights
from vtts_rt.models.base import VideoLM
from vtts_rt.models.quantize import quantize
from vtts_rt.models.registry import load_extras, load_model, resolve_device, resolve_model
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates, prompts_from_dict
from vtts_rt.rounds.ask import (
    CALL_RULES,
    Ask,
    AskInput,
    AskOptions,
    AskRequest,
    Listener,
    OpeningOptions,
    Perception,
    Videos,
    read_ask,
    read_requests,
)
from vtts_rt.rounds.batch import Batch
from vtts_rt.rounds.chat import ChatMessage, ChatOptions, chat
from vtts_rt.rounds.cost import Cost, plan_cost
from vtts_rt.rounds.driver import Driver, set_threads
from vtts_rt.rounds.prepare import Resources, open_request
from vtts_rt.rounds.results import Answer, Reply, RoundEvent
from vtts_rt.rounds.rollouts import RolloutGroup, RolloutOptions, rollouts, rollouts_async
from vtts_rt.rounds.scheduler import RoundScheduler
from vtts_rt.rounds.streams import Opener, answered, answered_async, stream, stream_async
from vtts_rt.rounds.tokens import features, generate, score
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.types import Prompt, SamplingParams
from vtts_rt.video import FrameStore, Video, VideoInput

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        model: VideoLM,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        templates: PromptTemplates | None = None,
        engine: EngineConfig | None = None,
        config: RuntimeConfig | None = None,
        frame_store: FrameStore | None = None,
    ) -> None:
        began = time.perf_counter()
        given = {"engine": engine, "config": config, "frame_store": frame_store}
        check("Runtime", CALL_RULES, given)
        self.name = name
        self.config = config = config or RuntimeConfig()
        set_threads(config.threads)
        templates = (templates or PromptTemplates()).fit_for(model.chat)
        core = Engine(model, tokenizer, engine or EngineConfig())
        self._driver = Driver(
            RoundScheduler(core, speculative_fetch=config.speculative_fetch),
            finish=core.close,
            threads=config.threads or None,
            max_requests=core.config.max_sequences + config.max_queued_requests,
        )
        self._own_store = frame_store is None
        if frame_store is None:
            frame_store = FrameStore(config.frame_store_bytes, config.device_frame_store_bytes)
        device = model.device.index or 0 if model.device.type == "cuda" else None
        self._resources = Resources(core, frame_store, config, templates, name, device)
        # Requests hold them too: a stream goes on when nothing else refers to its runtime.
        weakref.finalize(self._resources, self._driver.begin_closing).atexit = False
        self._staged = StagedWeights(model)
        self._resources.load_ms = 1e3 * (time.perf_counter() - began)

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
        config: RuntimeConfig | None = None,
        frame_store: FrameStore | None = None,
    ) -> Runtime:
        """Load a checkpoint of a known family (models/registry.py).

        model: "tiny" (embedded), a local directory, or a hub id. dtype: "float32", "bfloat16",
        "float16" or "auto": the checkpoint's own on an accelerator; on the CPU bfloat16 of a
        bfloat16 checkpoint where the processor has AVX512_BF16 or AMX, else float32, or what the
        checkpoint's recipe says. device: "auto" is cuda where there is one.
        quantization: None, "int8" (on the CPU) or "fp8": 8-bit weights of the language tower,
        see `models.quantize`; such a runtime takes no `update_weights`.
        engine, config: settings of the engine, and of media, frames and admission.
        frame_store: decoded frames shared with other users of it (a `RolloutDataFeed`, another
        runtime); it keeps its own budget and is not closed with the runtime.
        Raises ValueError for a checkpoint or a quantization that does not fit, RuntimeError for
        a checkpoint that cannot be had.
        """
        began = time.perf_counter()
        given = {"model": model, "dtype": dtype, "device": device, "quantization": quantization}
        configs = {"engine": engine, "config": config, "frame_store": frame_store}
        check("Runtime", CALL_RULES, {**given, **configs})
        set_threads()
        place = resolve_device(device)
        path = resolve_model(model)
        extras = load_extras(path)
        loaded = load_model(path, dtype=dtype, device=place)
        if quantization is not None:
            quantize(loaded, quantization)
        runtime = cls(
            loaded,
            Tokenizer.from_pretrained(path, loaded.chat),
            name=str(model),
            templates=prompts_from_dict(extras.get("prompts", {})),
            engine=engine,
            config=config,
            frame_store=frame_store,
        )
        runtime._resources.load_ms = load_ms = 1e3 * (time.perf_counter() - began)
        logger.info("loaded %s on %s in %.0f ms", model, place, load_ms)
        return runtime

    # -- questions --------------------------------------------------------------------------

    def open(self, video: VideoInput, **opening: Unpack[OpeningOptions]) -> Video:
        """Open a video once, for any number of questions; a context manager.

        `ask` and the others take it in place of a path. It may be closed while they run.
        Keyword arguments, checks and errors as those of a question that opens it itself (Ask).
        """
        self._driver.check_process()
        return self._resources.open_one(video, opening)

    def pin(self, video: Video, perception: Perception | None = None) -> ExitStack:
        """Keep the cached frames and features of an open video from eviction, those to come too,
        until what is returned is closed; a context manager.

        BadRequest where the frames and features of a first look do not fit the budgets, less those
        of other pins. `clear_caches`, `sleep` and new weights of the tower drop pinned ones too.
        """
        self._driver.check_process()
        return self._resources.pin(video, perception)

    def ask(
        self,
        video: AskInput,
        question: str = "",
        *,
        on_event: Listener | None = None,
        **options: Unpack[AskOptions],
    ) -> Answer:
        """Answer a question about a video; arguments as `stream`. `on_event` sees every event."""
        check("ask", CALL_RULES, {"on_event": on_event})
        opener = self._opener("ask", video, question, options)
        return answered(stream(self._driver, opener), on_event)

    @overload
    def ask_batch(
        self, requests: Sequence[AskRequest], *, return_exceptions: Literal[False] = False
    ) -> list[Answer]: ...
    @overload
    def ask_batch(
        self, requests: Sequence[AskRequest], *, return_exceptions: bool
    ) -> list[Answer | Exception]: ...
    def ask_batch(
        self, requests: Sequence[AskRequest], *, return_exceptions: bool = False
    ) -> list[Answer] | list[Answer | Exception]:
        """Answers in order, all requests at once; each an Ask or the arguments of `ask` by name.

        return_exceptions: put the error of a request that failed in the place of its answer;
        otherwise the first such error is raised once all have ended, and before any has begun
        where the arguments of a request are wrong.
        """
        self._driver.check_process()
        called, read = time.monotonic(), read_requests(requests, return_exceptions)
        return Batch(self._driver, self._resources, called, read).run(return_exceptions)

    def rollouts(
        self, ask: Ask, num_answers: int, **options: Unpack[RolloutOptions]
    ) -> RolloutGroup:
        """Sampled answers of the members 0 .. num_answers - 1 of a rollout group, all at once.

        Videos are opened and the prompt is prefilled once, members branch where their tokens
        differ, what several look at is decoded and encoded once. All see the same weights. What
        `sampling` leaves unset is a rollout's (`vtts_rt.sampling.rollout_sampling`).
        timeout_seconds holds for each member, which answers with what it has; one that fails loses
        no other. options: see RolloutOptions. BadRequest also for one answer and for temperature 0;
        else errors as those of `ask` before the videos are open.
        """
        self._driver.check_process()
        return rollouts(self._driver, self._resources, ask, num_answers, options)

    async def rollouts_async(
        self, ask: Ask, num_answers: int, **options: Unpack[RolloutOptions]
    ) -> RolloutGroup:
        """`rollouts` as a coroutine; cancelling it aborts the group."""
        self._driver.check_process()
        return await rollouts_async(self._driver, self._resources, ask, num_answers, options)

    def stream(
        self, video: AskInput, question: str = "", **options: Unpack[AskOptions]
    ) -> Iterator[RoundEvent]:
        """Events of one question: round_started, token, clue, round_finished, at the end answer.
        Closing the iterator aborts.

        video: path, bytes, uint8 array (T, H, W, 3) with source_fps, image, open Video, or a list
        of these; or an Ask, which holds all the rest. options: the keyword arguments of Ask.
        Raises BadRequest at the call for an argument, BadMedia for a video, Overloaded where too
        many wait, Aborted where the runtime ends it, TimeoutError before the video is open.
        """
        return stream(self._driver, self._opener("stream", video, question, options))

    async def ask_async(
        self, video: AskInput, question: str = "", **options: Unpack[AskOptions]
    ) -> Answer:
        """`ask` as a coroutine; cancelling it aborts the question."""
        opener = self._opener("ask_async", video, question, options)
        return await answered_async(stream_async(self._driver, opener))

    def stream_async(
        self, video: AskInput, question: str = "", **options: Unpack[AskOptions]
    ) -> AsyncGenerator[RoundEvent, None]:
        """`stream` as an asynchronous iterator; closing it or cancelling its task aborts."""
        return stream_async(self._driver, self._opener("stream_async", video, question, options))

    def _opener(self, function: str, video: AskInput, question: str, options: AskOptions) -> Opener:
        """A call's question, its arguments checked; its time counts from here on."""
        self._driver.check_process()
        called = time.monotonic()
        ask = read_ask(function, video, question, options)
        return partial(open_request, self._resources, called, ask)

    def plan(
        self,
        video: AskInput,
        question: str = "",
        *,
        max_tokens: int | None = None,
        **options: Unpack[AskOptions],
    ) -> Cost:
        """What a question would cost, before any frame is decoded.

        Arguments as `ask`; max_tokens: of a round; None: those of `sampling`, else 2,048.
        """
        self._driver.check_process()
        called, ask = time.monotonic(), read_ask("plan", video, question, options)
        check("plan", CALL_RULES, {"max_tokens": max_tokens})
        return plan_cost(self._resources, called, ask, max_tokens)

    def perception(self, perception: Perception | None = None) -> ResolvedPerception:
        """`perception` with the model's own settings where it leaves them to the model."""
        self._driver.check_process()
        return self._resources.perception(perception)

    # -- tokens -----------------------------------------------------------------------------

    def generate(self, prompt: str | Prompt, sampling: SamplingParams | None = None) -> Completion:
        """Continue a text prompt (special tokens in it are recognised)."""
        self._driver.check_process()
        return generate(self._driver, self._resources.engine, prompt, sampling)

    def chat(self, messages: Sequence[ChatMessage], **options: Unpack[ChatOptions]) -> Reply:
        """Answer a conversation about videos and images, without rounds.

        messages: {"role": "system", "user" or "assistant", "content": a text or a list of parts},
        parts as OpenAI's: {"type": "text", "text": ...}, {"type": "image" or "video", <type>: what
        `ask` takes}, {"type": "image_url" or "video_url", <type>: {"url": ...}}, where data URLs
        need no allow_urls. Frames are those of a first round of `official`. options: those of an
        Ask that ChatOptions names; times of arrays count all images and videos in order. Errors as
        those of `ask`.
        """
        self._driver.check_process()
        return chat(self._driver, self._resources, messages, options, time.monotonic())

    def score(
        self,
        prompt: str | Prompt | Transcript,
        token_ids: Sequence[int] | None = None,
        *,
        videos: Videos = None,
    ) -> list[float]:
        """Log-probability (natural log) of token ids after a text prompt, or of what the model said
        in a transcript, all by the current weights, without sampling (`logprobs="raw"`).

        videos: of the transcript, for features that are no longer cached: as they were given, or
        opened alike. BadRequest where they are needed and missing.
        """
        self._driver.check_process()
        return score(self._driver, self._resources, prompt, token_ids, videos)

    def features(self, transcript: Transcript, *, videos: Videos = None) -> Tensor:
        """(tokens of all vision segments in order, feature_dim): what stands in the rows of a
        transcript's pads, by the current tower; model's dtype and device. videos: as `score`."""
        self._driver.check_process()
        return features(self._driver, self._resources, transcript, videos)

    # -- upkeep -----------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        self._driver.check_process()
        return self._resources.engine

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
        what does not fit (`VideoLM.check`, NaN too): nothing is changed and what was kept stays.
        """
        given = {"tensors": tensors, "finish": finish, "in_flight": in_flight}
        check("update_weights", CALL_RULES, given)

        def update(whole: dict[str, Tensor]) -> None:
            abort = "an update of the weights" if in_flight == "abort" else ""
            write = partial(engine.update_weights, lambda model: model.write(whole))
            self._driver.call_idle(write if whole else lambda: None, abort)

        engine = self.engine
        self._staged.take(tensors, update if finish else None)

    def discard_staged_weights(self) -> None:
        """Drop what `update_weights(..., finish=False)` has kept."""
        self._driver.check_process()
        self._staged.discard()

    @property
    def weights_version(self) -> int:
        """How many updates were applied since the model was loaded; answers carry it."""
        return self.engine.weights_version

    def sleep(self, *, in_flight: Literal["drain", "abort"] = "drain") -> None:
        """Free the memory of KV, features and frames, and move the weights to host memory.

        Until `wake` requests are refused with RuntimeError, and `update_weights` writes to the
        weights where they are. On the CPU they stay. in_flight: as in `update_weights`.
        """
        check("sleep", CALL_RULES, {"in_flight": in_flight})
        engine, store = self.engine, self._resources.store
        self._driver.call_idle(engine.sleep, "sleep" if in_flight == "abort" else "")
        store.clear()

    def wake(self) -> None:
        """Undo `sleep`; the caches are empty."""
        self._driver.call(self.engine.wake)

    def stats(self) -> Mapping[str, Mapping[str, int]]:
        """Counters of the scheduler, of every cache and of weights kept for an update."""
        self._driver.check_process()
        store, staged = self._resources.store.stats(), self._staged.stats()
        return self.engine.stats() | {"frame_store": store, "staged_weights": staged}

    def clear_caches(self) -> None:
        """Forget decoded frames, features and KV (for cold measurements)."""
        self._driver.check_process()
        self._resources.store.clear()
        self._driver.call(self.engine.clear_caches)

    def close(self) -> None:
        """Fail what is pending or in work, also where its event loop has ended; free memory.

        May be called again, from any thread and while others ask.
        """
        if self._driver.close():
            self._staged.discard()
            if self._own_store:
                self._resources.store.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
