from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.prefix_tree import PrefixTree
from vtts_rt.models.base import KVShape

PAGE = 4
KV = KVShape(num_layers=1, num_heads=1, head_dim=4, dtype=torch.float32)


def make_tree(num_pages: int = 64) -> tuple[PagedKVPool, PrefixTree]:
    pool = PagedKVPool(
        KV,
        device=torch.device("cpu"),
        byte_budget=num_pages * 2 * PAGE * 4 * 4,
        page_size=PAGE,
    )
    return pool, PrefixTree(pool)


def keys_of(tokens: list[int], shift: int = 0) -> np.ndarray:
    """Token ids with text positions that start at `shift`."""
    positions = np.arange(len(tokens), dtype=np.int64)[:, None].repeat(3, 1) + shift
    column = np.array(tokens, dtype=np.int64).reshape(-1, 1)
    return np.ascontiguousarray(np.concatenate([column, positions], 1))


def remember(pool: PagedKVPool, tree: PrefixTree, keys: np.ndarray) -> list[int]:
    """What a sequence does: match, take pages, write each token's id into its slot, insert."""
    match = tree.match_prefix(keys)
    pages = list(match.pages)
    pool.retain(pages)
    if match.partial is not None and match.partial_is_free:
        pool.retain([match.partial])
        pages.append(match.partial)
    new = pool.allocate(pool.pages_for(len(keys)) - len(pages))
    if match.partial is not None and not match.partial_is_free:
        pool.copy_tokens(match.partial, new[0], match.num_partial)
    pages += new
    for index in range(len(match.pages) * PAGE + match.num_partial, len(keys)):
        pool.pages[:, :, pages[index // PAGE], index % PAGE] = float(keys[index, 0])
    tree.insert_prefix(keys, pages)
    pool.release(pages)
    return pages


def stored(pool: PagedKVPool, tree: PrefixTree, keys: np.ndarray) -> list[int]:
    """The token ids found in the KV of a match."""
    match = tree.match_prefix(keys)
    slots = [(page, offset) for page in match.pages for offset in range(PAGE)]
    slots += [(match.partial, offset) for offset in range(match.num_partial)]
    return [int(pool.pages[0, 0, page, offset, 0, 0]) for page, offset in slots]


def test_a_match_ends_at_the_first_different_token() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2, 3, 4, 5, 6, 7]))
    match = tree.match_prefix(keys_of([1, 2, 3, 4, 5, 9, 7]))
    assert (len(match.pages), match.num_partial) == (1, 1)
    assert stored(pool, tree, keys_of([1, 2, 3, 4, 5, 6, 7, 8])) == [1, 2, 3, 4, 5, 6, 7]
    assert stored(pool, tree, keys_of([2])) == []


def test_positions_are_part_of_the_key() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2, 3, 4, 5]))
    match = tree.match_prefix(keys_of([1, 2, 3, 4, 5], shift=1))
    assert match.pages == [] and match.partial is None


def test_a_longer_page_replaces_the_partial_one_it_contains() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2]))
    remember(pool, tree, keys_of([1, 2, 3]))
    assert len(tree.held_pages()) == 1
    remember(pool, tree, keys_of([1, 2, 3, 4, 5]))
    assert len(tree.held_pages()) == 2
    remember(pool, tree, keys_of([1, 2]))
    assert len(tree.held_pages()) == 2
    tree.check_integrity()
    pool.check_integrity([tree.held_pages()])


def test_eviction_takes_the_oldest_leaves_and_spares_pages_in_use() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2, 3, 4, 5, 6, 7, 8]))
    remember(pool, tree, keys_of([1, 2, 3, 4, 9, 9, 9, 9]))
    kept = tree.match_prefix(keys_of([1, 2, 3, 4, 9, 9, 9, 9])).pages
    pool.retain(kept)
    assert tree.evict(10) == 1  # only the leaf of 5..8: the others are held by a sequence
    assert stored(pool, tree, keys_of([1, 2, 3, 4, 9, 9, 9, 9])) == [1, 2, 3, 4, 9, 9, 9, 9]
    pool.release(kept)
    assert tree.evict(10) == 2
    assert pool.num_free == pool.num_pages
    pool.check_integrity([])


def test_a_partial_page_is_continued_in_place_only_without_other_references() -> None:
    pool, tree = make_tree()
    (page,) = remember(pool, tree, keys_of([1, 2]))
    assert tree.match_prefix(keys_of([1, 2, 3])).partial_is_free
    assert not tree.match_prefix(keys_of([1, 3])).partial_is_free  # 2 stands where 3 would go
    pool.retain([page])
    assert not tree.match_prefix(keys_of([1, 2, 3])).partial_is_free
    pool.release([page])
    assert remember(pool, tree, keys_of([1, 2, 3, 4, 5]))[0] == page


def test_clear_gives_every_page_back() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of(list(range(11))))
    tree.clear()
    assert pool.num_free == pool.num_pages


def held_by_a_sequence(pool: PagedKVPool, tree: PrefixTree, keys: np.ndarray) -> list[int]:
    """As `remember`, but the sequence goes on holding its pages."""
    pages = pool.allocate(pool.pages_for(len(keys)))
    tree.insert_prefix(keys, pages)
    return pages


def test_clearing_spares_the_pages_of_sequences() -> None:
    pool, tree = make_tree()
    pages = held_by_a_sequence(pool, tree, keys_of([1, 2, 3, 4, 5]))
    assert tree.clear() == 0
    pool.check_integrity([pages])
    assert pool.release(pages) == 2
    assert tree.num_evictable == 0


def test_pages_held_by_a_sequence_are_skipped_but_not_forgotten() -> None:
    pool, tree = make_tree()
    pages = held_by_a_sequence(pool, tree, keys_of(list(range(12))))
    assert tree.num_evictable == 0 and tree.evict(3) == 0
    pool.release(pages[1:])
    assert tree.num_evictable == 2 and tree.evict(1) == 1
    assert tree.held_pages() == pages[:2]
    pool.release(pages[:1])
    assert tree.num_evictable == 2 and tree.evict(9) == 2


def test_a_page_before_one_in_use_is_not_evictable() -> None:
    """Two sequences computed the same first page: the second's own is not the tree's."""
    pool, tree = make_tree()
    first = held_by_a_sequence(pool, tree, keys_of([1, 2, 3, 4, 5]))
    second = held_by_a_sequence(pool, tree, keys_of([1, 2, 3, 4, 9]))
    assert tree.match_prefix(keys_of([1, 2, 3, 4, 9])).pages == first[:1]
    assert set(tree.held_pages()) == {first[0], first[1], second[1]}
    pool.release(first)
    assert tree.num_evictable == 1  # first[0] is before second[1], which is in use
    assert tree.evict(9) == 1
    pool.release(second)
    assert tree.evict(9) == 2
    assert pool.num_free == pool.num_pages


def test_eviction_is_by_last_use_across_branches() -> None:
    pool, tree = make_tree()
    sequences = [[n] * PAGE for n in range(5)]
    for tokens in sequences:
        remember(pool, tree, keys_of(tokens))
    tree.match_prefix(keys_of([0] * PAGE))
    tree.match_prefix(keys_of([2] * 2))  # in part
    remember(pool, tree, keys_of([1] * PAGE))
    order = []
    while tree.num_evictable:
        before = {n for n in range(5) if stored_silently(tree, n)}
        tree.evict(1)
        order += before - {n for n in range(5) if stored_silently(tree, n)}
    assert order == [3, 4, 0, 2, 1]
    assert tree.stats()["evictions"] == 5


def stored_silently(tree: PrefixTree, token: int) -> bool:
    """Whether [token] * PAGE is cached; a pin does not count as use."""
    pin = tree.pin(keys_of([token] * PAGE))
    pin.release()
    return pin.num_tokens == PAGE


def test_a_pin_keeps_whole_and_partial_pages() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2, 3, 4, 5, 6]))
    remember(pool, tree, keys_of([1, 2, 3, 4, 9]))
    pins = [tree.pin(keys_of([1, 2, 3, 4, 5, 7])) for _ in range(2)]
    assert [(p.num_tokens, p.num_pages) for p in pins] == [(5, 2)] * 2
    assert tree.stats()["pinned"] == 2 and tree.num_evictable == 1
    assert tree.evict(9) == 1
    pins[0].release()
    pins[0].release()
    assert tree.evict(9) == 0
    pins[1].release()
    assert tree.evict(9) == 2


def test_a_pin_moves_to_the_longer_page() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2]))
    pin = tree.pin(keys_of([1, 2]))
    pages = held_by_a_sequence(pool, tree, keys_of([1, 2, 3]))
    pool.release(pages)
    assert tree.held_pages() == pages and tree.evict(1) == 0
    pin.release()
    assert tree.evict(1) == 1


def test_a_pin_of_nothing_and_a_pin_of_what_was_forgotten_release_quietly() -> None:
    pool, tree = make_tree()
    assert tree.pin(keys_of([1])).num_pages == 0
    remember(pool, tree, keys_of([1, 2]))
    pin = tree.pin(keys_of([1, 2]))
    tree.clear()
    assert pool.num_free == pool.num_pages
    remember(pool, tree, keys_of([1, 2]))
    pin.release()
    tree.check_integrity()


def test_a_running_sequence_shares_what_it_has_so_far_and_writes_on() -> None:
    pool, tree = make_tree()
    tokens = [1, 2, 3, 4, 5, 6, 7]
    pages = pool.allocate(2)
    for index, token in enumerate(tokens):
        pool.pages[:, :, pages[index // PAGE], index % PAGE] = float(token)
        done = keys_of(tokens[: index + 1])
        tree.insert_prefix(done, pages[: pool.pages_for(len(done))])
        assert set(tree.held_pages()) == set(pages[: pool.pages_for(len(done))])
        match = tree.match_prefix(done)
        assert not match.partial_is_free  # the sequence writes behind it
        assert stored(pool, tree, keys_of([*tokens, 8])) == tokens[: index + 1]
        tree.check_integrity()
    pool.release(pages)
    assert tree.match_prefix(keys_of(tokens)).partial_is_free


def test_two_sequences_that_continue_one_partial_page_do_not_meet() -> None:
    pool, tree = make_tree()
    (page,) = remember(pool, tree, keys_of([1, 2]))
    first = tree.match_prefix(keys_of([1, 2, 3]))
    assert first.partial_is_free and first.partial == page
    pool.retain([page])  # the first goes on in place
    second = tree.match_prefix(keys_of([1, 2, 7]))
    assert second.partial == page and not second.partial_is_free
    remember(pool, tree, keys_of([1, 2, 7]))  # the second by copy
    pool.pages[:, :, page, 2] = 3.0
    tree.insert_prefix(keys_of([1, 2, 3]), [page])
    pool.release([page])
    assert stored(pool, tree, keys_of([1, 2, 3])) == [1, 2, 3]
    assert stored(pool, tree, keys_of([1, 2, 7])) == [1, 2, 7]
    tree.check_integrity()


def test_a_page_cannot_hold_two_things() -> None:
    pool, tree = make_tree()
    pages = pool.allocate(1)
    tree.insert_prefix(keys_of([1, 2]), pages)
    with pytest.raises(AssertionError, match="holds other keys"):
        tree.insert_prefix(keys_of([3, 4]), pages)


def test_the_heap_of_leaves_stays_small_without_eviction() -> None:
    """Each node that was replaced or cleared away leaves an entry behind."""
    pool, tree = make_tree()
    for _ in range(100):
        for length in range(1, PAGE + 1):
            remember(pool, tree, keys_of(list(range(length))))
        tree.clear()
    remember(pool, tree, keys_of([1, 2]))
    assert len(tree._leaves) <= 67
    assert tree.evict(1) == 1
    tree.check_integrity()
    pool.check_integrity([tree.held_pages()])


def test_stats_count_tokens_and_pages() -> None:
    pool, tree = make_tree()
    remember(pool, tree, keys_of([1, 2, 3, 4, 5]))
    tree.match_prefix(keys_of([1, 2, 3, 4, 5, 6]))
    tree.pin(keys_of([1, 2, 3, 4]))
    tree.evict(1)
    assert tree.stats() == {
        "queries": 11,
        "hits": 5,
        "evictions": 1,
        "pages": 1,
        "evictable": 0,
        "pinned": 1,
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=12))
def test_what_matches_is_what_was_written(sequences: list[list[int]]) -> None:
    pool, tree = make_tree(256)
    known: list[list[int]] = []
    for tokens in sequences:
        longest = max((_common(tokens, other) for other in known), default=0)
        assert stored(pool, tree, keys_of(tokens)) == tokens[:longest]
        remember(pool, tree, keys_of(tokens))
        known.append(tokens)
        tree.check_integrity()
        pool.check_integrity([tree.held_pages()])


def _common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
