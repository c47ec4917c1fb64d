"""PagedKVPool: fixed-size pages of keys and values, reference counted.

A page holds `page_size` tokens of all layers. Sequences and the prefix tree each hold
references; a page is free again when the last one is released.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

import torch

from vtts_rt.models.base import KVShape

# States of a page in the map of the pool; bytes, so that `bytearray.find` looks for runs.
_USED, _FREE, _ROOM = 0, 1, 2  # _ROOM: free, but a sequence is expected to grow into it


class PoolExhausted(RuntimeError):
    """No page is free: evict, wait, or ask for a larger budget."""


class PagedKVPool:
    """Pages for one language model.

    pages: (layers, 2, num_pages, page_size, kv_heads, head_dim); index 0 of the second axis
        holds keys, 1 values. byte_budget bounds it; memory is touched page by page, so a
        generous budget costs nothing until it is used.
    on_share: called with (page, True) when a page gets its second reference and (page, False)
        when one is left; how the prefix tree knows which of its pages others hold.
    num_free, peak_used, allocations: pages free now, most in use at once, ever handed out.
    """

    def __init__(
        self,
        kv: KVShape,
        *,
        device: torch.device,
        byte_budget: int,
        page_size: int,
    ) -> None:
        self.page_size = page_size
        self.page_bytes = kv.bytes_of(page_size)
        self.num_pages = byte_budget // self.page_bytes
        if self.num_pages < 1:
            raise ValueError(
                f"PagedKVPool: byte_budget must be >= {self.page_bytes} (one page), "
                f"got {byte_budget}"
            )
        shape = (kv.num_layers, 2, self.num_pages, page_size, kv.num_heads, kv.head_dim)
        self.pages = torch.empty(shape, dtype=kv.dtype, device=device)
        self.on_share: Callable[[int, bool], None] | None = None
        self.num_free = self.num_pages
        self.peak_used = self.allocations = 0
        self._references = [0] * self.num_pages
        self._states = bytearray([_FREE] * self.num_pages + [_USED])  # an end for every run

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Take `count` free pages, each with one reference; all or none (PoolExhausted).

        They are neighbours where that is possible, because attention reads neighbours without
        a copy: next to the page `after` (the last one of a sequence that grows), else in the
        first run that also leaves `room` pages for growth, else in the first run, else the
        lowest numbers. Room is not reserved: it counts as free, is taken when nothing else is
        left, and ends when a reference to the page before it is dropped.
        """
        if count > self.num_free:
            raise PoolExhausted(f"{count} KV pages wanted, {self.num_free} free")
        states = self._states
        start = -1 if after is None else after + 1
        if start < 0 or _USED in states[start : start + count]:
            start = states.find(bytes([_FREE]) * (count + room))
        if start < 0:
            start = states.find(bytes([_FREE]) * count)
        is_run = start >= 0
        taken = range(start, start + count) if is_run else sorted(islice(self._free(), count))
        for page in taken:
            states[page] = _USED
            self._references[page] = 1
        for page in range(start + count, min(start + count + room, self.num_pages)):
            if not is_run or states[page] != _FREE:
                break
            states[page] = _ROOM
        self.num_free -= count
        self.allocations += count
        self.peak_used = max(self.peak_used, self.num_pages - self.num_free)
        return list(taken)

    def peek(self, after: int, but: Collection[int]) -> int | None:
        """A free page, best the one next to `after`, and none of `but`; None if there is none.
        Nothing is taken: `allocate(1, after=page - 1)` does that while it stays free."""
        if self._states[after + 1] != _USED and after + 1 not in but:
            return after + 1
        return next((page for page in self._free() if page not in but), None)

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1
            if self._references[page] == 2 and self.on_share is not None:
                self.on_share(page, True)

    def release(self, pages: Iterable[int]) -> int:
        """Drop one reference of each page; returns how many pages became free."""
        freed = 0
        for page in pages:
            assert self._references[page] > 0, f"page {page} is already free"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._states[page] = _FREE
                freed += 1
            elif self._references[page] == 1 and self.on_share is not None:
                self.on_share(page, False)
            behind = page + 1
            while self._states[behind] == _ROOM:
                self._states[behind] = _FREE
                behind += 1
        self.num_free += freed
        return freed

    def copy_tokens(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` of a page: copy-on-write of a partial page."""
        self.pages[:, :, target, :num_tokens] = self.pages[:, :, source, :num_tokens]

    def references(self, page: int) -> int:
        return self._references[page]

    def stats(self) -> dict[str, int]:
        used = self.num_pages - self.num_free
        return {
            "pages": self.num_pages,
            "pages_free": self.num_free,
            "pages_peak": self.peak_used,
            "allocations": self.allocations,
            "bytes_used": used * self.page_bytes,
        }

    def check_integrity(self, owners: Sequence[Iterable[int]]) -> None:
        """Raise AssertionError unless `owners` (page lists) account for every reference."""
        counted = [0] * self.num_pages
        for owner in owners:
            for page in owner:
                counted[page] += 1
        assert counted == self._references, "page references disagree with their owners"
        assert [state == _USED for state in self._states[:-1]] == [n > 0 for n in counted]
        assert self._states[-1] == _USED
        assert self.num_free == counted.count(0)

    def _free(self) -> Iterator[int]:
        """Free pages, lowest first, those that are room last."""
        for state in (_FREE, _ROOM):
            page = -1
            while (page := self._states.find(state, page + 1)) >= 0:
                yield page
