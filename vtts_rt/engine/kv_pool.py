"""PagedKVPool: fixed-size pages of keys and values, reference counted.

A page holds `page_size` tokens of all layers. Sequences and the prefix tree each hold
references; a page is free again when the last one lets go.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import torch

from vtts_rt.config import LanguageConfig


class PoolExhausted(RuntimeError):
    """No page is free: evict, wait, or ask for a larger budget."""


class PagedKVPool:
    """Pages for one language model.

    pages: (layers, 2, num_pages, page_size, kv_heads, head_dim); index 0 of the second axis
        holds keys, 1 values. byte_budget bounds it; memory is touched page by page, so a
        generous budget costs nothing until it is used.
    """

    def __init__(
        self,
        config: LanguageConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        byte_budget: int,
        page_size: int,
    ) -> None:
        shape = (page_size, config.num_key_value_heads, config.head_dim)
        per_layer = 2 * shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.page_size = page_size
        self.page_bytes = per_layer * config.num_hidden_layers
        self.num_pages = byte_budget // self.page_bytes
        if self.num_pages < 1:
            raise ValueError(
                f"PagedKVPool: byte_budget must be >= {self.page_bytes} (one page), "
                f"got {byte_budget}"
            )
        self.pages = torch.empty(
            (config.num_hidden_layers, 2, self.num_pages, *shape), dtype=dtype, device=device
        )
        self._references = [0] * self.num_pages
        # A heap hands out the lowest numbers first: long runs stay contiguous in memory.
        self._free = list(range(self.num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference; all or none (PoolExhausted)."""
        if count > len(self._free):
            raise PoolExhausted(f"{count} KV pages wanted, {len(self._free)} free")
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> int:
        """Drop one reference of each page; returns how many pages became free."""
        freed = 0
        for page in pages:
            assert self._references[page] > 0, f"page {page} is already free"
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)
                freed += 1
        return freed

    def copy_tokens(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` of a page: copy-on-write of a partial page."""
        self.pages[:, :, target, :num_tokens] = self.pages[:, :, source, :num_tokens]

    def references(self, page: int) -> int:
        return self._references[page]

    def check_integrity(self, owners: Sequence[Iterable[int]]) -> None:
        """Raise AssertionError unless `owners` (page lists) account for every reference."""
        counted = [0] * self.num_pages
        for owner in owners:
            for page in owner:
                counted[page] += 1
        assert counted == self._references, "page references disagree with their owners"
        assert sorted(self._free) == [p for p, n in enumerate(counted) if n == 0]
