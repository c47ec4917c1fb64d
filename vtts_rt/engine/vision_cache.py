"""VisionCache: merged ViT features of frame pairs, kept under byte budgets.

Exact to reuse because all attention of the vision tower stays inside one pair. The key holds
all that can change the features: (video id, frame a, frame b, box, (height, width), resize
kernel, vision weights version, dtype); never a position, a question or a language model.

Three tiers: where the model runs, host memory, files. What one evicts goes to the next; what is
found below comes back to the first. Device and host are exclusive, so that their budgets add up;
a file stays, because features never change and files outlive the process.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from vtts_rt.engine.feature_tiers import DiskTier, MemoryTier
from vtts_rt.types import require

_CPU = torch.device("cpu")


class VisionCache:
    """LRU from a pair's key to its features (tokens, feature_dim).

    byte_budget, host_bytes, disk_bytes: of the tiers; 0 is none. device: where features are
    wanted. disk_path: folder of the files; several processes may share it. With files, keys are
    nested tuples of str and int. Files are written and read by the caller's thread. pinned: see
    MemoryTier; of the first tier.
    """

    def __init__(
        self,
        byte_budget: int,
        host_bytes: int = 0,
        disk_bytes: int = 0,
        disk_path: str = "",
        device: torch.device = _CPU,
    ) -> None:
        ok = bool(disk_path) or not disk_bytes
        require("VisionCache", "disk_path", disk_path, ok, "a folder where disk_bytes is not 0")
        self._disk = DiskTier(disk_bytes, disk_path) if disk_bytes else None
        self._host = MemoryTier(host_bytes, _CPU, self._disk) if host_bytes else None
        self._device = MemoryTier(byte_budget, device, self._host or self._disk)
        self.byte_budget, self.pinned = byte_budget, self._device.pinned
        tiers = {"": self._device, "host_": self._host, "disk_": self._disk}
        self._tiers = {prefix: tier for prefix, tier in tiers.items() if tier is not None}
        self._to = device
        self.queries = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether some tier has the pair; counts nothing. A file may yet turn out damaged, and
        what is there now may be evicted before `get`: be ready to encode after all."""
        return any(key in tier for tier in self._tiers.values())

    def get(self, key: Hashable) -> Tensor | None:
        """The pair's features on the device, or None. Callers must not write to them."""
        self.queries += 1
        if (features := self._device.get(key)) is not None:
            return features
        for tier in (self._host, self._disk):
            if tier is not None and (features := tier.take(key)) is not None:
                features = features.to(self._to)
                self._device.put(key, features)
                return features
        return None

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep features (tokens, feature_dim), evicting the least recently used beyond the budget.

        Features larger than a tier's whole budget go to the next.
        """
        if key in self._device:
            return
        if self._host is not None:
            self._host.discard(key)
        # A view would keep the whole batch it was encoded in alive.
        self._device.put(key, features.detach().clone())

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        self._device.clear()
        if self._host is not None:
            self._host.clear()

    def stats(self) -> dict[str, int]:
        """queries and hits of all tiers; evictions, pairs and bytes of the first, and the same
        of the others under `host_` and `disk_`."""
        found = {"queries": self.queries}
        for prefix, tier in self._tiers.items():
            found |= {f"{prefix}{counter}": n for counter, n in tier.stats().items()}
        found["hits"] = sum(tier.hits for tier in self._tiers.values())
        return found

    def check_integrity(self) -> None:
        """Raise AssertionError if a byte count is wrong or beyond its budget."""
        for tier in self._tiers.values():
            tier.check_integrity()
