"""PrefixTree: which KV pages already hold a prefix of a prompt.

One node is one page. A token's key is its id (text), or its content id (vision: a frame pair
and an index inside it), together with its three M-RoPE positions; children are found by the
bytes of a whole page of keys, so a hit is an equality, not a hash. The last page of a match
may be shared in part: its first tokens are copied into a page of the sequence's own.

What is remembered stays intact: a node claims the first len(keys) slots of its page and
the tree holds a reference, so the page is never handed out again. Sequences write only behind
the tokens they have computed, and only into pages they allocated or got as `partial_is_free`;
others that match a partial page copy it first. So claimed slots are never written again.

Legend: N tokens, P page_size.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from vtts_rt.engine.kv_pool import PagedKVPool

_TOKEN_BYTES = 4 * 8  # one row of keys: 4 int64
_keys_of = attrgetter("keys")


@dataclass(slots=True)
class PrefixMatch:
    """pages: full pages that hold the first len(pages) * P tokens; partial: a page whose first
    `num_partial` tokens continue them, or None. partial_is_free: the rest of that page holds
    nothing and no other reference to it exists, so it may be continued in place; else copy it.
    """

    pages: list[int]
    partial: int | None = None
    num_partial: int = 0
    partial_is_free: bool = False


@dataclass(slots=True, eq=False)
class _Node:
    """A page and the keys of its first tokens; the root has neither.

    children: sorted by keys, none of which begins with another's: so the longest common prefix
        with any query is one of the two neighbours of the query's place.
    holds: why it may not be evicted: sequences that hold the page count 1, every pin 1, every
        child with holds 1. queued: it has an entry in the heap of leaves.
    """

    keys: bytes
    page: int
    parent: _Node | None
    serial: int = 0
    last_use: int = 0
    children: list[_Node] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    holds: int = 0
    queued: bool = False


@dataclass(slots=True, eq=False)
class Pin:
    """A prefix that stays cached until `release`: its first num_tokens, in num_pages pages."""

    num_tokens: int
    num_pages: int
    _tree: PrefixTree = field(repr=False)
    _node: _Node | None = field(repr=False)  # the last page; those before it cannot go first

    def release(self) -> None:
        """End the pin; a second call, or one after the tree forgot the prefix, does nothing."""
        if self._node is not None and self in self._node.pins:
            self._node.pins.remove(self)
            self._tree._hold(self._node, -1)


class PrefixTree:
    """Token-exact prefix cache over a PagedKVPool; holds one reference per page.

    num_evictable: pages that `evict` could free right now, exact: those that neither they nor
        any page behind them is held by a sequence or pinned.
    queries, hits: tokens; evictions: pages.
    """

    def __init__(self, pool: PagedKVPool) -> None:
        self._pool = pool
        self._root = _Node(b"", page=-1, parent=None)
        self._by_page: dict[int, _Node] = {}
        # Leaves without holds, least recently used first. Lazy: an entry may be older than its
        # node's last use, or of a node that is held, gone or no leaf by now.
        self._leaves: list[tuple[int, int, _Node]] = []
        self._clock = itertools.count(1)
        self.num_evictable = 0
        self.queries = self.hits = self.evictions = 0
        pool.on_share = self._on_share

    def match_prefix(self, keys: np.ndarray) -> PrefixMatch:
        """The longest cached prefix.

        keys: (N, 4) int64: token or content id, then M-RoPE t, h, w. Nothing is locked: the
        caller retains the pages before anything else can evict.
        """
        path, partial, num_partial = self._longest(keys.tobytes())
        found, now = PrefixMatch([node.page for node in path]), next(self._clock)
        for node in path:
            node.last_use = now
        if partial is not None:
            partial.last_use = now
            found.partial, found.num_partial = partial.page, num_partial
            found.partial_is_free = (
                num_partial * _TOKEN_BYTES == len(partial.keys)
                and self._pool.references(partial.page) == 1
            )
        self.queries += len(keys)
        self.hits += len(path) * self._pool.page_size + num_partial
        return found

    def insert_prefix(self, keys: np.ndarray, pages: list[int]) -> None:
        """Remember that `pages` hold the KV of `keys`.

        keys: (N, 4) int64 as in `match_prefix`; pages: ceil(N / P) pages in order, held by the
        caller, who may go on writing behind token N. Pages the tree does not have yet are
        retained; for those it has, its own stay. A longer page replaces the partial one that
        it begins with, pins included.
        """
        assert len(pages) == self._pool.pages_for(len(keys))
        data, stride, now = keys.tobytes(), self._stride, next(self._clock)
        node = self._root
        for index, page in enumerate(pages):
            part = data[index * stride : (index + 1) * stride]
            at = bisect_left(node.children, part, key=_keys_of)
            # A longer page serves a partial one, which is the last.
            if at < len(node.children) and node.children[at].keys.startswith(part):
                child = node.children[at]
            else:
                child = self._add(node, at, part, page)
            child.last_use = now
            node = child

    def evict(self, num_pages: int) -> int:
        """Forget least recently used leaves without holds until `num_pages` became free or none is
        left; returns how many became free. O(log pages) each, amortised."""
        freed = 0
        while freed < num_pages and self._leaves:
            last_use, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.children or node.holds or not self._knows(node):
                continue  # comes back when that changes
            if last_use < node.last_use:
                self._queue(node)
            else:
                freed += self._remove(node)
                self.evictions += 1
        return freed

    def pin(self, keys: np.ndarray) -> Pin:
        """Keep the longest cached prefix of `keys` until the Pin is released.

        The page that it ends in counts whole. Pins of one prefix are independent.
        """
        path, partial, num_partial = self._longest(keys.tobytes())
        num_tokens = len(path) * self._pool.page_size + num_partial
        if partial is not None:
            path.append(partial)
        pin = Pin(num_tokens, len(path), self, path[-1] if path else None)
        if path:
            path[-1].pins.append(pin)
            self._hold(path[-1], 1)
        return pin

    def clear(self) -> int:
        """Forget everything, pins included; pages that sequences hold stay theirs. Returns how
        many became free."""
        nodes, self._by_page = self._by_page, {}
        self._root.children, self._leaves, self.num_evictable = [], [], 0
        for node in nodes.values():  # no reference cycles for the collector
            node.parent, node.children = None, []
            node.pins.clear()
        return self._pool.release(nodes)

    def held_pages(self) -> list[int]:
        return list(self._by_page)

    def stats(self) -> dict[str, int]:
        """Tokens: queries, hits. Pages: evictions, pages, evictable, pinned."""
        pinned: set[_Node] = set()
        for node in list(self._by_page.values()):  # whole, though another thread may change it
            step: _Node | None = node if node.pins else None
            while step is not None and step.parent is not None and step not in pinned:
                pinned.add(step)
                step = step.parent
        return {
            "queries": self.queries,
            "hits": self.hits,
            "evictions": self.evictions,
            "pages": len(self._by_page),
            "evictable": self.num_evictable,
            "pinned": len(pinned),
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if a node breaks the tree's rules or a count is wrong."""
        queued = {id(node): last_use for last_use, _, node in self._leaves}
        nodes = list(_below(self._root))
        assert {node.page: node for node in nodes} == self._by_page
        assert len(nodes) == len(self._by_page), "a page is in two nodes"
        for node in [*nodes, self._root]:
            names = [child.keys for child in node.children]
            assert all(
                a < b and not b.startswith(a) for a, b in zip(names, names[1:], strict=False)
            )
            assert all(child.parent is node for child in node.children)
        for node in nodes:
            assert 0 < len(node.keys) <= self._stride and len(node.keys) % _TOKEN_BYTES == 0
            assert not node.children or len(node.keys) == self._stride
            references = self._pool.references(node.page)
            assert references > 0
            held = sum(child.holds > 0 for child in node.children)
            assert node.holds == (references > 1) + len(node.pins) + held
            assert all(pin._node is node for pin in node.pins)
            if not node.holds and not node.children:
                assert node.queued and queued[id(node)] <= node.last_use
        assert self.num_evictable == sum(node.holds == 0 for node in nodes)

    # -- nodes ------------------------------------------------------------------------------

    @property
    def _stride(self) -> int:
        return self._pool.page_size * _TOKEN_BYTES

    def _longest(self, data: bytes) -> tuple[list[_Node], _Node | None, int]:
        """Nodes of whole pages, then the node that shares most with the rest, and how much."""
        path: list[_Node] = []
        node, stride = self._root, self._stride
        while True:
            part = data[len(path) * stride : (len(path) + 1) * stride]
            at = bisect_left(node.children, part, key=_keys_of)
            if len(part) < stride or at == len(node.children) or node.children[at].keys != part:
                break
            node = node.children[at]
            path.append(node)
        best, most = None, 0
        for child in node.children[max(at - 1, 0) : at + 1]:
            common = num_common(_rows(child.keys), _rows(part))
            if common > most:
                best, most = child, common
        return path, best, most

    def _add(self, parent: _Node, at: int, keys: bytes, page: int) -> _Node:
        """A new child at place `at`; it replaces a shorter one that it contains."""
        node = _Node(keys, page, parent, serial=next(self._clock))
        before = parent.children[at - 1] if at else None
        shorter = before if before is not None and keys.startswith(before.keys) else None
        parent.children.insert(at, node)
        self._pool.retain([page])
        assert self._by_page.get(page) in (None, shorter), f"page {page} holds other keys"
        self._by_page[page] = node
        self.num_evictable += 1
        if self._pool.references(page) > 1:
            self._hold(node, 1)
        if shorter is not None:
            node.pins = shorter.pins
            for pin in node.pins:
                pin._node = node
                self._hold(node, 1)
            self._remove(shorter)
        if not node.holds:
            self._queue(node)
        return node

    def _remove(self, node: _Node) -> int:
        """Forget a leaf; returns how many pages became free."""
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[bisect_left(parent.children, node.keys, key=_keys_of)]
        if self._knows(node):
            del self._by_page[node.page]
        if node.holds:
            self._hold(parent, -1)
        else:
            self.num_evictable -= 1
        if parent.parent is not None and not parent.children and not parent.holds:
            self._queue(parent)
        return self._pool.release([node.page])

    def _knows(self, node: _Node) -> bool:
        return self._by_page.get(node.page) is node

    def _on_share(self, page: int, shared: bool) -> None:
        node = self._by_page.get(page)
        if node is not None:
            self._hold(node, 1 if shared else -1)

    def _hold(self, node: _Node, change: int) -> None:
        """Add `change` (1 or -1) to a node's holds and, where that makes or ends one, to its
        parent's and so on."""
        while node.parent is not None:
            was_held = node.holds > 0
            node.holds += change
            if was_held == (node.holds > 0):
                return
            self.num_evictable -= change
            if not node.holds and not node.children:
                self._queue(node)
            node = node.parent

    def _queue(self, node: _Node) -> None:
        if node.queued:
            return
        if len(self._leaves) > 2 * len(self._by_page) + 64:  # most are of forgotten nodes
            self._leaves = [entry for entry in self._leaves if self._knows(entry[2])]
            heapq.heapify(self._leaves)
        node.queued = True
        heapq.heappush(self._leaves, (node.last_use, node.serial, node))


def _below(root: _Node) -> Iterator[_Node]:
    stack = list(root.children)
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children)


def _rows(keys: bytes) -> np.ndarray:
    return np.frombuffer(keys, np.int64).reshape(-1, 4)


def num_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading rows of keys, (n, 4) and (m, 4) int64, are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero((a[:n] != b[:n]).any(axis=1))
    return int(different[0]) if len(different) else n
