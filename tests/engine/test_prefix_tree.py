from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.config import LanguageConfig
from vtts_rt.engine.kv_pool import PagedKVPool
from vtts_rt.engine.prefix_tree import PrefixTree

PAGE = 4
CONFIG = LanguageConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_theta=1e4,
    mrope_section=(1, 1, 0),
)


def make_tree(num_pages: int = 64) -> tuple[PagedKVPool, PrefixTree]:
    pool = PagedKVPool(
        CONFIG,
        dtype=torch.float32,
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


def test_a_partial_page_is_continued_in_place_only_when_nobody_else_uses_it() -> None:
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
