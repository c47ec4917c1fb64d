"""VisionCache: merged ViT features of frame pairs, kept under a byte budget.

Exact to reuse because all attention of the vision tower stays inside one pair. The key holds
all that can change the features: (video id, frame a, frame b, box, (height, width), resize
kernel, vision weights version, dtype); never a position, a question or a language model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class VisionCache:
    """Byte-budget LRU from a pair's key to its features (tokens, hidden)."""

    def __init__(self, byte_budget: int) -> None:
        self.byte_budget = byte_budget
        self.num_bytes = 0
        self.queries = self.hits = self.evictions = 0
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        """The pair's features, or None. Callers must not write to them."""
        self.queries += 1
        features = self._features.get(key)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(key)
        return features

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep features (tokens, hidden); evicts the least recently used beyond the budget.

        Features larger than the whole budget are not kept.
        """
        size = _num_bytes(features)
        if key in self._features or size > self.byte_budget:
            return
        # A view would keep the whole batch it was encoded in alive.
        self._features[key] = features.clone()
        self.num_bytes += size
        while self.num_bytes > self.byte_budget:
            _, evicted = self._features.popitem(last=False)
            self.num_bytes -= _num_bytes(evicted)
            self.evictions += 1

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0

    def stats(self) -> dict[str, int]:
        return {
            "queries": self.queries,
            "hits": self.hits,
            "evictions": self.evictions,
            "pairs": len(self._features),
            "bytes": self.num_bytes,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if the byte count disagrees with what is held."""
        assert self.num_bytes == sum(map(_num_bytes, self._features.values()))
        assert self.num_bytes <= self.byte_budget


def _num_bytes(features: Tensor) -> int:
    return features.numel() * features.element_size()
