"""What the engine is asked for, what it is working on, and what it gives back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer
from vtts_rt.types import (
    FrameProvider,
    MropeMode,
    ReuseStats,
    RoundTimings,
    SamplingParams,
    Segment,
)

FinishReason = Literal["stop", "length", "timeout", "aborted"]

# Vision token keys are negative, so no token id can equal one; one content id spans this many
# tokens (a pair has at most 16384: transformers' largest image, 12845056 px / 784).
_CONTENT_STRIDE = 1 << 20


@dataclass(slots=True)
class GenerationRequest:
    """One prompt to continue.

    provider: where pixels come from; only asked for pairs that no cache has.
    round_index, member: coordinates of the sampling noise. deadline_seconds: a
    `time.monotonic()` value after which the request ends with what it has, or None.
    """

    prompt: EncodedPrompt
    provider: FrameProvider | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    mrope: MropeMode = "qwen"
    round_index: int = 0
    member: int = 0
    deadline_seconds: float | None = None


@dataclass(slots=True)
class Completion:
    """What one request produced.

    text: without special tokens and stop texts; logprobs: natural log, of each token under
    the distribution it was drawn from.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    reuse: ReuseStats
    timings: RoundTimings


@dataclass(slots=True)
class TokenEvent:
    """One generated token; text is what it adds (empty inside a UTF-8 character)."""

    request_id: int
    token_id: int
    logprob: float
    text: str


@dataclass(slots=True)
class FinishedEvent:
    request_id: int
    completion: Completion


@dataclass(slots=True)
class FailedEvent:
    """The request ended with an error; others go on."""

    request_id: int
    error: Exception


class ContentIds:
    """Small integers for pair keys, so that token keys are plain int64.

    Interning compares whole keys: two contents never share an id.
    """

    def __init__(self) -> None:
        self._ids: dict[Hashable, int] = {}

    def token_keys(self, pair_key: Hashable, num_tokens: int) -> np.ndarray:
        """(num_tokens,) int64 keys of a pair's tokens."""
        content = self._ids.setdefault(pair_key, len(self._ids))
        return -1 - (content * _CONTENT_STRIDE + np.arange(num_tokens, dtype=np.int64))


class TextStream:
    """Detokenises a growing answer and watches for stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._stop = stop
        self._held = max((len(s) - 1 for s in stop), default=0)
        self._emitted = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is now safe to show; sets `stopped` when a stop text is complete."""
        self.text += self._decoder.push(token_id)
        ends = [at for s in self._stop if (at := self.text.find(s)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self.stopped = True
        # A stop text may have begun in the last characters: keep them back until it is settled.
        safe = len(self.text) if self.stopped else max(len(self.text) - self._held, self._emitted)
        return self._take(safe)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        if not self.stopped:
            self.text += self._decoder.finish()
        return self._take(len(self.text))

    def _take(self, end: int) -> str:
        piece, self._emitted = self.text[self._emitted : end], max(end, self._emitted)
        return piece


class Sequence:
    """One request in work: its tokens, their keys and the KV pages that hold them.

    keys: (N, 4) int64, token or content id then M-RoPE t, h, w; num_computed: leading tokens
    whose KV is in `pages`. num_new: tokens that may be appended to the prompt.
    """

    def __init__(
        self,
        request_id: int,
        request: GenerationRequest,
        *,
        num_new: int,
        positions: MropePositions,
        pair_keys: list[list[Hashable]],
        content_ids: ContentIds,
        text: TextStream,
    ) -> None:
        prompt = request.prompt
        self.request_id = request_id
        self.request = request
        self.pair_keys = pair_keys
        self.text = text
        self.token_ids: list[int] = list(prompt.token_ids)
        self.logprobs: list[float] = []
        self.pages: list[int] = []
        self.num_computed = 0
        self.reuse = ReuseStats()
        self.timings = RoundTimings()
        self._keys = np.empty((len(prompt.token_ids) + num_new, 4), np.int64)
        self._keys[: self.num_prompt, 0] = prompt.token_ids
        for span, keys in zip(prompt.spans, pair_keys, strict=True):
            per_pair = span.segment.tokens_per_pair
            for index, key in enumerate(keys):
                start = span.start + index * per_pair
                self._keys[start : start + per_pair, 0] = content_ids.token_keys(key, per_pair)
        self._keys[: self.num_prompt, 1:] = build_position_ids(prompt, positions).T
        # Generated tokens continue after the largest position (transformers' rope_delta).
        self._next_position = positions.end_position

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: len(self.token_ids)]

    def append(self, token_id: int, logprob: float) -> None:
        index = len(self.token_ids)
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self._keys[index] = token_id, *(self._next_position,) * 3
        self._next_position += 1

    def pairs_within(self, num_tokens: int) -> int:
        """Frame pairs whose tokens all stand in the first `num_tokens`."""
        return sum(
            min(len(span.segment.pairs), (num_tokens - span.start) // span.segment.tokens_per_pair)
            for span in self.request.prompt.spans
            if num_tokens > span.start
        )

    def segments_between(self, start: int, end: int) -> list[tuple[int, Segment, list[int]]]:
        """Vision in tokens [start, end): (span index, segment, pair indices)."""
        wanted = []
        for index, span in enumerate(self.request.prompt.spans):
            per_pair = span.segment.tokens_per_pair
            first = max(0, (start - span.start) // per_pair)
            last = min(len(span.segment.pairs), -(-(end - span.start) // per_pair))
            if first < last:
                wanted.append((index, span.segment, list(range(first, last))))
        return wanted
