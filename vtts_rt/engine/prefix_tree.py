"""PrefixTree: which KV pages already hold a prefix of a prompt.

One node is one page. A token's key is its id (text), or its content id (vision: a frame pair
and an index inside it), together with its three M-RoPE positions; children are found by the
bytes of a whole page of keys, so a hit is an equality, not a hash. The last page of a match
may be shared in part: its first tokens are copied into a page of the sequence's own.

Legend: N tokens, P page_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vtts_rt.engine.kv_pool import PagedKVPool


@dataclass(slots=True)
class PrefixMatch:
    """pages: full pages that hold the first len(pages) * P tokens; partial: a page whose first
    `num_partial` tokens continue them, or None. partial_is_free: the rest of that page holds
    nothing and nobody else uses it, so it may be continued in place; otherwise copy it first.
    """

    pages: list[int]
    partial: int | None = None
    num_partial: int = 0
    partial_is_free: bool = False


@dataclass(slots=True, eq=False)
class _Node:
    keys: np.ndarray  # (tokens in the page, 4) int64
    page: int
    parent: _Node | None
    last_use: int = 0
    children: dict[bytes, _Node] = field(default_factory=dict)


class PrefixTree:
    """Token-exact prefix cache over a PagedKVPool; holds one reference per page."""

    def __init__(self, pool: PagedKVPool) -> None:
        self._pool = pool
        self._root = _Node(np.empty((0, 4), np.int64), page=-1, parent=None)
        self._clock = itertools.count(1)
        self.queries = self.hits = self.evictions = 0  # in tokens, tokens, pages

    def match_prefix(self, keys: np.ndarray) -> PrefixMatch:
        """The longest cached prefix.

        keys: (N, 4) int64 C-contiguous: token or content id, then M-RoPE t, h, w. Nothing is
        locked: the caller retains the pages before anything else can evict.
        """
        size = self._pool.page_size
        self.queries += len(keys)
        node, found, now = self._root, PrefixMatch([]), next(self._clock)
        start = 0
        while child := node.children.get(keys[start : start + size].tobytes()):
            if len(child.keys) < size:
                break  # an equal partial page: taken below, by copy
            node = child
            node.last_use = now
            found.pages.append(node.page)
            start += size
        rest = keys[start : start + size]
        for child in node.children.values():
            common = _common_prefix(child.keys, rest)
            if common > found.num_partial:
                found.partial, found.num_partial = child.page, common
                found.partial_is_free = (
                    common == len(child.keys) and self._pool.references(child.page) == 1
                )
                child.last_use = now
        self.hits += start + found.num_partial
        return found

    def insert_prefix(self, keys: np.ndarray, pages: list[int]) -> None:
        """Remember that `pages` hold the KV of `keys`.

        keys: (N, 4) int64 as in `match_prefix`; pages: ceil(N / P) pages in order. Pages the
        tree does not have yet are retained; for those it has, its own stay.
        """
        size = self._pool.page_size
        assert len(pages) == self._pool.pages_for(len(keys))
        node, now = self._root, next(self._clock)
        for index, page in enumerate(pages):
            part = keys[index * size : (index + 1) * size]
            child = node.children.get(part.tobytes())
            if child is None:
                if len(part) < size and any(
                    _common_prefix(other.keys, part) == len(part)
                    for other in node.children.values()
                ):
                    return  # a longer page already serves this partial one
                self._drop_shorter(node, part)
                child = _Node(part.copy(), page, node)
                node.children[part.tobytes()] = child
                self._pool.retain([page])
            child.last_use = now
            node = child

    def _drop_shorter(self, node: _Node, part: np.ndarray) -> None:
        """Forget partial pages that the new page contains."""
        for key, other in list(node.children.items()):
            if len(other.keys) < len(part) and _common_prefix(other.keys, part) == len(other.keys):
                assert not other.children
                del node.children[key]
                self._pool.release([other.page])

    def evict(self, num_pages: int) -> int:
        """Let go of least recently used leaves until `num_pages` became free or none is left
        that only the tree holds; returns how many became free."""
        freed = 0
        while freed < num_pages:
            leaves = [
                n for n in self._nodes() if not n.children and self._pool.references(n.page) == 1
            ]
            if not leaves:
                break
            for leaf in sorted(leaves, key=lambda n: n.last_use)[: num_pages - freed]:
                assert leaf.parent is not None
                del leaf.parent.children[leaf.keys.tobytes()]
                freed += self._pool.release([leaf.page])
                self.evictions += 1
        return freed

    def clear(self) -> None:
        self._pool.release(n.page for n in self._nodes())
        self._root.children.clear()

    def held_pages(self) -> list[int]:
        return [n.page for n in self._nodes()]

    def check_integrity(self) -> None:
        """Raise AssertionError if a node breaks the tree's rules."""
        for node in self._nodes():
            assert node.parent is not None
            assert node.parent.children[node.keys.tobytes()] is node
            assert 0 < len(node.keys) <= self._pool.page_size
            assert not node.children or len(node.keys) == self._pool.page_size
            assert self._pool.references(node.page) > 0

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading rows of (n, 4) and (m, 4) are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero((a[:n] != b[:n]).any(axis=1))
    return int(different[0]) if len(different) else n
