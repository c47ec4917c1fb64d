"""What the engine is asked for, what it is working on, and what it gives back."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from vtts_rt.engine.drafts import NgramDrafter
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer
from vtts_rt.ops.logits import LogitsRules
from vtts_rt.sampling import ResolvedSampling
from vtts_rt.types import (
    FrameProvider,
    PairRef,
    Parity,
    ReuseStats,
    RoundTimings,
    SamplingParams,
    Segment,
)

# What a request is charged for, of `RoundTimings`, one after the other.
PHASES = ("decode", "preprocess", "vision", "prefill", "generate")
FinishReason = Literal["stop", "length", "timeout", "aborted"]

# Vision token keys are negative, so no token id can equal one; one content id spans this many
# tokens (a pair has at most 16384: transformers' largest image, 12845056 px / 784).
_CONTENT_STRIDE = 1 << 20


class TokenConstraint(Protocol):
    """Limits what may be generated; follows the tokens of one answer."""

    def mask(self, logits: Tensor) -> Tensor:
        """(V,) logits with forbidden tokens at -inf."""
        ...

    def advance(self, token_id: int) -> None: ...


@dataclass(slots=True)
class GenerationRequest:
    """One prompt to continue.

    sampling: what it leaves unset is the checkpoint's, or neutral where tokens are forced.
    provider: where pixels come from; only asked for pairs that no cache has. parity: whose
    positions, see `models.mrope`.
    round_index, member: coordinates of the sampling noise. deadline_seconds: a
    `time.monotonic()` value after which the request ends with what it has, or None.
    earlier_answers: token ids of earlier answers to the same question, from which drafts are
    taken. constraint: what may be generated. forced_ids: tokens that are generated whatever the
    model says (scoring); as many as are given, with their log-probabilities.
    """

    prompt: EncodedPrompt
    provider: FrameProvider | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    parity: Parity = "release"
    round_index: int = 0
    member: int = 0
    deadline_seconds: float | None = None
    earlier_answers: SequenceOf[SequenceOf[int]] = ()
    constraint: TokenConstraint | None = None
    forced_ids: SequenceOf[int] = ()


@dataclass(slots=True)
class Completion:
    """What one request produced.

    text: without special tokens, stop texts and stop ids; logprobs: natural log, of each token
    under the distribution it was drawn from, or under the model's own (SamplingParams.logprobs).
    finish_reason: "stop": the model, a stop text or a stop id ended it; "length": max_tokens did.
    weights_version: `Engine.weights_version`. position_ids: (3, N) int64, of prompt and tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    reuse: ReuseStats
    timings: RoundTimings
    weights_version: int
    position_ids: np.ndarray


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

    Interning compares whole keys: two contents never share an id. At most `capacity` keys are
    remembered, the least recently used is forgotten first; a forgotten key gets a new id, so
    that its KV is not found again, never another's.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ids: OrderedDict[Hashable, int] = OrderedDict()
        self._next = 0

    def token_keys(self, pair_key: Hashable, num_tokens: int) -> np.ndarray:
        """(num_tokens,) int64 keys of a pair's tokens."""
        content = self._ids.pop(pair_key, self._next)
        self._next += content == self._next
        self._ids[pair_key] = content
        if len(self._ids) > self._capacity:
            self._ids.popitem(last=False)
        return -1 - (content * _CONTENT_STRIDE + np.arange(num_tokens, dtype=np.int64))


class PairPlace(NamedTuple):
    """Tokens [start, end) of a prompt show a frame pair through a segment's box; key: of the
    vision cache."""

    key: Hashable
    start: int
    end: int
    segment: Segment
    pair: PairRef


_start, _end = attrgetter("start"), attrgetter("end")


class TextStream:
    """Detokenises a growing answer and watches for stop texts."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._stop = stop
        self._held = max((len(s) - 1 for s in stop), default=0)
        self._emitted = 0
        self._unstoppable = 0  # characters in which no stop text may end
        self.text = ""
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text that is now safe to show; sets `stopped` when a stop text is complete, unless this
        token may not complete one."""
        self.text += self._decoder.push(token_id)
        if not may_stop:
            self._unstoppable = len(self.text)
        begins = [(s, max(0, self._unstoppable + 1 - len(s))) for s in self._stop]
        ends = [at for s, begin in begins if (at := self.text.find(s, begin)) >= 0]
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

    sampling: resolved. num_new: most tokens that can be generated. rules: what changes its logits.
    end_ids: tokens that end it. keys: (N, 4) int64, token or content id then M-RoPE t, h, w;
    num_computed: leading tokens whose KV is in `pages`. held: features of pairs that a pass has
    begun and the next goes on with. page_ahead: a free page that a pass launched ahead of the
    schedule writes into.
    num_ever_computed: tokens once computed or found; preemption forgets only
    `num_computed`. waiting_since: the scheduler's step in which it began to wait;
    num_when_admitted: tokens known when it last ceased to.
    """

    def __init__(
        self,
        request_id: int,
        request: GenerationRequest,
        *,
        positions: MropePositions,
        pair_key: Callable[[Segment, PairRef], Hashable],
        content_ids: ContentIds,
        text: TextStream,
        draft_tokens: int,
        sampling: ResolvedSampling,
        rules: LogitsRules | None,
        end_ids: frozenset[int],
    ) -> None:
        prompt = request.prompt
        self.sampling, self.rules, self.end_ids = sampling, rules, end_ids
        self.num_new = len(request.forced_ids) or sampling.max_tokens
        self.request_id = request_id
        self.request = request
        self.text = text
        self.token_ids: list[int] = list(prompt.token_ids)
        self.logprobs: list[float] = []
        self.pages: list[int] = []
        self.page_ahead: int | None = None
        self.num_computed = self.num_ever_computed = 0
        self.held: dict[Hashable, Tensor] = {}
        self.waiting_since = 0
        self.num_when_admitted = 0
        self.began: float | None = None
        self.added = time.perf_counter()
        self.reuse = ReuseStats()
        self.timings = RoundTimings()
        self.drafter = NgramDrafter(request.earlier_answers, draft_tokens)
        self._keys = np.empty((len(prompt.token_ids) + self.num_new, 4), np.int64)
        self._keys[: self.num_prompt, 0] = prompt.token_ids
        self._places: list[PairPlace] = []
        for span in prompt.spans:
            start, per_pair = span.start, span.segment.tokens_per_pair
            for pair in span.segment.pairs:
                key, end = pair_key(span.segment, pair), start + per_pair
                self._places.append(PairPlace(key, start, end, span.segment, pair))
                self._keys[start:end, 0] = content_ids.token_keys(key, per_pair)
                start = end
        self._keys[: self.num_prompt, 1:] = build_position_ids(prompt, positions).T
        self._next_position = positions.next_position

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV is not computed yet; at least the last one."""
        return len(self.token_ids) - self.num_computed

    @property
    def has_progressed(self) -> bool:
        """Whether it has generated a token since it was last admitted."""
        return len(self.token_ids) > self.num_when_admitted

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: len(self.token_ids)]

    def append(self, token_id: int, logprob: float) -> None:
        index = len(self.token_ids)
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self._keys[index] = token_id, *(self._next_position,) * 3
        self._next_position += 1
        self.drafter.append(token_id)
        if self.rules is not None:
            self.rules.append(token_id)

    # -- drafts -----------------------------------------------------------------------------

    def drafts(self, limit: int) -> list[int]:
        """At most `limit` guesses at what follows the known tokens (all of them known when
        tokens are forced). The last token that may be generated is never drafted: nothing
        follows it."""
        done = len(self.logprobs)
        limit = min(limit, self.num_new - done - 1)
        if limit <= 0:
            return []
        if self.request.forced_ids:
            return list(self.request.forced_ids[done : done + limit])
        return self.drafter.propose(limit)

    def judge_drafts(self, num_drafted: int, num_accepted: int) -> None:
        """Count how many drafts of one pass were right."""
        if num_drafted and not self.request.forced_ids:
            self.reuse.tokens_drafted += num_drafted
            self.reuse.tokens_accepted += num_accepted
            self.drafter.judge(num_drafted, num_accepted)

    def positions(self, start: int, end: int, num_drafts: int) -> np.ndarray:
        """(end - start + num_drafts, 3) int64 M-RoPE positions of known tokens and drafts."""
        known = self._keys[start:end, 1:]
        after = self._next_position + np.arange(num_drafts, dtype=np.int64)
        return np.concatenate((known, np.repeat(after[:, None], 3, axis=1)))

    # -- vision -----------------------------------------------------------------------------

    def pairs_within(self, num_tokens: int) -> int:
        """Frame pairs whose tokens all stand in the first `num_tokens`."""
        return bisect_right(self._places, num_tokens, key=_end)

    def pairs_between(self, start: int, end: int) -> list[PairPlace]:
        """Frame pairs that have tokens in [start, end), in order."""
        last = bisect_left(self._places, end, key=_start)
        return self._places[self.pairs_within(start) : last]

    def without_begun_pair(self, num_tokens: int) -> int:
        """`num_tokens`, less those of a pair that it ends inside of."""
        begun = self.pairs_between(num_tokens, num_tokens)
        return begun[0].start if begun else num_tokens


@dataclass(slots=True)
class Chunk:
    """What one forward pass computes of a sequence: tokens [start, end), then `drafts`.

    A chunk that reaches the last known token yields the next one, and one more for each draft
    that turns out right.
    """

    sequence: Sequence
    start: int
    end: int
    drafts: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.end - self.start + len(self.drafts)

    @property
    def samples(self) -> bool:
        return self.end == len(self.sequence.token_ids)
