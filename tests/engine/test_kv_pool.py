from __future__ import annotations

import pytest
import torch

from vtts_rt.config import LanguageConfig
from vtts_rt.engine.kv_pool import PagedKVPool, PoolExhausted

CONFIG = LanguageConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_theta=1e4,
    mrope_section=(1, 1, 0),
)


def make_pool(num_pages: int, page_size: int = 4) -> PagedKVPool:
    page_bytes = 2 * 2 * page_size * 1 * 4 * 4  # layers, k and v, tokens, heads, head dim, fp32
    return PagedKVPool(
        CONFIG,
        dtype=torch.float32,
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
            CONFIG,
            dtype=torch.float32,
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
