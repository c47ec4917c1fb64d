"""Runtime: the public face. Owns the frame store, the engine and the rounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vtts_rt.config import EngineConfig, PerceptionConfig
from vtts_rt.cost import plan_cost
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, FinishedEvent, GenerationRequest
from vtts_rt.models.qwen2_5_vl import Qwen2_5_VL, load_extras, load_model, resolve_model
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer, encode_prompt
from vtts_rt.perception.clue import clue_from_json
from vtts_rt.perception.prompts import PromptTemplates, load_prompts, prompts_from_dict
from vtts_rt.results import (
    Answer,
    AnswerReady,
    RoundEvent,
    RoundFinished,
    RoundResult,
    RoundsEnded,
)
from vtts_rt.rounds import RoundRequest, RoundScheduler
from vtts_rt.types import Prompt, SamplingParams, require
from vtts_rt.video import FrameSource, FrameStore, open_video

logger = logging.getLogger(__name__)


class Runtime:
    """Answers questions about videos in rounds.

    A context manager. Not thread-safe: one question at a time; what one question decoded,
    encoded or prefilled serves the next.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        templates: PromptTemplates | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        began = time.perf_counter()
        self.name = name
        self.config = engine or EngineConfig()
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        self._templates = templates or PromptTemplates()
        self._engine = Engine(model, tokenizer, self.config)
        self._store = FrameStore(self.config.frame_store_bytes)
        self.load_ms = 1e3 * (time.perf_counter() - began)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        engine: EngineConfig | None = None,
    ) -> Runtime:
        """Load a Qwen2.5-VL-family checkpoint.

        model: "tiny" (embedded), a local directory, or a hub id. dtype: "auto" is the
        checkpoint's own on an accelerator and float32 on the CPU, where half precision is
        slower; or "float32", "bfloat16", "float16". device: "auto" is cuda where there is one.
        Raises ValueError for a checkpoint that does not fit, RuntimeError for one that cannot
        be had.
        """
        began = time.perf_counter()
        place = _device(device)
        path = resolve_model(model)
        extras = load_extras(path)
        kind: str | torch.dtype = dtype
        if dtype == "auto" and place.type == "cpu":
            kind = torch.float32
        runtime = cls(
            load_model(path, dtype=kind, device=place),
            Tokenizer.from_pretrained(path),
            name=str(model),
            templates=prompts_from_dict(extras.get("prompts", {})),
            engine=engine,
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
        for event in self.stream(video, question, **options):
            if isinstance(event, AnswerReady):
                return event.answer
            if on_event is not None:
                on_event(event)
        raise AssertionError("a stream ends with its answer")

    def ask_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answers in order; each request holds the arguments of `ask` by name."""
        return [self.ask(**request) for request in requests]

    def stream(
        self,
        video: Any,
        question: str,
        *,
        options: Sequence[str] = (),
        context: str = "",
        perception: PerceptionConfig | None = None,
        sampling: SamplingParams | None = None,
        assume_clues: Sequence[Any] | None = None,
        source_fps: float | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        timeout_seconds: float | None = None,
        allow_urls: bool = False,
        member: int = 0,
    ) -> Iterator[RoundEvent | AnswerReady]:
        """Events of one question: round_started, token, clue, round_finished, rounds_ended,
        answer. Closing the iterator aborts.

        video: path, bytes, uint8 array (T, H, W, 3) with source_fps, image, or a list of these.
        options: texts to choose from, named A, B, ... context: subtitles or other long text.
        assume_clues: a clue per round that replaces the model's: `[[start, end], ...]` in
        seconds, or {"spans": ..., "boxes": ...} with boxes as fractions of the whole frame;
        rounds beyond the list use what the model says. start_seconds, end_seconds: the part of
        the video that exists. timeout_seconds: stop with what there is. member: index in a
        rollout group, part of the sampling noise.
        """
        began = time.perf_counter()
        deadline = None
        if timeout_seconds is not None:
            require("ask", "timeout_seconds", timeout_seconds, timeout_seconds > 0, "> 0")
            deadline = time.monotonic() + timeout_seconds
        config = self.perception(perception)
        require("ask", "options", options, not isinstance(options, str), "a list of texts")
        clues = None if assume_clues is None else [clue_from_json(item) for item in assume_clues]
        sampling = sampling or SamplingParams()
        with ExitStack() as stack:
            sources = self._open(
                stack,
                video,
                source_fps=source_fps,
                start_seconds=start_seconds,
                end_seconds=end_seconds,
                allow_urls=allow_urls,
            )
            videos = [source.metadata for source in sources]
            results: list[RoundResult] = []
            rounds = RoundScheduler(self._engine, self._prompts(config)).run(
                RoundRequest(
                    question=question,
                    videos=videos,
                    provider=self._store.provider(sources),
                    perception=config,
                    sampling=sampling,
                    options=options,
                    context=context,
                    assume_clues=clues,
                    deadline_seconds=deadline,
                    member=member,
                )
            )
            for event in rounds:
                yield event
                if isinstance(event, RoundFinished):
                    results.append(event.result)
                elif isinstance(event, RoundsEnded):
                    assert config.strategy is not None
                    yield AnswerReady(
                        Answer(
                            text=event.text,
                            option=None if event.option is None else chr(65 + event.option),
                            stop_reason=event.stop_reason,
                            rounds=results,
                            model=self.name,
                            strategy=config.strategy,
                            mrope=config.mrope,
                            seed=sampling.seed,
                            videos=videos,
                            load_ms=self.load_ms,
                            total_ms=1e3 * (time.perf_counter() - began),
                        )
                    )

    def plan(
        self,
        video: Any,
        question: str,
        *,
        options: Sequence[str] = (),
        context: str = "",
        perception: PerceptionConfig | None = None,
        max_tokens: int = 512,
        **opening: Any,
    ) -> dict[str, Any]:
        """What a question would cost, before any frame is decoded.

        Arguments as `ask`; `opening`: source_fps, start_seconds, end_seconds, allow_urls.
        Returns {"model", "strategy", "rounds": [{"index", "exact", "frames", "pairs",
        "vision_tokens", "prompt_tokens"}], "memory_bytes": {"frames", "features", "kv"}}. Round 1
        is exact; a later one is an estimate, all the pairs that its policy would take of views
        as large as the first, because the clue that leads it is not known yet. Memory is what
        all rounds together can fill, before budgets and eviction.
        """
        config = self.perception(perception)
        require("ask", "options", options, not isinstance(options, str), "a list of texts")
        with ExitStack() as stack:
            sources = self._open(stack, video, **opening)
            videos = [source.metadata for source in sources]
        return plan_cost(
            self._engine,
            self._prompts(config),
            config,
            videos,
            question=question,
            options=options,
            context=context,
            max_tokens=max_tokens,
            model=self.name,
        )

    def perception(self, perception: PerceptionConfig | None = None) -> PerceptionConfig:
        """`perception` with the model's own defaults where nothing was passed."""
        defaults = {"strategy": "official", **self._engine.model.config.perception}
        return (perception or PerceptionConfig()).with_defaults(defaults)

    # -- tokens -----------------------------------------------------------------------------

    def generate(self, prompt: str | Prompt, sampling: SamplingParams | None = None) -> Completion:
        """Continue a text prompt (special tokens in it are recognised)."""
        request = GenerationRequest(self._encode(prompt), sampling=sampling or SamplingParams())
        for event in self._engine.generate(request):
            if isinstance(event, FinishedEvent):
                return event.completion
        raise AssertionError("a generation ends with its completion")

    def score(self, prompt: str | Prompt, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (natural log) of each token id after a text prompt."""
        return self._engine.score(GenerationRequest(self._encode(prompt)), list(token_ids))

    def _encode(self, prompt: str | Prompt) -> EncodedPrompt:
        whole = Prompt((prompt,)) if isinstance(prompt, str) else prompt
        if whole.segments:
            raise ValueError("generate: prompt must be text only, got vision segments; use ask")
        return encode_prompt(self._engine.tokenizer, whole)

    # -- upkeep -----------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        return self._engine

    def stats(self) -> dict[str, Any]:
        """Counters of every cache."""
        return {**self._engine.stats(), "frame_store": self._store.stats()}

    def clear_caches(self) -> None:
        """Forget decoded frames, features and KV (for cold measurements)."""
        self._store.clear()
        self._engine.clear_caches()

    def close(self) -> None:
        self._engine.close()
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

    def _prompts(self, config: PerceptionConfig) -> PromptTemplates:
        if config.prompts is None:
            return self._templates
        return load_prompts(config.prompts, base=self._templates)

    @staticmethod
    def _open(stack: ExitStack, video: Any, **options: Any) -> list[FrameSource]:
        many = list(video) if isinstance(video, (list, tuple)) else [video]
        require("ask", "video", video, len(many) > 0, "at least one video or image")
        return [stack.enter_context(open_video(item, **options)) for item in many]


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"Runtime: device must be auto, cpu or cuda[:n], got {device!r}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("Runtime: no CUDA device is available; use device='cpu'")
    return place
