"""Scheduler: which tokens of which sequences the next forward pass computes.

Requests are admitted in order of arrival when their known tokens fit the pool; every running one
that decodes gets its token in every pass, prompts are prefilled in chunks with what is left of
`max_batch_tokens`. Where pages run out, the newest request is preempted: its pages go to the
prefix tree, and it is computed again later, its output kept.

No request waits for ever: after `max_wait_steps` passes at the head of the queue a request takes
the place of the newest running one, once that has generated a token, and which queues again. So
one with p others before it starts after at most (p + max_sequences + 1) turns, each of
`max_wait_steps` passes or of as many as a prompt and its first token take.
"""

from __future__ import annotations

import time
from collections import deque

from vtts_rt.config import EngineConfig
from vtts_rt.engine.encoder import VisionEncoder
from vtts_rt.engine.kv_pool import PagedKVPool, PoolExhausted
from vtts_rt.engine.prefix_tree import PrefixTree, num_common
from vtts_rt.engine.sequence import Chunk, Sequence

# Drafts take at most this share of a pass: they must not starve the prompts beside them.
_DRAFT_SHARE = 4


class Scheduler:
    """Queues of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        pool: PagedKVPool,
        tree: PrefixTree,
        encoder: VisionEncoder,
    ) -> None:
        self._config = config
        self._pool = pool
        self._tree = tree
        self._encoder = encoder
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.steps = self.preemptions = self.tokens_recomputed = 0
        self._last_turn = 0  # the step of the last place taken from a running request
        self._refused: tuple[int, int] | None = None  # head of the queue, pages there were
        self._common: dict[tuple[int, int], int] = {}

    # -- queues -----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        sequence.waiting_since = self.steps
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of work; its computed KV stays findable."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_back(sequence)
        self._common = {k: v for k, v in self._common.items() if sequence.request_id not in k}

    def computed(self, chunk: Chunk, num_accepted: int) -> None:
        """Note that a pass has computed a chunk, `num_accepted` of its drafts rightly."""
        sequence, known = chunk.sequence, chunk.sequence.num_ever_computed
        prefilled = min(chunk.end, sequence.num_prompt)
        if chunk.start < prefilled:
            first = min(max(chunk.start, known), prefilled)
            reuse, prompt = sequence.reuse, sequence.request.prompt
            reuse.tokens_prefilled += prefilled - first
            reuse.text_tokens_prefilled += prompt.num_text_tokens(first, prefilled)
            self.share(sequence, chunk.end)
        self.tokens_recomputed += max(0, min(chunk.end, known) - chunk.start)
        sequence.num_computed = chunk.end + num_accepted
        sequence.num_ever_computed = max(known, sequence.num_computed)

    def share(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the KV of the first `num_tokens`, less a begun frame pair, findable."""
        num_tokens = sequence.without_begun_pair(num_tokens)
        if self._config.prefix_cache and num_tokens:
            pages = sequence.pages[: self._pool.pages_for(num_tokens)]
            self._tree.insert_prefix(sequence.keys[:num_tokens], pages)

    # -- one pass ---------------------------------------------------------------------------

    def schedule(self) -> tuple[list[Chunk], list[tuple[Sequence, Exception]]]:
        """Chunks of the next pass, and sequences that can never go on."""
        self.steps += 1
        self._take_turn()
        chunks = self._decode()
        budget = self._config.max_batch_tokens - sum(chunk.num_rows for chunk in chunks)
        planned = {id(chunk.sequence) for chunk in chunks}
        for sequence in [s for s in self.running if id(s) not in planned]:
            budget -= self._prefill(sequence, budget, chunks)
        failed = self._admit_waiting(budget, chunks)
        return chunks, failed

    def _decode(self) -> list[Chunk]:
        """One token and its drafts for every sequence that has only that one to compute."""
        chunks: list[Chunk] = []
        decoding = [s for s in self.running if s.num_pending == 1]
        tokens = self._config.max_batch_tokens
        # A prompt beside them must move, too.
        drafts_left = max(0, min(tokens // _DRAFT_SHARE, tokens - len(decoding) - 1))
        for sequence in decoding:
            if sequence not in self.running:
                continue  # preempted for an older one
            known = len(sequence.token_ids)
            if not self._reserve(sequence, known):
                continue  # preempted itself: first in the queue, it is admitted again or fails
            chunk = Chunk(sequence, known - 1, known)
            self._draft(chunk, drafts_left)
            drafts_left -= len(chunk.drafts)
            chunks.append(chunk)
        return chunks

    def _draft(self, chunk: Chunk, limit: int) -> None:
        """Add drafts as far as pages reach; no sequence is preempted for a guess."""
        sequence, pool, tree = chunk.sequence, self._pool, self._tree
        pages = len(sequence.pages) + pool.num_free + tree.num_evictable
        chunk.drafts = sequence.drafts(min(limit, pages * pool.page_size - chunk.end))
        short = pool.pages_for(chunk.end + len(chunk.drafts)) - len(sequence.pages)
        if short > 0:
            tree.evict(max(0, short - pool.num_free))
            sequence.pages += pool.allocate(short, after=sequence.pages[-1])

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Plan the next chunk of a prompt; returns how many tokens it takes.

        A chunk ends before a frame that is not decoded yet, so that no sequence that decodes waits
        for another's frames. The first chunk of a pass without decoding does wait: one long pass
        does more at once, and others that share its prompt wait for all of it anyway.
        """
        start = sequence.num_computed
        end = min(len(sequence.token_ids), start + budget)
        if chunks:
            end = self._encoder.end_of_ready(sequence, start, end)
        if end <= start:
            return 0
        chunk = Chunk(sequence, start, end)
        if chunk.samples:
            self._draft(chunk, min(budget - (end - start), budget // _DRAFT_SHARE))
        chunks.append(chunk)
        return chunk.num_rows

    # -- admission --------------------------------------------------------------------------

    def _admit_waiting(self, budget: int, chunks: list[Chunk]) -> list[tuple[Sequence, Exception]]:
        """Admit from the queue in order, as far as places, pages and the pass reach."""
        failed: list[tuple[Sequence, Exception]] = []
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._config.max_sequences:
                break
            if self._shares_a_prefill(sequence):
                continue
            if not self._admit(sequence):
                if self.running:
                    break
                failed.append((sequence, self._exhausted(len(sequence.token_ids))))
                continue
            budget -= self._prefill(sequence, budget, chunks)
        return failed

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence what the prefix tree has of it and pages for all its known tokens;
        False, and nothing taken, where they do not fit. Running sequences keep a page each."""
        pool, tree = self._pool, self._tree
        there = pool.num_free + tree.num_evictable
        if self._refused == (sequence.request_id, there):
            return False
        known = len(sequence.token_ids)
        pages: list[int] = []
        held: list[int] = []
        start = 0
        if self._config.prefix_cache:
            match = tree.match_prefix(sequence.keys[: known - 1])
            pages, start = list(match.pages), len(match.pages) * pool.page_size + match.num_partial
            held = [] if match.partial is None else [match.partial]
            pool.retain(pages + held)  # eviction below must not take them
            if match.partial_is_free:
                # Continuing in place keeps a sequence's pages neighbours, which attention reads
                # as one slice.
                pages, held = pages + held, []
        short = pool.pages_for(known) - len(pages)
        if short + len(self.running) > pool.num_free + tree.num_evictable:
            pool.release(pages + held)
            self._refused = sequence.request_id, there
            return False
        self._refused = None
        tree.evict(max(0, short - pool.num_free))
        room = pool.pages_for(known + sequence.num_new - len(sequence.logprobs))
        fresh = pool.allocate(
            short, after=pages[-1] if pages else None, room=room - pool.pages_for(known)
        )
        if held:
            pool.copy_tokens(held[0], fresh[0], start % pool.page_size)
            pool.release(held)
        self._begin(sequence, pages + fresh, start)
        return True

    def _begin(self, sequence: Sequence, pages: list[int], start: int) -> None:
        sequence.pages, sequence.num_computed = pages, start
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.num_when_admitted = len(sequence.token_ids)
        sequence.began = sequence.began or time.perf_counter()
        known = min(sequence.num_ever_computed, sequence.num_prompt)
        found = min(start, sequence.num_prompt)
        if found > known:
            sequence.reuse.tokens_reused += found - known
            pairs = sequence.pairs_within(found) - sequence.pairs_within(known)
            sequence.reuse.pairs_reused += pairs
        sequence.num_ever_computed = max(sequence.num_ever_computed, start)
        self._encoder.prefetch(sequence)

    def _shares_a_prefill(self, sequence: Sequence) -> bool:
        """Whether a prompt that is being prefilled will soon have computed at least half of what
        this one lacks."""
        if not self._config.prefix_cache:
            return False
        for other in self.running:
            if other.num_pending > 1:
                pair = (other.request_id, sequence.request_id)
                if pair not in self._common:
                    self._common[pair] = num_common(other.keys, sequence.keys[:-1])
                spared = self._common[pair] - other.num_computed
                lacking = len(sequence.token_ids) - other.num_computed
                if spared >= max(self._pool.page_size, lacking // 2):
                    return True
        return False

    def _take_turn(self) -> None:
        """Preempt the newest for the head of the queue once that has waited `max_wait_steps`."""
        limit = self._config.max_wait_steps
        if not self.waiting or not self.running:
            return
        head = self.waiting[0]
        if self.steps - max(head.waiting_since, self._last_turn) < limit:
            return
        fits = len(self.running) < self._config.max_sequences
        while not (fits and self._admit(head)):
            # One that has not generated a token since stays, or all would prefill for ever.
            if not self.running or not self.running[-1].has_progressed:
                return
            self._preempt(self.running[-1], at_front=False)
            fits = True
        self._last_turn = self.steps

    # -- pages ------------------------------------------------------------------------------

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens`: evict cached ones, then preempt the newest sequences; False
        if that was `sequence` itself."""
        pool = self._pool
        short = pool.pages_for(num_tokens) - len(sequence.pages)
        while short > pool.num_free:
            if self._tree.evict(short - pool.num_free) == 0:
                newest = self.running[-1]
                self._preempt(newest, at_front=True)
                if newest is sequence:
                    return False
        # A pass that was launched ahead has written into the page that it expected.
        after = sequence.pages[-1] if sequence.page_ahead is None else sequence.page_ahead - 1
        sequence.pages += pool.allocate(max(0, short), after=after)
        return True

    def _preempt(self, sequence: Sequence, *, at_front: bool) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.waiting_since = self.steps
        if at_front:
            self.waiting.appendleft(sequence)
        else:
            self.waiting.append(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.share(sequence, sequence.num_computed)
        self._pool.release(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0
        sequence.held.clear()

    def _exhausted(self, num_tokens: int) -> PoolExhausted:
        pool = self._pool
        return PoolExhausted(
            f"generate: {num_tokens} tokens need {pool.pages_for(num_tokens)} KV pages, "
            f"{pool.num_free} of {pool.num_pages} are free beside pinned ones; unpin prefixes or "
            f"raise kv_bytes"
        )
