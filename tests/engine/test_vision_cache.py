from __future__ import annotations

import errno
import logging
import os
import random
import time
from pathlib import Path

import pytest
import torch

from vtts_rt.engine import feature_tiers
from vtts_rt.engine.feature_tiers import DiskTier, key_text
from vtts_rt.engine.vision_cache import VisionCache
from vtts_rt.types import PixelBox

FILE_BYTES = 1000  # room for one file of `features`, header and all, but not for two


def features(value: float) -> torch.Tensor:
    return torch.full((2, 4), float(value))  # 32 bytes


def value_of(found: torch.Tensor | None) -> float | None:
    if found is None:
        return None
    assert found.shape == (2, 4) and bool((found == found[0, 0]).all())
    return float(found[0, 0])


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def on_disk(folder: Path, budget: int = 1 << 20) -> VisionCache:
    """A cache that keeps nothing in memory."""
    return VisionCache(0, disk_bytes=budget, disk_path=str(folder))


# -- memory ---------------------------------------------------------------------------------


def test_least_recently_used_goes_first() -> None:
    cache = VisionCache(64)
    cache.put("a", features(1))
    cache.put("b", features(2))
    assert value_of(cache.get("a")) == 1
    cache.put("c", features(3))
    assert cache.get("b") is None
    assert value_of(cache.get("a")) == 1
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


def test_the_first_features_of_a_pair_stay() -> None:
    cache = VisionCache(64, host_bytes=64)
    for value in (1, 2):
        cache.put("a", features(value))
    assert value_of(cache.get("a")) == 1 and cache.stats()["bytes"] == 32


def test_clear_forgets_everything() -> None:
    cache = VisionCache(32, host_bytes=32)
    cache.put("a", features(1))
    cache.put("b", features(1))
    cache.clear()
    assert cache.get("a") is None and cache.get("b") is None
    assert cache.stats()["bytes"] == cache.stats()["host_bytes"] == 0
    cache.check_integrity()


def test_asking_whether_a_pair_is_there_counts_nothing(tmp_path: Path) -> None:
    cache = VisionCache(32, 32, 1 << 20, str(tmp_path))
    for name in ("a", "b", "c"):
        cache.put(name, features(0))
    before = cache.stats()
    assert [before[f"{tier}pairs"] for tier in ("", "host_", "disk_")] == [1, 1, 1]
    assert all(name in cache for name in ("a", "b", "c")) and "d" not in cache
    assert cache.stats() == before


def test_evicted_pairs_go_down_and_come_back_up() -> None:
    cache = VisionCache(64, host_bytes=64)
    for value in range(5):
        cache.put(value, features(value))
    assert [value in cache for value in range(5)] == [False, True, True, True, True]
    assert value_of(cache.get(1)) == 1
    cache.check_integrity()
    stats = cache.stats()
    assert (stats["hits"], stats["host_hits"], stats["pairs"], stats["host_pairs"]) == (1, 1, 2, 2)
    assert value_of(cache.get(1)) == 1
    assert (cache.stats()["hits"], cache.stats()["host_hits"]) == (2, 1)


def test_what_does_not_fit_above_is_served_from_below() -> None:
    cache = VisionCache(16, host_bytes=64)
    cache.put("a", features(1))
    for _ in range(2):
        assert value_of(cache.get("a")) == 1
    assert cache.stats()["host_hits"] == 2 and cache.stats()["pairs"] == 0


def test_budgets_hold_at_every_moment(tmp_path: Path) -> None:
    rng = random.Random(0)
    cache = VisionCache(200, 300, 4 * FILE_BYTES, str(tmp_path))
    for _ in range(400):
        key = rng.randrange(30)
        if rng.random() < 0.5:
            found = cache.get((key,))
            assert found is None or bool((found == key).all())
        else:
            cache.put((key,), torch.full((1 + key % 4, 4), float(key)))
        cache.check_integrity()
        assert sum(file.stat().st_size for file in files_in(tmp_path)) <= 4 * FILE_BYTES
    stats = cache.stats()
    assert min(stats["host_hits"], stats["disk_hits"], stats["disk_evictions"]) > 0
    assert all(type(number) is int for number in stats.values())


def test_a_disk_without_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="VisionCache: disk_path must be a folder"):
        VisionCache(1, disk_bytes=1)


# -- keys -----------------------------------------------------------------------------------


def test_key_text_is_stable_and_tells_keys_apart() -> None:
    key = ("id", 1, 2, PixelBox(0, 0, 9, 9), (28, 56), "bicubic", "v1", "torch.float32")
    assert key_text(key) == '["id",1,2,[0,0,9,9],[28,56],"bicubic","v1","torch.float32"]'
    other = [
        ("a", "b"),
        ("a,b",),
        ('a","b',),
        (("a",), "b"),
        ("a", ("b",)),
        ("1",),
        (1,),
        (11, 1),
        (1, 11),
        ((),),
        (),
        "a",
        ("é\ud800",),
    ]
    assert len({key_text(k) for k in other}) == len(other)


def test_numbers_that_are_equal_keys_have_equal_text() -> None:
    numpy_like = torch.arange(4).numpy()[3]
    assert key_text((numpy_like,)) == key_text((3,))


def test_a_key_of_other_things_is_refused() -> None:
    with pytest.raises(TypeError):
        key_text((1.5,))


# -- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_outlive_the_cache_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        on_disk(tmp_path).put(("a", 1), values.t())
    cache = VisionCache(1 << 20, disk_bytes=1 << 20, disk_path=str(tmp_path))
    assert ("a", 1) in cache
    found = cache.get(("a", 1))
    assert found is not None and found.dtype == dtype and torch.equal(found, values.t())
    assert cache.stats()["disk_hits"] == 1 and cache.stats()["pairs"] == 1
    assert [file.suffix for file in files_in(tmp_path)] == [".safetensors"]


def test_other_weights_of_the_tower_miss(tmp_path: Path) -> None:
    box = PixelBox(0, 0, 9, 9)
    on_disk(tmp_path).put(("id", 0, 1, box, "weights-1"), features(1))
    cache = on_disk(tmp_path)
    assert ("id", 0, 1, box, "weights-2") not in cache
    assert cache.get(("id", 0, 1, box, "weights-2")) is None
    assert value_of(cache.get(("id", 0, 1, tuple(box), "weights-1"))) == 1


def test_clear_leaves_the_files(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    cache.put("a", features(1))
    cache.clear()
    assert value_of(cache.get("a")) == 1


def test_the_oldest_file_goes_first_across_restarts(tmp_path: Path) -> None:
    cache = on_disk(tmp_path, 4 * FILE_BYTES)
    for age, name in enumerate(("c", "b", "a")):
        cache.put(name, features(age))
    for age, file in enumerate(sorted(files_in(tmp_path), key=lambda f: f.stat().st_mtime_ns)):
        os.utime(file, (age, age))
    used = sum(file.stat().st_size for file in files_in(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    os.utime(tmp_path / "notes.txt", (0, 0))
    cache = on_disk(tmp_path, used)
    assert value_of(cache.get("c")) == 0  # newest now
    cache.put("d", features(3))
    assert [name in cache for name in "abcd"] == [True, False, True, True]
    cache = on_disk(tmp_path, used // 3)  # a smaller budget from now on
    assert sum(name in cache for name in "abcd") == 1
    assert cache.stats()["disk_evictions"] == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_that_another_process_deletes_is_a_miss(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    cache.put("a", features(1))
    files_in(tmp_path)[0].unlink()
    assert "a" not in cache and cache.get("a") is None
    assert cache.stats()["disk_bytes"] == cache.stats()["disk_damaged"] == 0
    cache.put("a", features(2))
    assert value_of(cache.get("a")) == 2


def test_a_file_that_another_process_writes_is_a_hit(tmp_path: Path) -> None:
    first, second = on_disk(tmp_path), on_disk(tmp_path)
    first.put("a", features(1))
    assert "a" in second and value_of(second.get("a")) == 1
    assert second.stats()["disk_bytes"] == first.stats()["disk_bytes"] > 0


def test_processes_that_share_a_folder_share_the_budget(tmp_path: Path) -> None:
    caches = [on_disk(tmp_path, 10 * FILE_BYTES) for _ in range(3)]
    for index in range(200):
        caches[index % 3].put(index, features(index))
        used = sum(file.stat().st_size for file in files_in(tmp_path))
        assert used <= 10 * FILE_BYTES * (1 + 3 / 16)


def test_a_deleted_folder_comes_back(tmp_path: Path) -> None:
    cache = on_disk(tmp_path / "deep" / "folder")
    (tmp_path / "deep" / "folder").rmdir()
    cache.put("a", features(1))
    assert value_of(cache.get("a")) == 1


def test_remains_of_a_dead_process_are_swept(tmp_path: Path) -> None:
    on_disk(tmp_path).put("a", features(1))
    name = files_in(tmp_path)[0].name
    for tag, age in (("0" * 32, 7200.0), ("1" * 32, 0.0)):
        remains = tmp_path / f"{name}.{tag}.tmp"
        remains.write_bytes(b"half")
        os.utime(remains, (time.time() - age,) * 2)
    assert "a" in on_disk(tmp_path)
    assert [file.name for file in files_in(tmp_path)] == [name, f"{name}.{'1' * 32}.tmp"]


def test_a_damaged_file_is_a_miss_and_deleted(tmp_path: Path) -> None:
    """Truncated anywhere, any byte changed, replaced by something else."""
    cache = on_disk(tmp_path)
    cache.put("a", features(1))
    (path,) = files_in(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [whole[:end] for end in range(0, len(whole), 7)] + [whole + b"x"]
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= rng.randrange(1, 256)
        damaged.append(bytes(changed))
    damaged += [rng.randbytes(rng.randrange(400)) for _ in range(50)]
    damaged += [b"\xff" * 8 + whole[8:], b"[" * 5000, b"\x00\x40" + bytes(6) + b"[" * 20000]
    misses = 0
    for data in damaged:
        path.write_bytes(data)
        if value_of(cache.get("a")) != 1:
            misses += 1
            assert not path.exists() and "a" not in cache
        cache.check_integrity()
    assert cache.stats()["disk_damaged"] == misses
    assert misses > len(damaged) - 10  # spaces that pad the header may change
    path.write_bytes(whole)
    assert value_of(cache.get("a")) == 1


def test_a_file_of_another_key_is_a_miss(tmp_path: Path) -> None:
    """As if two keys had one hash."""
    cache = on_disk(tmp_path)
    cache.put("a", features(1))
    (path,) = files_in(tmp_path)
    cache.put("b", features(2))
    other = next(file for file in files_in(tmp_path) if file != path)
    other.replace(path)
    assert cache.get("a") is None and cache.stats()["disk_damaged"] == 1
    assert files_in(tmp_path) == []


def test_a_folder_in_place_of_a_file_is_a_miss(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    cache.put("a", features(1))
    (path,) = files_in(tmp_path)
    path.unlink()
    path.mkdir()
    assert cache.get("a") is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_only_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    cache = VisionCache(32, disk_bytes=1 << 20, disk_path=str(tmp_path))
    cache.put("a", features(1))
    cache.put("b", features(2))

    def fail(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with caplog.at_level(logging.WARNING):
        for value in range(5):
            cache.put(value, features(value))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.strerror(code) in caplog.text
    assert len(files_in(tmp_path)) == 1  # nothing half written stays
    assert value_of(cache.get("a")) == 1 and cache.get("b") is None
    cache.check_integrity()


def test_files_of_another_user_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = on_disk(tmp_path)
    cache.put("a", features(1))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "not the owner")

    monkeypatch.setattr(os, "utime", refuse)
    cache.put("a", features(1))
    cache.put("b", features(2))
    assert (value_of(cache.get("a")), value_of(cache.get("b"))) == (1, 2)


def test_a_folder_that_cannot_be_made_is_no_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        cache = on_disk(tmp_path / "file" / "folder")
        cache.put("a", features(1))
    assert "a" not in cache and cache.get("a") is None
    assert len(caplog.records) == 1


def test_a_file_beyond_the_whole_budget_is_not_written(tmp_path: Path) -> None:
    cache = on_disk(tmp_path, FILE_BYTES)
    cache.put("a", features(1))
    cache.put("large", torch.zeros(1000))
    assert "a" in cache and "large" not in cache


def test_going_down_again_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(1 << 20, str(tmp_path))
    tier.put("a", features(1))
    monkeypatch.setattr(feature_tiers, "_encoded", None)
    tier.put("a", features(1))
    assert value_of(tier.take("a")) == 1
