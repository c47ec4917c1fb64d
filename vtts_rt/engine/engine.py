"""Engine: requests in, token events out, over one model, one KV pool and one vision cache.

Requests are worked on one after another, one forward pass a step; every finished sequence
leaves its KV to the prefix tree, so a prompt that begins like an earlier one starts there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vtts_rt.config import EngineConfig
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.prefix_tree import PrefixTree
from vtts_rt.engine.runner import Runner
from vtts_rt.engine.sequence import (
    Completion,
    ContentIds,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    Sequence,
    TextStream,
    TokenEvent,
)
from vtts_rt.engine.vision_cache import VisionCache
from vtts_rt.models.mrope import MropePositions
from vtts_rt.models.qwen2_5_vl import Qwen2_5_VL
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.ops.sampling import sample_token

Event = TokenEvent | FinishedEvent | FailedEvent


class Engine:
    """Generates from prompts of text and vision segments.

    Not thread-safe: one thread calls `add`, `step`, `abort`.
    """

    def __init__(self, model: Qwen2_5_VL, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self.model = model
        model.language.store_wide_matrices_by_columns()
        self.tokenizer = tokenizer
        self.config = config
        self.pool = PagedKVPool(
            model.config.language,
            dtype=model.dtype,
            device=model.device,
            byte_budget=config.kv_bytes,
            page_size=config.page_size,
        )
        self.prefix_tree = PrefixTree(self.pool)
        self.vision_cache = VisionCache(config.vision_cache_bytes)
        self._runner = Runner(model, self.pool, self.vision_cache)
        self._content_ids = ContentIds()
        self._waiting: deque[Sequence] = deque()
        self._running: Sequence | None = None
        self._next_id = 0

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; returns its id. ValueError if it can never fit the KV budget."""
        sequence = self._sequence(request)
        self._waiting.append(sequence)
        return sequence.request_id

    def abort(self, request_id: int) -> Completion | None:
        """End a request now, keeping what it generated; None if it is not known any more."""
        for sequence in (self._running, *self._waiting):
            if sequence is not None and sequence.request_id == request_id:
                return self._finish(sequence, "aborted").completion
        return None

    @property
    def has_work(self) -> bool:
        return self._running is not None or bool(self._waiting)

    def generate(self, request: GenerationRequest) -> Iterator[TokenEvent | FinishedEvent]:
        """Run one request to its end; closing the iterator aborts it. Errors are raised."""
        request_id = self.add(request)
        try:
            while self.has_work:
                for event in self.step():
                    if event.request_id != request_id:
                        continue
                    if isinstance(event, FailedEvent):
                        raise event.error
                    yield event
                    if isinstance(event, FinishedEvent):
                        return
        finally:
            self.abort(request_id)

    def score(self, request: GenerationRequest, token_ids: list[int]) -> list[float]:
        """Log-probabilities (natural log, softmax of the raw logits) of `token_ids` after the
        prompt of `request`; nothing is sampled."""
        if not token_ids:
            return []
        sequence = self._sequence(request, num_new=len(token_ids))
        try:
            for token_id in token_ids:
                sequence.append(token_id, 0.0)
            first = sequence.num_prompt - 1
            self._start(sequence, limit=first)
            hidden = self._runner.hidden_states(sequence, len(sequence.token_ids) - 1)
            logits = self._runner.logits(hidden[-len(token_ids) :])
            logprobs = logits.float().log_softmax(-1)
            return [float(row[token]) for row, token in zip(logprobs, token_ids, strict=True)]
        finally:
            self._release(sequence)

    # -- one forward pass -------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward pass of the request in work; a failing request ends with its cause."""
        if self._running is None:
            if not self._waiting:
                return []
            self._running = self._waiting.popleft()
        sequence = self._running
        try:
            return self._advance(sequence)
        except Exception as error:
            self._release(sequence)
            self._running = None
            return [FailedEvent(sequence.request_id, error)]

    def _advance(self, sequence: Sequence) -> list[Event]:
        deadline = sequence.request.deadline_seconds
        if deadline is not None and time.monotonic() >= deadline:
            return [self._finish(sequence, "timeout")]
        began = time.perf_counter()
        if not sequence.pages:
            self._start(sequence, limit=sequence.num_prompt - 1)
        if sequence.num_computed < sequence.num_prompt:
            hidden = self._prefill(sequence, began)
            if sequence.num_computed < sequence.num_prompt:
                return []
        else:
            self._grow(sequence, len(sequence.token_ids))
            hidden = self._runner.hidden_states(sequence, len(sequence.token_ids))
        event = self._choose(sequence, hidden)
        if len(sequence.logprobs) > 1:  # the first token came with the prefill
            sequence.timings.generate += 1e3 * (time.perf_counter() - began)
        reason = self._finish_reason(sequence)
        if reason is None:
            return [event]
        event.text += sequence.text.finish()
        return [event, self._finish(sequence, reason)]

    def _prefill(self, sequence: Sequence, began: float) -> Tensor:
        start, timings = sequence.num_computed, sequence.timings
        end = sequence.num_prompt
        if self.config.prefill_chunk:
            end = min(end, start + self.config.prefill_chunk)
        before = timings.decode + timings.preprocess + timings.vision
        hidden = self._runner.hidden_states(sequence, end, last_only=True)
        seeing = timings.decode + timings.preprocess + timings.vision - before
        timings.prefill += 1e3 * (time.perf_counter() - began) - seeing
        reuse = sequence.reuse
        reuse.tokens_prefilled += end - start
        reuse.text_tokens_prefilled += sequence.request.prompt.num_text_tokens(start, end)
        return hidden

    def _choose(self, sequence: Sequence, hidden: Tensor) -> TokenEvent:
        request = sequence.request
        token_id, logprob = sample_token(
            self._runner.logits(hidden)[0],
            request.sampling,
            member=request.member,
            round_index=request.round_index,
            position=len(sequence.logprobs),
        )
        sequence.append(token_id, logprob)
        is_stop = token_id in self.tokenizer.eos_token_ids and not request.sampling.ignore_eos
        text = "" if is_stop else sequence.text.push(token_id)
        return TokenEvent(sequence.request_id, token_id, logprob, text)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling = sequence.request.sampling
        ended = sequence.token_ids[-1] in self.tokenizer.eos_token_ids
        if (ended or sequence.text.stopped) and not sampling.ignore_eos:
            return "stop"
        return "length" if len(sequence.logprobs) >= sampling.max_tokens else None

    # -- pages ------------------------------------------------------------------------------

    def _sequence(self, request: GenerationRequest, num_new: int | None = None) -> Sequence:
        new = request.sampling.max_tokens if num_new is None else num_new
        prompt = request.prompt
        if not prompt.token_ids:
            raise ValueError("generate: prompt must be non-empty, got 0 tokens")
        total = len(prompt.token_ids) + new
        needed = self.pool.pages_for(total)
        if needed > self.pool.num_pages:
            raise ValueError(
                f"generate: prompt and max_tokens must fit the KV budget: {total} tokens need "
                f"{needed * self.pool.page_bytes} bytes, kv_bytes is "
                f"{self.pool.num_pages * self.pool.page_bytes}"
            )
        self._next_id += 1
        sampling = request.sampling
        return Sequence(
            self._next_id,
            request,
            num_new=new,
            positions=MropePositions(request.mrope, self.model.config.vision.tokens_per_second),
            pair_keys=[
                [self._runner.pair_key(span.segment, pair) for pair in span.segment.pairs]
                for span in prompt.spans
            ],
            content_ids=self._content_ids,
            text=TextStream(self.tokenizer, sampling.stop if not sampling.ignore_eos else ()),
        )

    def _start(self, sequence: Sequence, limit: int) -> None:
        """Take what the prefix tree has of the first `limit` tokens, then pages for the rest."""
        match = self.prefix_tree.match_prefix(sequence.keys[:limit])
        held = [] if match.partial is None else [match.partial]
        self.pool.retain(match.pages + held)  # eviction below must not take them
        sequence.pages = list(match.pages)
        sequence.num_computed = len(match.pages) * self.pool.page_size + match.num_partial
        if match.partial_is_free:
            # Continuing in place keeps a sequence's pages neighbours, which attention reads
            # as one slice.
            sequence.pages += held
            held = []
        try:
            self._grow(sequence, len(sequence.token_ids))
            if held:
                self.pool.copy_tokens(held[0], sequence.pages[len(match.pages)], match.num_partial)
        finally:
            self.pool.release(held)
        sequence.reuse.tokens_reused = sequence.num_computed
        sequence.reuse.pairs_reused = sequence.pairs_within(sequence.num_computed)

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        short = self.pool.pages_for(num_tokens) - len(sequence.pages)
        if short > 0:
            if short > self.pool.num_free:
                self.prefix_tree.evict(short - self.pool.num_free)
            sequence.pages += self.pool.allocate(short)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> FinishedEvent:
        if sequence.pages:
            computed = sequence.num_computed
            pages = sequence.pages[: self.pool.pages_for(computed)]
            self.prefix_tree.insert_prefix(sequence.keys[:computed], pages)
        self._release(sequence)
        if sequence is self._running:
            self._running = None
        else:
            self._waiting.remove(sequence)
        sequence.text.finish()
        timings = sequence.timings
        timings.total = sum(timings.as_dict().values()) - timings.total
        return FinishedEvent(
            sequence.request_id,
            Completion(
                token_ids=sequence.output_ids,
                logprobs=sequence.logprobs,
                text=sequence.text.text,
                finish_reason=reason,
                num_prompt_tokens=sequence.num_prompt,
                reuse=sequence.reuse,
                timings=timings,
            ),
        )

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    # -- upkeep -----------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters of every cache; units as in the caches' own docstrings."""
        tree = self.prefix_tree
        return {
            "vision_cache": self.vision_cache.stats(),
            "kv": {
                "pages": self.pool.num_pages,
                "pages_free": self.pool.num_free,
                "bytes_used": (self.pool.num_pages - self.pool.num_free) * self.pool.page_bytes,
            },
            "prefix_tree": {
                "queries": tree.queries,
                "hits": tree.hits,
                "evictions": tree.evictions,
            },
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if caches and pool disagree."""
        owners = [self.prefix_tree.held_pages()]
        if self._running is not None:
            owners.append(self._running.pages)
        self.pool.check_integrity(owners)
        self.prefix_tree.check_integrity()
        self.vision_cache.check_integrity()

    def clear_caches(self) -> None:
        """Forget KV and features (benches that want a cold start)."""
        self.prefix_tree.clear()
        self.vision_cache.clear()

    def close(self) -> None:
        """Drop queued work and cached memory."""
        for sequence in list(self._waiting):
            self.abort(sequence.request_id)
        if self._running is not None:
            self.abort(self._running.request_id)
        self.clear_caches()
