"""What tests of the engine share: random frames, small prompts, an engine over a small model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vtts_rt.config import EngineConfig
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, FailedEvent, FinishedEvent, GenerationRequest
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer, encode_prompt
from vtts_rt.ops import native
from vtts_rt.types import PairRef, PixelBox, Prompt, SamplingParams, Segment, TimeLabel

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
# A test in the types that models are served in: what is said is the same to the bit in any batch.
needs_native = pytest.mark.skipif(
    native.supports("cpu") is not None, reason="torch sums a row as its batch has it"
)


def in_dtypes(test: Any) -> Any:
    dtypes = pytest.mark.parametrize(
        "model", [torch.float32, torch.bfloat16], indirect=True, ids=["float32", "bfloat16"]
    )
    return needs_native(dtypes(test))


class Frames:
    """A provider of random frames that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.error: Exception | None = None

    def prefetch(self, video: int, frame_indices: Sequence[int]) -> None:
        pass

    def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
        return True

    def frames(self, video: int, frame_indices: Sequence[int]) -> list[np.ndarray]:
        if self.error is not None:
            raise self.error
        self.asked += frame_indices
        return [self.frame(index) for index in frame_indices]

    @staticmethod
    def frame(index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def make_engine(
    model: Any, tokenizer: Tokenizer, *, num_pages: int | None = None, **config: int
) -> Engine:
    kv_bytes = 1 << 20 if num_pages is None else num_pages * model.kv.bytes_of(4)
    return Engine(model, tokenizer, EngineConfig(**{"page_size": 4, "kv_bytes": kv_bytes} | config))


def pair(a: int, b: int | None = None) -> PairRef:
    return PairRef(0, "v", a, a if b is None else b, float(a))


WHOLE = PixelBox(0, 0, 90, 60)


def look(*pairs: PairRef, box: PixelBox = WHOLE) -> Segment:
    return Segment(pairs, box, (56, 84), GEOMETRY)


def encode(tokenizer: Tokenizer, *parts: str | TimeLabel | Segment) -> EncodedPrompt:
    return encode_prompt(tokenizer, Prompt(parts))


def run(engine: Engine, prompt: EncodedPrompt, provider: Frames | None = None, **more: Any):
    request = GenerationRequest(prompt, provider=provider, **{"sampling": GREEDY} | more)
    return finish(stream(engine, request))


def stream(engine: Engine, request: GenerationRequest) -> Iterator[Any]:
    """The events of one request to its end; its error is raised."""
    request_id = engine.add(request)
    while engine.has_work:
        for event in engine.step():
            if event.request_id != request_id:
                continue
            if isinstance(event, FailedEvent):
                raise event.error
            yield event
            if isinstance(event, FinishedEvent):
                return


def score(engine: Engine, prompt: EncodedPrompt, tokens: list[int], **more: Any) -> list[float]:
    """Log-probabilities of tokens after a prompt."""
    return finish(stream(engine, GenerationRequest(prompt, forced_ids=tokens, **more))).logprobs


def finish(events: Iterator[Any]) -> Completion:
    (last,) = [event for event in events if isinstance(event, FinishedEvent)]
    return last.completion


def run_all(engine: Engine, requests: list[GenerationRequest]) -> list[Completion]:
    """All requests at once, checking the engine after every step."""
    ids = [engine.add(request) for request in requests]
    ends: dict[int, Completion] = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                ends[event.request_id] = event.completion
        engine.check_integrity()
    return [ends[request_id] for request_id in ids]
