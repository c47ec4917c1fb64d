"""FrameTier: the budget holds, the least recently used goes, and bad frames are found out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vtts_rt.types import Frame
from vtts_rt.video.frame_tiers import FrameKey, FrameTier, device_type

FRAME_BYTES = 2 * 3 * 3


def key(index: int) -> FrameKey:
    return "video", "decoder", index


def array(height: int = 2) -> np.ndarray:
    frame = np.zeros((height, 3, 3), np.uint8)
    frame.flags.writeable = False
    return frame


def tensor(height: int = 2) -> torch.Tensor:
    """Of a device that every machine has: sizes and no pixels."""
    return torch.empty((height, 3, 3), dtype=torch.uint8, device="meta")


KINDS = pytest.mark.parametrize("make", [array, tensor])


@KINDS
def test_the_least_recently_used_gives_way(make: Callable[..., Frame]) -> None:
    tier, frames = FrameTier("byte_budget", 3 * FRAME_BYTES), [make() for _ in range(4)]
    for i in range(3):
        tier.put(key(i), frames[i])
    assert tier.get(key(0)) is frames[0]  # used now: 1 is the oldest
    tier.put(key(3), frames[3])
    assert list(tier.keys()) == [key(2), key(0), key(3)] and tier.get(key(1)) is None
    assert tier.stats() == {
        "frames": 3,
        "bytes": 3 * FRAME_BYTES,
        "byte_budget": 3 * FRAME_BYTES,
        "evictions": 1,
    }
    tier.put(key(4), make(4))  # twice the size of the others
    assert list(tier.keys()) == [key(3), key(4)] and tier.evictions == 3
    tier.check_integrity()
    tier.clear()
    assert (len(tier), tier.bytes, tier.evictions) == (0, 0, 5)
    tier.check_integrity()


@KINDS
def test_a_frame_larger_than_the_budget_evicts_nothing(make: Callable[..., Frame]) -> None:
    tier = FrameTier("byte_budget", FRAME_BYTES + 1)
    tier.put(key(0), make())
    tier.put(key(1), make(3))
    assert list(tier.keys()) == [key(0)] and tier.evictions == 0
    nothing = FrameTier("byte_budget", 0)
    nothing.put(key(0), make())
    assert not nothing.put(key(1), make(), beside=True) and len(nothing) == 0
    nothing.check_integrity()


@KINDS
def test_by_products_evict_nothing_and_go_first(make: Callable[..., Frame]) -> None:
    tier = FrameTier("byte_budget", 3 * FRAME_BYTES)
    tier.put(key(0), make())
    assert tier.put(key(1), make(), beside=True) and tier.put(key(2), make(), beside=True)
    assert not tier.put(key(3), make(), beside=True) and key(3) not in tier and tier.evictions == 0
    tier.put(key(4), make())
    assert list(tier.keys()) == [key(1), key(0), key(4)] and tier.evictions == 1
    assert tier.get(key(1)) is not None  # asked for: as good as any other now
    tier.put(key(5), make())
    assert list(tier.keys()) == [key(4), key(1), key(5)]
    tier.check_integrity()


def test_where_a_frame_lies() -> None:
    assert device_type(array()) == device_type(torch.zeros(1)) == "cpu"
    assert device_type(tensor()) == "meta"


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((2, 3, 3), np.uint8),  # could be written to
        array(4)[:2],  # keeps the memory of four rows
        tensor(4)[:2],
        array().astype(np.float32),
        torch.empty((2, 3, 3), dtype=torch.int8, device="meta"),
        tensor()[0].clone(),  # no image
    ],
    ids=["writable", "view", "tensor view", "float", "int8", "two axes"],
)
def test_bad_frames_are_found_out(frame: Frame) -> None:
    tier = FrameTier("byte_budget", 10**6)
    tier.put(key(0), array())
    tier.check_integrity()
    tier.put(key(1), frame)
    with pytest.raises(AssertionError):
        tier.check_integrity()


def test_wrong_books_are_found_out() -> None:
    tier = FrameTier("byte_budget", 10**6)
    tier.put(key(0), array())
    tier.bytes += 1
    with pytest.raises(AssertionError, match="bytes"):
        tier.check_integrity()
    tier.bytes, tier.byte_budget = FRAME_BYTES, FRAME_BYTES - 1
    with pytest.raises(AssertionError, match="over budget"):
        tier.check_integrity()


def test_a_budget_is_no_less_than_nothing() -> None:
    with pytest.raises(ValueError, match="name must be a whole number of bytes >= 0, got -1"):
        FrameTier("name", -1)
