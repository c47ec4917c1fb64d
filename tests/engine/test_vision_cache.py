from __future__ import annotations

import torch

from vtts_rt.engine.vision_cache import VisionCache


def features(value: float) -> torch.Tensor:
    return torch.full((2, 4), float(value))  # 32 bytes


def test_least_recently_used_goes_first() -> None:
    cache = VisionCache(64)
    cache.put("a", features(1))
    cache.put("b", features(2))
    assert cache.get("a") is not None
    cache.put("c", features(3))
    assert cache.get("b") is None
    found = cache.get("a")
    assert found is not None and bool((found == 1).all())
    assert cache.stats() == {"queries": 3, "hits": 2, "evictions": 1, "pairs": 2, "bytes": 64}
    cache.check_integrity()


def test_what_cannot_fit_is_not_kept_and_evicts_nothing() -> None:
    cache = VisionCache(32)
    cache.put("a", features(1))
    cache.put("large", torch.zeros(100))
    assert cache.get("a") is not None and cache.get("large") is None


def test_a_kept_row_does_not_keep_its_batch_alive() -> None:
    cache = VisionCache(1 << 20)
    batch = torch.zeros(1000, 4)
    cache.put("a", batch[:2])
    kept = cache.get("a")
    assert kept is not None and kept.untyped_storage().nbytes() == 32


def test_clear_forgets_everything() -> None:
    cache = VisionCache(64)
    cache.put("a", features(1))
    cache.clear()
    assert cache.get("a") is None and cache.num_bytes == 0
