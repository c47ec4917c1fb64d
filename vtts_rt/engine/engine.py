"""Engine: requests in, token events out, over one model, one KV pool and one vision cache.

A step is one forward pass for all requests in work. Every computed prefix goes to the prefix
tree, so a prompt that begins like an earlier one starts there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vtts_rt.config import EngineConfig
from vtts_rt.engine.encoder import Features, VisionEncoder
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.memory import kv_budget
from vtts_rt.engine.passes import Passes
from vtts_rt.engine.prefix_tree import Pin, PrefixTree
from vtts_rt.engine.runner import Choices
from vtts_rt.engine.scheduler import Scheduler
from vtts_rt.engine.sequence import (
    PHASES,
    Chunk,
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
from vtts_rt.errors import BadRequest
from vtts_rt.models.base import PARTS, VideoLM
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer
from vtts_rt.ops.logits import LogitsRules
from vtts_rt.sampling import resolve
from vtts_rt.types import FrameProvider, PairRef, Parity, SamplingParams, Segment

Event = TokenEvent | FinishedEvent | FailedEvent


class Engine:
    """Generates from prompts of text and vision segments, many requests at once.

    Not thread-safe: one thread calls `add`, `step`, `abort`. The model's matrices are packed in
    place where native kernels run (`VideoLM.pack`).
    """

    def __init__(self, model: VideoLM, tokenizer: Tokenizer, config: EngineConfig) -> None:
        model.pack()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        page_bytes = model.kv.bytes_of(config.page_size)
        self.pool = PagedKVPool(
            model.kv,
            device=model.device,
            byte_budget=kv_budget(config, page_bytes, model.device),
            page_size=config.page_size,
        )
        self.prefix_tree = PrefixTree(self.pool)
        self.vision_cache = VisionCache(
            config.vision_cache_bytes,
            host_bytes=config.vision_host_bytes,
            disk_bytes=config.vision_disk_bytes,
            disk_path=config.vision_disk_path,
            device=model.device,
        )
        self._encoder = VisionEncoder(model, self.vision_cache)
        self._passes = Passes.of_config(model, self.pool, config)
        self._scheduler = Scheduler(config, self.pool, self.prefix_tree, self._encoder)
        # The pool cannot hold more pairs than tokens.
        self._content_ids = ContentIds(self.pool.num_pages * config.page_size)
        # Triton launches on the current device, whatever its tensors are on.
        self._home = model.device
        is_cuda = self._home.type == "cuda"
        self._device = torch.cuda.device(model.device) if is_cuda else nullcontext()
        self._sequences: dict[int, Sequence] = {}
        self._next_id = 0
        self._drafted = self._accepted = 0
        self.weights_version = 0
        self.is_asleep = False

    # -- requests ---------------------------------------------------------------------------

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; returns its id. ValueError if it can never fit the KV budget."""
        sequence = self._sequence(request)
        self._sequences[sequence.request_id] = sequence
        self._scheduler.add(sequence)
        return sequence.request_id

    def abort(self, request_id: int) -> Completion | None:
        """End a request now, keeping what it generated; None if it is not known any more."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, "aborted").completion

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def pin(self, prompt: EncodedPrompt, parity: Parity = "release") -> Pin:
        """Keep what is cached of a prompt's beginning from eviction until `Pin.release`.

        Other requests cannot use pinned pages; `clear_caches` and new weights drop them too.
        """
        request = GenerationRequest(prompt, sampling=SamplingParams(max_tokens=1), parity=parity)
        return self.prefix_tree.pin(self._sequence(request).keys)

    def features(self, prompt: EncodedPrompt, provider: FrameProvider | None) -> Tensor:
        """(tokens of all vision segments in order, feature_dim) of the current tower, in the
        model's dtype; from the cache, else from `provider`'s frames."""
        one = SamplingParams(max_tokens=1)
        sequence = self._sequence(GenerationRequest(prompt, provider, sampling=one))
        with self._device:
            chunk = Chunk(sequence, 0, sequence.num_prompt)
            found, failed = self._encoder.features([chunk])
        for _, error in failed:
            raise error
        places = sequence.pairs_between(0, sequence.num_prompt)
        model = self.model
        none = torch.empty(0, model.feature_dim, dtype=model.dtype, device=model.device)
        # Outside inference mode: a trainer's graph may hold the result.
        return torch.cat([none, *(found[place.key] for place in places)])

    def has_features(self, segment: Segment, pair: PairRef) -> bool:
        """Whether a pair could be shown without its pixels."""
        return self._encoder.pair_key(segment, pair) in self.vision_cache

    @property
    def token_budget(self) -> int:
        """Tokens of one sequence: the model's positions and the whole KV pool bound it."""
        positions = self.model.config.language.max_position_embeddings
        return min(positions, self.pool.num_pages * self.pool.page_size)

    # -- one forward pass -------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward pass; returns what it brought. A request that fails ends with its cause,
        the others go on."""
        with self._device:
            return self._step()

    def _step(self) -> list[Event]:
        events = self._expire()
        if not self._sequences:
            return events
        began = time.perf_counter()
        chunks, exhausted = self._scheduler.schedule()
        events += [self._fail(sequence, error) for sequence, error in exhausted]
        features, unseen = self._encoder.features(chunks)
        for sequence, error in unseen:
            events.append(self._fail(sequence, error))
            chunks = [chunk for chunk in chunks if chunk.sequence is not sequence]
        encoded = time.perf_counter()
        for chunk, chosen in self._passes.run(chunks, features):
            try:
                if isinstance(chosen, Exception):
                    raise chosen
                events += self._take(chunk, chosen, features)
            except Exception as error:
                events.append(self._fail(chunk.sequence, error))
        seconds = time.perf_counter() - encoded, encoded - began
        for chunk in chunks:
            self._charge(chunk, *seconds)
        for chunk in chunks:
            if chunk.sequence.request_id in self._sequences:
                reason = self._finish_reason(chunk.sequence)
                if reason is not None:
                    events.append(self._finish(chunk.sequence, reason))
        return events

    def _take(self, chunk: Chunk, choices: Choices, features: Features) -> list[Event]:
        """Take the tokens that a computed chunk yields: one, one more for every draft that was
        right, or none."""
        sequence, request = chunk.sequence, chunk.sequence.request
        begun = sequence.pairs_between(chunk.end, chunk.end)
        sequence.held = {place.key: features[place.key] for place in begun}
        events: list[Event] = []
        accepted = 0
        for row, (token_id, logprob) in enumerate(choices):
            sequence.append(token_id, logprob)
            if request.constraint is not None:
                request.constraint.advance(token_id)
            may_stop = len(sequence.logprobs) > sequence.sampling.min_tokens
            is_end = token_id in sequence.end_ids
            text = "" if is_end else sequence.text.push(token_id, may_stop=may_stop)
            events.append(TokenEvent(sequence.request_id, token_id, logprob, text))
            right = row < len(chunk.drafts) and chunk.drafts[row] == token_id
            accepted += right
            if self._finish_reason(sequence) is not None:
                events[-1].text += sequence.text.finish()  # type: ignore[union-attr]
                break
            if not right:
                break
        sequence.judge_drafts(len(chunk.drafts), accepted)
        self._scheduler.computed(chunk, accepted)
        return events

    def _charge(self, chunk: Chunk, computing: float, encoding: float) -> None:
        """Note the seconds of a pass in the phase that its request is in.

        The encoder notes decode, preprocess and vision for those whose pixels it used; for the
        others its time counts to their own phase.
        """
        sequence = chunk.sequence
        timings = sequence.timings
        first = chunk.start < sequence.num_prompt
        used = bool(sequence.pairs_between(chunk.start, chunk.end)) if first else False
        seconds = computing + (0.0 if used else encoding)
        if first:
            timings.prefill += 1e3 * seconds
        else:
            timings.generate += 1e3 * seconds
        if sequence.logprobs and not timings.ttft:
            timings.ttft = 1e3 * (time.perf_counter() - sequence.added)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.logprobs and sequence.token_ids[-1] in sequence.end_ids:
            return "stop"
        if sequence.text.stopped:
            return "stop"
        return "length" if len(sequence.logprobs) >= sequence.num_new else None

    # -- beginnings and ends ----------------------------------------------------------------

    def _sequence(self, request: GenerationRequest) -> Sequence:
        if self.is_asleep:
            raise RuntimeError("Runtime: it is asleep; call wake() before asking it")
        prompt, forced = request.prompt, len(request.forced_ids)
        if not prompt.token_ids:
            raise BadRequest("generate: prompt must be non-empty, got 0 tokens")
        room = self.token_budget - len(prompt.token_ids)
        if request.sampling.max_tokens is None and not forced and room < 1:
            raise BadRequest(
                f"generate: prompt must leave room for an answer: it has {len(prompt.token_ids)} "
                f"tokens, the model's positions and the KV budget end at {self.token_budget}"
            )
        # Scores are the model's own, whatever its generation_config says.
        defaults = None if forced else self.model.config.sampling
        sampling = resolve(request.sampling, defaults, room)
        endless = sampling.ignore_eos or forced
        ends = self.tokenizer.eos_token_ids.union(sampling.stop_token_ids)
        total = len(prompt.token_ids) + (forced or sampling.max_tokens)
        needed = self.pool.pages_for(total)
        if needed > self.pool.num_pages:
            raise BadRequest(
                f"generate: prompt and max_tokens must fit the KV budget: {total} tokens need "
                f"{needed * self.pool.page_bytes} bytes, kv_bytes is "
                f"{self.pool.num_pages * self.pool.page_bytes}"
            )
        if total > self.token_budget:
            raise BadRequest(
                f"generate: prompt and max_tokens must be <= {self.token_budget} tokens, the "
                f"model's positions, got {total}"
            )
        self._next_id += 1
        return Sequence(
            self._next_id,
            request,
            positions=self.model.positions(request.parity),
            pair_key=self._encoder.pair_key,
            content_ids=self._content_ids,
            text=TextStream(self.tokenizer, () if endless else sampling.stop),
            draft_tokens=self.config.draft_tokens,
            sampling=sampling,
            rules=LogitsRules.of(
                sampling,
                prompt.token_ids,
                end_ids=() if endless else ends,
                vocab_size=self.model.config.language.vocab_size,
                num_new=total - len(prompt.token_ids),
            ),
            end_ids=frozenset() if endless else ends,
        )

    def _expire(self) -> list[Event]:
        now = time.monotonic()
        late = [
            sequence
            for sequence in self._sequences.values()
            if (deadline := sequence.request.deadline_seconds) is not None and now >= deadline
        ]
        return [self._finish(sequence, "timeout") for sequence in late]

    def _finish(self, sequence: Sequence, reason: FinishReason) -> FinishedEvent:
        self._end(sequence)
        sequence.text.finish()
        timings = sequence.timings
        timings.queue = 1e3 * ((sequence.began or time.perf_counter()) - sequence.added)
        timings.total = sum(getattr(timings, phase) for phase in (*PHASES, "queue"))
        self._drafted += sequence.reuse.tokens_drafted
        self._accepted += sequence.reuse.tokens_accepted
        return FinishedEvent(
            sequence.request_id,
            Completion(
                token_ids=sequence.token_ids[sequence.num_prompt :],
                logprobs=sequence.logprobs,
                text=sequence.text.text,
                finish_reason=reason,
                num_prompt_tokens=sequence.num_prompt,
                reuse=sequence.reuse,
                timings=timings,
                weights_version=self.weights_version,
                position_ids=sequence.positions(0, len(sequence.token_ids), 0).T,
            ),
        )

    def _fail(self, sequence: Sequence, error: Exception) -> FailedEvent:
        self._end(sequence)
        return FailedEvent(sequence.request_id, error)

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self._scheduler.remove(sequence)

    # -- upkeep -----------------------------------------------------------------------------

    def update_weights(self, write: Callable[[VideoLM], Collection[str] | None]) -> None:
        """Let `write` change the model's weights in place; it returns the parts that it changed,
        "visual" or "language" (None for both).

        What depends on a changed part is forgotten: KV on either, features on the vision tower
        (files keep them under the old weights' hash). `weights_version` goes up by one, whatever
        was changed. RuntimeError while requests are in work: finish or abort them first.
        """
        self._require_idle("update_weights")
        changed: Collection[str] | None = None
        try:
            changed = write(self.model)
        finally:
            self.weights_version += 1
            self._forget(PARTS if changed is None else changed)

    def sleep(self) -> None:
        """Drop KV, features and graphs, free their memory, and move the weights to host memory.

        Until `wake` every request is refused with RuntimeError. Weights may be updated.
        """
        self._require_idle("sleep")
        self.is_asleep = True
        self.clear_caches()
        self.pool.free_memory()
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """Move the weights back and take memory for KV again."""
        if self.is_asleep:
            self._move(self._home)
            self.pool.take_memory()
            self.is_asleep = False

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        self._passes.weights_changed()  # graphs read weights where they were
        if self._home.type == "cuda":
            torch.cuda.empty_cache()

    def _require_idle(self, what: str) -> None:
        if self._sequences:
            num = len(self._sequences)
            raise RuntimeError(f"{what}: {num} requests are in work; finish or abort them first")

    def _forget(self, parts: Collection[str]) -> None:
        """Drop what was computed with earlier weights of these parts."""
        if not parts:
            return
        self.model.forget_versions(parts)
        self._passes.weights_changed()
        self.prefix_tree.clear()
        if "visual" in parts:
            self.vision_cache.clear()

    def stats(self) -> dict[str, Any]:
        """Counters of the scheduler, of the passes and of every cache; units as in their own
        docstrings."""
        scheduler, tree = self._scheduler, self.prefix_tree.stats()
        return {
            "vision_cache": self.vision_cache.stats(),
            "kv": self.pool.stats(),
            "prefix_tree": {**tree, "bytes": tree["pages"] * self.pool.page_bytes},
            "passes": self._passes.stats(),
            "scheduler": {
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "steps": scheduler.steps,
                "preemptions": scheduler.preemptions,
                "tokens_recomputed": scheduler.tokens_recomputed,
                "tokens_drafted": self._drafted,
                "tokens_accepted": self._accepted,
            },
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if caches and pool disagree."""
        owners = [self.prefix_tree.held_pages(), *(s.pages for s in self._scheduler.running)]
        self.pool.check_integrity(owners)
        self.prefix_tree.check_integrity()
        self.vision_cache.check_integrity()

    def clear_caches(self) -> None:
        """Forget KV and features (benches that want a cold start)."""
        self.prefix_tree.clear()
        self.vision_cache.clear()

    def close(self) -> None:
        """Drop queued work and cached memory."""
        for request_id in list(self._sequences):
            self.abort(request_id)
        self.clear_caches()
