"""PrefixTree and PagedKVPool against a naive model: a dict of token tuples, searched in full.

Sequences do what the engine makes them do: match, continue a partial page in place or copy it,
compute chunk by chunk, remember after each, decode, end or give up. A slot's "KV" is a number
that stands for the whole prefix up to its token, so any wrong reuse shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.prefix_tree import Pin, PrefixMatch, PrefixTree
from vtts_rt.models.base import KVShape

PAGE, NUM_PAGES = 3, 14
KV = KVShape(num_layers=1, num_heads=1, head_dim=1, dtype=torch.float32)
Tokens = tuple[int, ...]
TAIL = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)
PICK = st.integers(0, 100)


def keys_of(tokens: Tokens) -> np.ndarray:
    keys = np.arange(len(tokens), dtype=np.int64)[:, None].repeat(4, 1)
    keys[:, 0] = tokens
    return keys


def common(a: Tokens, b: Tokens) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@dataclass(eq=False)
class Running:
    tokens: Tokens
    pages: list[int]
    computed: int


@dataclass(eq=False)
class Entry:
    """What the model knows of a node: its name in the dict is its tokens up to its end."""

    page: int
    last_use: int
    pins: list[Pin] = field(default_factory=list)


class PrefixTreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagedKVPool(
            KV,
            device=torch.device("cpu"),
            byte_budget=NUM_PAGES * 2 * PAGE * 4,
            page_size=PAGE,
        )
        self.tree = PrefixTree(self.pool)
        self.running: list[Running] = []
        self.model: dict[Tokens, Entry] = {}
        self.kv: dict[Tokens, int] = {}
        self.clock = 0
        self.evictions = 0

    # -- what a sequence does ---------------------------------------------------------------

    @rule(pick=PICK, cut=st.integers(0, 2), tail=TAIL)
    def start(self, pick: int, cut: int, tail: Tokens) -> None:
        self.admit(self.like_a_known_one(pick, cut) + tail)

    @rule(pick=PICK, cut=st.integers(0, 2), tail=TAIL)
    def run(self, pick: int, cut: int, tail: Tokens) -> None:
        """A whole request while others are in work."""
        sequence = self.admit(self.like_a_known_one(pick, cut) + tail)
        if sequence is not None:
            self.advance(sequence, len(sequence.tokens))
            self.running.remove(sequence)
            self.remember(sequence)
            self.pool.release(sequence.pages)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, chunk=st.integers(1, 6))
    def compute(self, pick: int, chunk: int) -> None:
        sequence = self.running[pick % len(self.running)]
        self.advance(sequence, chunk)
        self.remember(sequence)

    @precondition(lambda self: self.running)
    @rule(pick=PICK, token=st.integers(0, 1))
    def decode(self, pick: int, token: int) -> None:
        sequence = self.running[pick % len(self.running)]
        if self.grow(sequence.pages, len(sequence.tokens) + 1):
            sequence.tokens += (token,)
            self.advance(sequence, len(sequence.tokens))

    @precondition(lambda self: self.running)
    @rule(pick=PICK, remembers=st.booleans())
    def finish(self, pick: int, remembers: bool) -> None:
        sequence = self.running.pop(pick % len(self.running))
        if remembers:
            self.remember(sequence)
        self.pool.release(sequence.pages)

    def admit(self, tokens: Tokens) -> Running | None:
        match = self.match(tokens[:-1])
        partial = [] if match.partial is None else [match.partial]
        self.pool.retain(match.pages + partial)
        pages = list(match.pages)
        if match.partial_is_free:
            pages, partial = pages + partial, []
        sequence = None
        if self.grow(pages, len(tokens), room=len(tokens) % 3):
            if partial:
                self.pool.copy_tokens(partial[0], pages[len(match.pages)], match.num_partial)
            computed = len(match.pages) * PAGE + match.num_partial
            sequence = Running(tokens, pages, computed)
            self.running.append(sequence)
        else:
            self.pool.release(pages)
        self.pool.release(partial)
        return sequence

    def match(self, tokens: Tokens) -> PrefixMatch:
        match = self.tree.match_prefix(keys_of(tokens))
        found = len(match.pages) * PAGE + match.num_partial
        assert found == max((common(tokens, name) for name in self.model), default=0)
        assert (match.partial is not None) == (match.num_partial > 0)
        pages = [*match.pages, *([] if match.partial is None else [match.partial])]
        assert self.contents(pages, found) == self.numbers(tokens[:found])
        self.clock += 1
        for entry in self.model.values():
            if entry.page in pages:
                entry.last_use = self.clock
        return match

    def grow(self, pages: list[int], num_tokens: int, room: int = 0) -> bool:
        """Pages for num_tokens as the scheduler gets them: admitted only if eviction suffices."""
        short = self.pool.pages_for(num_tokens) - len(pages)
        if short > self.pool.num_free + self.tree.num_evictable:
            return False
        if short > self.pool.num_free:
            self.evict(short - self.pool.num_free)
        pages += self.pool.allocate(short, after=pages[-1] if pages else None, room=room)
        return True

    def advance(self, sequence: Running, chunk: int) -> None:
        end = min(sequence.computed + chunk, len(sequence.tokens))
        numbers = self.numbers(sequence.tokens[:end])
        for at in range(sequence.computed, end):
            self.pool.pages[0, :, sequence.pages[at // PAGE], at % PAGE] = numbers[at]
        sequence.computed = end

    def remember(self, sequence: Running) -> None:
        tokens = sequence.tokens[: sequence.computed]
        pages = sequence.pages[: self.pool.pages_for(len(tokens))]
        self.tree.insert_prefix(keys_of(tokens), pages)
        self.clock += 1
        for index, page in enumerate(pages):
            self.insert(tokens[: (index + 1) * PAGE], index * PAGE, page)

    def insert(self, name: Tokens, start: int, page: int) -> None:
        """One page in the model; `start` tokens of its name stand in pages before."""
        served = [n for n in self.model if n[: len(name)] == name]
        served = [n for n in served if len(n) <= start + PAGE]
        if served:
            first = min(served, key=lambda n: keys_of(n[start:]).tobytes())
            self.model[first].last_use = self.clock
            return
        entry = Entry(page, self.clock)
        for length in range(start + 1, len(name)):
            shorter = self.model.pop(name[:length], None)
            if shorter is not None:
                entry.pins += shorter.pins
        self.model[name] = entry

    # -- what the engine and its owner do ---------------------------------------------------

    @rule(count=st.integers(1, 3))
    def evict(self, count: int) -> None:
        expected = min(count, self.tree.num_evictable)
        assert self.tree.evict(count) == expected
        self.evictions += expected
        for _ in range(expected):
            leaves = [n for n in self.model if not self.is_held(n) and not self.behind(n)]
            del self.model[min(leaves, key=lambda n: self.model[n].last_use)]

    @rule(pick=PICK, cut=st.integers(0, 2))
    def pin(self, pick: int, cut: int) -> None:
        tokens = self.like_a_known_one(pick, cut)
        match = self.match(tokens)
        last = match.pages[-1] if match.partial is None and match.pages else match.partial
        pin = self.tree.pin(keys_of(tokens))
        assert pin.num_tokens == len(match.pages) * PAGE + match.num_partial
        assert pin.num_pages == len(match.pages) + (match.partial is not None)
        for entry in self.model.values():
            if entry.page == last:
                entry.pins.append(pin)

    @precondition(lambda self: any(entry.pins for entry in self.model.values()))
    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        owners = [entry for entry in self.model.values() if entry.pins]
        pin = owners[pick % len(owners)].pins.pop()
        pin.release()
        pin.release()

    @precondition(lambda self: len(self.model) > 7)
    @rule()
    def clear(self) -> None:
        free = self.pool.num_free
        assert self.tree.clear() == self.pool.num_free - free
        for entry in self.model.values():
            for pin in entry.pins:
                pin.release()
        self.model.clear()

    # -- what must hold at all times --------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        tree = self.tree
        tree.check_integrity()
        self.pool.check_integrity([tree.held_pages(), *(s.pages for s in self.running)])
        assert sorted(tree.held_pages()) == sorted(e.page for e in self.model.values())
        assert tree.num_evictable == sum(not self.is_held(name) for name in self.model)
        pinned = [n for n in self.model if any(self.model[m].pins for m in [n, *self.behind(n)])]
        stats = tree.stats()
        assert stats["pinned"] == len(pinned)
        assert stats["evictions"] == self.evictions

    @invariant()
    def what_is_remembered_was_never_overwritten(self) -> None:
        for name, entry in self.model.items():
            start = (len(name) - 1) // PAGE * PAGE
            expected = self.numbers(name)[start:]
            assert self.contents([entry.page], len(expected)) == expected
        for sequence in self.running:
            expected = self.numbers(sequence.tokens[: sequence.computed])
            assert self.contents(sequence.pages, sequence.computed) == expected

    def like_a_known_one(self, pick: int, cut: int) -> Tokens:
        """An entry's tokens less the last `cut`."""
        names: list[Tokens] = [
            (),
            *self.model,
            *(s.tokens for s in self.running),
        ]
        tokens = names[pick % len(names)]
        return tokens[: max(0, len(tokens) - cut)]

    def behind(self, name: Tokens) -> list[Tokens]:
        """All entries that continue one: those a partial page has are none."""
        return [n for n in self.model if len(n) > len(name) and n[: len(name)] == name]

    def is_held(self, name: Tokens) -> bool:
        entries = [self.model[n] for n in [name, *self.behind(name)]]
        return any(self.pool.references(e.page) > 1 or e.pins for e in entries)

    def numbers(self, tokens: Tokens) -> list[int]:
        """The "KV" of each token: one number for each prefix."""
        prefixes = [tokens[: at + 1] for at in range(len(tokens))]
        return [self.kv.setdefault(prefix, len(self.kv) + 1) for prefix in prefixes]

    def contents(self, pages: list[int], num_tokens: int) -> list[int]:
        slots = self.pool.pages[0, 0, pages, :, 0, 0].flatten()[:num_tokens]
        return [int(number) for number in slots]


PrefixTreeMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_a_naive_model_agrees = PrefixTreeMachine.TestCase
