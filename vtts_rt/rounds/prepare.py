"""From an Ask to rounds: its videos opened, each round planned and encoded before it runs."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from vtts_rt import process
from vtts_rt.checks import check, check_names
from vtts_rt.config import PerceptionConfig, ResolvedPerception, RuntimeConfig
from vtts_rt.engine.engine import Engine
from vtts_rt.errors import BadRequest
from vtts_rt.models.tokenizer import EncodedPrompt, encode_prompt, least_tokens
from vtts_rt.perception.clue import option_letter
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.prompts import PromptTemplates, resolve_prompts
from vtts_rt.perception.strategy import build_prompt, find_strategy, first_pairs, plan_round
from vtts_rt.rounds.ask import CALL_RULES, Ask, OpeningOptions, Perception
from vtts_rt.rounds.results import Answer, RoundResult
from vtts_rt.sampling import rollout_sampling
from vtts_rt.types import Prompt, SamplingParams, StopReason, VideoMetadata, require
from vtts_rt.video import FrameStore, Video, VideoInput, open_video
from vtts_rt.video.store import StoreProvider


@dataclass(eq=False)
class Resources:
    """What all requests of a runtime share.

    templates: the model's own wording. model: its name. device: CUDA ordinal that decodes; None:
    the CPU. load_ms: what loading the model took.
    """

    engine: Engine
    store: FrameStore
    config: RuntimeConfig
    templates: PromptTemplates
    model: str
    device: int | None
    load_ms: float = 0.0
    _pins: list[tuple[str, int, int]] = field(default_factory=list)  # video id, bytes
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def perception(self, perception: Perception | None) -> ResolvedPerception:
        """With the model's own settings where it leaves them to the model."""
        check("perception", CALL_RULES, {"perception": perception})
        model = self.engine.model
        if isinstance(perception, ResolvedPerception):
            given = perception.geometry
            require("perception", "geometry", given, given == model.geometry, "the model's")
            return perception
        return (perception or PerceptionConfig()).resolve(model.geometry, model.config.perception)

    def pin(self, video: Video, perception: Perception | None) -> ExitStack:
        """See `Runtime.pin`."""
        require("pin", "video", video, isinstance(video, Video), "an open Video")
        config, meta = self.perception(perception), video.metadata
        plan = plan_round(config.strategy, config, [meta], [], 0)
        shown = {f for s in plan.segments for p in s.pairs for f in (p.frame_a, p.frame_b)}
        model, tokens = self.engine.model, sum(s.num_tokens for s in plan.segments)
        frames = len(shown) * 3 * meta.height * meta.width
        features = tokens * model.feature_dim * model.dtype.itemsize
        cache, release = self.engine.vision_cache, ExitStack()
        with self._lock:
            left_frames = self.store.budget_for(video) - sum(pin[1] for pin in self._pins)
            left = cache.byte_budget - sum(pin[2] for pin in self._pins)
            ok = frames <= left_frames and features <= left
            rule = f"of a first look that fits: {left_frames} bytes of frames, {left} of features"
            require("pin", "video", (frames, features), ok, rule)
            self._pins.append(pin := (meta.video_id, frames, features))
            release.callback(self._pins.remove, pin)
            for pinned in (self.store.pinned, cache.pinned):
                pinned.append(meta.video_id)
                release.callback(pinned.remove, meta.video_id)
        return release

    def prompts(self, config: ResolvedPerception) -> PromptTemplates:
        return resolve_prompts(config, self.templates, self.engine.model.chat)

    @process.native_calls()
    def open(self, stack: ExitStack, ask: Ask, called: float | None = None) -> list[Video]:
        """Open the videos of an Ask, which `stack` closes; a path that is repeated once.

        called: `time.monotonic()` of the call from which timeout_seconds counts; TimeoutError when
        that passes before the videos are open.
        """
        deadline = deadline_of(ask, called)
        videos: list[Video] = []
        opened: dict[object, Video] = {}
        try:
            for video, times in ask.timed_videos:
                path = os.fspath(video) if isinstance(video, str | os.PathLike) else None
                if path is None or times is not None or path not in opened:
                    source = open_video(
                        video,
                        source_fps=ask.source_fps,
                        timestamps_seconds=times,
                        start_seconds=ask.start_seconds,
                        end_seconds=ask.end_seconds,
                        allow_urls=ask.allow_urls,
                        decoder=ask.decoder or self.config.decoder,
                        device=self.device if ask.device is None else ask.device,
                        limits=ask.limits or self.config.media_limits,
                        deadline_seconds=deadline,
                    )
                    source = source if isinstance(source, Video) else Video(source)
                    opened[path] = stack.enter_context(source)
                videos.append(opened[path])
        except TimeoutError as error:
            raise TimeoutError(
                f"Runtime: timeout_seconds ({ask.timeout_seconds}) passed before the video was open"
            ) from error
        return videos

    def open_one(self, video: VideoInput, opening: OpeningOptions) -> Video:
        """See `Runtime.open`."""
        check_names("open", opening, OpeningOptions.__annotations__)
        require("open", "video", video, not isinstance(video, list | tuple), "one video or image")
        with ExitStack() as stack:
            (source,) = self.open(stack, Ask(video, "open", what="open", **opening))
            stack.pop_all()
            return source


@dataclass(slots=True)
class RoundRequest:
    """One Ask with its videos open, ready to be looked at, and what becomes of it.

    videos: metadata in the order of `provider`'s video indices. perception: with the
    model's defaults applied; all rounds run where the Ask assumes clues. deadline_seconds:
    `time.monotonic()` value. weights_version: for the answer. first: the first round.
    """

    ask: Ask
    videos: list[VideoMetadata]
    provider: StoreProvider
    perception: ResolvedPerception
    sampling: SamplingParams
    templates: PromptTemplates
    resources: Resources
    began: float
    weights_version: int
    deadline_seconds: float | None = None
    history: list[RoundHistory] = field(default_factory=list)
    results: list[RoundResult] = field(default_factory=list)
    first: PreparedRound | None = None

    def answer(self, stop_reason: StopReason) -> Answer:
        """What the rounds so far came to: the answer of the latest that answered."""
        texts = [text for result in reversed(self.results) if (text := result.answered)]
        text, options = texts[0] if texts else "", self.ask.options
        chosen = option_letter(text, options) if text and options else None
        return Answer(
            text=text,
            option=None if chosen is None else chr(ord("A") + chosen),
            stop_reason=stop_reason,
            rounds=self.results,
            model=self.resources.model,
            strategy=self.perception.strategy,
            parity=self.perception.parity,
            video_wrapper=self.perception.video_wrapper,
            dialect=self.perception.dialect,
            seed=self.sampling.seed or 0,
            videos=self.videos,
            load_ms=self.resources.load_ms,
            total_ms=1e3 * (time.perf_counter() - self.began),
            weights_version=self.weights_version,
        )


@dataclass(slots=True)
class PreparedRound:
    """A round before it runs. encoded: with the conversation so far; None where that is too long,
    and num_tokens then a lower bound. began: `time.perf_counter()`."""

    plan: FramePlan
    prompt: Prompt
    encoded: EncodedPrompt | None
    num_tokens: int
    began: float


def open_request(resources: Resources, called: float, ask: Ask, stack: ExitStack) -> RoundRequest:
    """An Ask ready for a RoundScheduler, on the caller's thread. called: as `Resources.open`.

    BadRequest for a first round that is too long for the engine, without the ids of its prompt.
    """
    with process.native_calls():
        request = with_videos_open(resources, called, ask, stack)
        num_pairs = first_pairs(request.perception.strategy, request.perception, request.videos)
        if num_pairs <= resources.engine.token_budget:  # a pair has at least one token
            request.first = prepared_round(request, 0, None)
            if request.first.encoded is not None:
                return request
            num_pairs = request.first.num_tokens
    raise too_long("ask", resources.engine, num_pairs, fewest_new(request.sampling))


def with_videos_open(
    resources: Resources, called: float, ask: Ask, stack: ExitStack
) -> RoundRequest:
    """An Ask of which nothing is planned yet. called, stack: as `Resources.open`."""
    began = time.perf_counter()
    config = resources.perception(ask.perception)
    sources = resources.open(stack, ask, called)
    sampling = ask.sampling or SamplingParams()
    return RoundRequest(
        ask,
        [source.metadata for source in sources],
        resources.store.provider(sources),
        config,
        sampling if ask.member is None else rollout_sampling(sampling),
        resources.prompts(config),
        resources,
        began,
        resources.engine.weights_version,
        deadline_of(ask, called),
    )


def deadline_of(ask: Ask, called: float | None) -> float | None:
    """`time.monotonic()` value by which an Ask that was called then is to be answered."""
    if called is None or ask.timeout_seconds is None:
        return None
    return called + ask.timeout_seconds


def prepared_round(
    request: RoundRequest, index: int, conversation: EncodedPrompt | None
) -> PreparedRound:
    """Plan and encode a round; conversation: what a strategy that continues goes on with. Uses
    nothing that changes: any thread may call it."""
    began = time.perf_counter()
    config = request.perception
    plan = plan_round(config.strategy, config, request.videos, request.history, index)
    prompt = round_prompt(request, plan)
    before = conversation if find_strategy(config.strategy).continues else None
    engine, num_new = request.resources.engine, fewest_new(request.sampling)
    return PreparedRound(plan, prompt, *encode_fitting(engine, prompt, num_new, before), began)


def round_prompt(request: RoundRequest, plan: FramePlan) -> Prompt:
    """What the round of a plan adds to the conversation, or all of its prompt."""
    return build_prompt(
        request.perception,
        request.resources.engine.model.chat,
        request.templates,
        plan,
        request.history,
        question=request.ask.question,
        options=request.ask.options,
        context=request.ask.context,
    )


def encode_fitting(
    engine: Engine, prompt: Prompt, num_new: int, before: EncodedPrompt | None = None
) -> tuple[EncodedPrompt | None, int]:
    """A prompt behind `before`, and its tokens; None and a lower bound where `num_new` more do not
    fit the engine, then without the ids of most of it."""
    room, num_tokens = engine.token_budget - num_new, 0 if before is None else len(before)
    num_tokens += least_tokens(engine.tokenizer, prompt, room - num_tokens)
    if num_tokens > room:
        return None, num_tokens
    encoded = encode_prompt(engine.tokenizer, prompt)
    encoded = encoded if before is None else before + encoded
    return (encoded if len(encoded) <= room else None), len(encoded)


def too_long(
    what: str, engine: Engine, num_tokens: int, num_new: int, new: str = "max_tokens"
) -> BadRequest:
    """The refusal of a prompt of at least `num_tokens`. new: what brings `num_new` more."""
    remedy = "lower total_pixels, max_frames or max_tokens, or raise kv_bytes"
    return BadRequest(
        f"{what}: prompt plus {new} must be <= {engine.token_budget} tokens, got at least "
        f"{num_tokens} + {num_new}; {remedy}"
    )


def fewest_new(sampling: SamplingParams) -> int:
    """Tokens of an answer that must fit: max_tokens, or one where it is cut to what fits."""
    return sampling.max_tokens or 1
