from __future__ import annotations

import random

import pytest
import torch

from vtts_rt.engine.kv_pool import PagedKVPool, PoolExhausted
from vtts_rt.models.base import KVShape

KV = KVShape(num_layers=2, num_heads=1, head_dim=4, dtype=torch.float32)


def make_pool(num_pages: int, page_size: int = 4) -> PagedKVPool:
    page_bytes = 2 * 2 * page_size * 1 * 4 * 4  # layers, k and v, tokens, heads, head dim, fp32
    return PagedKVPool(
        KV,
        device=torch.device("cpu"),
        byte_budget=num_pages * page_bytes + page_bytes - 1,
        page_size=page_size,
    )


def test_budget_bounds_the_pages() -> None:
    pool = make_pool(5)
    assert pool.num_pages == 5
    assert pool.pages.numel() * 4 == 5 * pool.page_bytes


def test_a_budget_below_one_page_is_refused_with_the_number_needed() -> None:
    with pytest.raises(ValueError, match="byte_budget must be >= 256"):
        PagedKVPool(
            KV,
            device=torch.device("cpu"),
            byte_budget=10,
            page_size=4,
        )


def test_allocation_is_all_or_nothing_and_lowest_first() -> None:
    pool = make_pool(4)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(PoolExhausted):
        pool.allocate(3)
    assert pool.num_free == 2
    assert pool.release([0]) == 1
    assert pool.allocate(1) == [0]


def test_a_page_is_free_when_the_last_reference_goes() -> None:
    pool = make_pool(2)
    (page,) = pool.allocate(1)
    pool.retain([page])
    assert pool.release([page]) == 0
    pool.check_integrity([[page]])
    assert pool.release([page]) == 1
    pool.check_integrity([])
    with pytest.raises(AssertionError):
        pool.release([page])


def test_integrity_notices_a_lost_reference() -> None:
    pool = make_pool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def test_copy_takes_only_the_first_tokens() -> None:
    pool = make_pool(2)
    pool.pages.zero_()
    pool.pages[:, :, 0] = 1.0
    pool.copy_tokens(0, 1, 3)
    assert bool((pool.pages[:, :, 1, :3] == 1).all())
    assert bool((pool.pages[:, :, 1, 3:] == 0).all())


def test_a_look_ahead_takes_nothing_and_is_what_is_allocated_later() -> None:
    pool = make_pool(5)
    assert pool.allocate(2, room=1) == [0, 1]
    assert pool.peek(1, ()) == 2 and pool.peek(1, [2]) == 3 and pool.peek(0, [3]) == 4
    assert pool.peek(4, [3, 4]) == 2  # the room of another is better than none
    assert pool.peek(4, [2, 3, 4]) is None
    assert pool.num_free == 3
    for page in (4, 2, 3):
        assert pool.allocate(1, after=page - 1) == [page]
    assert pool.peek(4, ()) is None
    pool.release([0])
    assert pool.peek(4, ()) == 0 and pool.allocate(1, after=-1) == [0]


def test_growth_continues_the_page_before_it() -> None:
    pool = make_pool(8)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(1) == [2]
    assert pool.allocate(2, after=2) == [3, 4]
    assert pool.allocate(1, after=1) == [5]  # 2 is taken
    assert pool.allocate(2, after=7) == [6, 7]  # nothing stands behind the last page


def test_runs_are_preferred_to_lower_numbers() -> None:
    pool = make_pool(8)
    pool.allocate(8)
    pool.release([1, 3, 5, 6, 7])
    assert pool.allocate(3) == [5, 6, 7]
    assert pool.allocate(2) == [1, 3]
    pool.check_integrity([[0, 1, 2, 3, 4, 5, 6, 7]])


def test_room_is_kept_for_the_sequence_before_it_while_others_find_place() -> None:
    pool = make_pool(10)
    assert pool.allocate(2, room=2) == [0, 1]
    assert pool.num_free == 8
    assert pool.allocate(2, room=2) == [4, 5]
    assert pool.allocate(2) == [8, 9]
    assert pool.allocate(1, after=1) == [2]
    assert pool.allocate(1, after=5) == [6]
    assert pool.allocate(2) == [3, 7]  # room is not reserved: nothing else is left
    pool.check_integrity([range(10)])


def test_room_lapses_with_a_reference_to_the_page_before_it() -> None:
    pool = make_pool(6)
    first = pool.allocate(1, room=3)
    assert pool.allocate(1) == [4]
    pool.release(first)
    assert pool.allocate(4) == [0, 1, 2, 3]


def test_sharing_is_reported_when_it_begins_and_when_it_ends() -> None:
    pool = make_pool(2)
    told: list[tuple[int, bool]] = []
    pool.on_share = lambda page, shared: told.append((page, shared))
    (page,) = pool.allocate(1)
    pool.retain([page, page])
    pool.release([page])
    assert told == [(page, True)]
    pool.release([page, page])
    assert told == [(page, True), (page, False)]


def test_stats_count_pages() -> None:
    pool = make_pool(4)
    pages = pool.allocate(3)
    pool.release(pages[:2])
    pool.allocate(1)
    assert pool.stats() == {
        "pages": 4,
        "pages_free": 2,
        "pages_peak": 3,
        "allocations": 4,
        "bytes_used": 2 * pool.page_bytes,
    }


def test_random_use_never_hands_out_a_page_twice() -> None:
    rng = random.Random(0)
    pool = make_pool(24)
    held: list[list[int]] = []
    for _ in range(1500):
        if held and rng.random() < 0.45:
            pool.release(held.pop(rng.randrange(len(held))))
        elif held and rng.random() < 0.3:
            copy = list(rng.choice(held))
            pool.retain(copy)
            held.append(copy)
        else:
            count = min(rng.randrange(5), pool.num_free)
            after = rng.choice(held)[-1] if held and rng.random() < 0.5 else None
            pages = pool.allocate(count, after=after, room=rng.randrange(4))
            held += [pages] if pages else []
        pool.check_integrity(held)
    pool.release(page for pages in held for page in pages)
    assert pool.allocate(24) == list(range(24))
