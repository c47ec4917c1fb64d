"""The layout of token trees: pure numpy, against paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tree_tools import GROUPS, Video, flat_group, forest, make_row, nested_group, random_rows, said
from utils import seeds

from vtts_rt.rollout.tree import TokenTree
from vtts_rt.rollout.tree_attention import _calls, interval_mask


def prefixes(row: Any) -> list[tuple[Any, ...]]:
    """Of every token all that makes it the node that it is."""
    pair: list[Any] = [None] * len(row.token_ids)
    for ref in row.vision:
        num = ref.length // len(ref.keys)
        for i in range(ref.length):
            pair[ref.start + i] = ref.keys[i // num], i % num
    tokens = zip(row.token_ids.tolist(), *row.position_ids.tolist(), pair, strict=True)
    path: tuple[Any, ...] = ()
    return [path := (*path, token) for token in tokens]


def visible(end: np.ndarray) -> np.ndarray:
    """(M, M): query sees key."""
    nodes = np.arange(len(end))
    return (nodes <= nodes[:, None]) & (nodes[:, None] < end)


def check(rows: list[Any]) -> None:
    tree = TokenTree.of(rows)
    paths = [prefixes(row) for row in rows]
    assert len(tree) == len({path for own in paths for path in own})
    seen = visible(tree.end)
    node_of: dict[Any, int] = {}
    starts = np.cumsum([0, *(pair.num_tokens for pair in tree.pairs)])
    feature_of = dict(zip(tree.vision.tolist(), tree.features.tolist(), strict=True))
    for row, own, places in zip(rows, paths, tree.places, strict=True):
        assert (tree.token_ids[places] == row.token_ids).all()
        assert (tree.position_ids[:, places] == row.position_ids).all()
        for i, (path, node) in enumerate(zip(own, places.tolist(), strict=True)):
            assert node_of.setdefault(path, node) == node
            assert set(np.flatnonzero(seen[node])) == set(places[: i + 1].tolist())
            key_place = path[-1][-1]
            if key_place is None:
                assert node not in feature_of
            else:
                number = [pair.key for pair in tree.pairs].index(key_place[0])
                assert feature_of[node] == starts[number] + key_place[1]
    for index, row in enumerate(rows):
        mine = tree.index[tree.offsets[index] : tree.offsets[index + 1]]
        said_at = np.flatnonzero(row.mask)
        assert (tree.scored[mine] == tree.places[index][said_at]).all()
        assert (tree.predicting[mine] == tree.places[index][said_at - 1]).all()
    covered = np.zeros((len(tree), len(tree)), int)
    for first, stop, key, key_stop in _calls(tree.end):
        block = np.ones((stop - first, key_stop - key), int)
        covered[first:stop, key:key_stop] += np.tril(block) if first == key else block
    assert (covered == seen).all()


@pytest.mark.parametrize("seed", seeds(4, 40))
def test_random_forests_are_their_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        check(random_rows(rng))


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_their_paths(group: str) -> None:
    check(GROUPS[group]())


def test_shared_prefixes_stand_once() -> None:
    assert len(TokenTree.of(flat_group())) == 13 + 4 + 1 + 3 + 1 + 5 + 3
    assert len(TokenTree.of(flat_group()[:1] * 5)) == 17
    tree = TokenTree.of(nested_group())
    assert len(tree.pairs) == 2 + 1 + 2 + 3 and len(tree.vision) > tree.num_features


def test_videos_with_one_question_and_grid_are_apart() -> None:
    one, other = (make_row([1], Video((key,)), [2], said(3)) for key in "ab")
    tree = TokenTree.of([one, other])
    assert len(tree) == 1 + 2 * (len(one.token_ids) - 1)
    assert [(pair.row, pair.start) for pair in tree.pairs] == [(0, 0), (1, 0)]


def test_a_position_makes_another_node() -> None:
    one, other = make_row([1, 2], said(3)), make_row([1, 2], said(3))
    other.position_ids[0, 1] += 1
    assert len(TokenTree.of([one, other])) == 5


def test_features_are_picked_from_the_first_rows_that_show_them() -> None:
    rows = forest()
    tree = TokenTree.of(rows)
    asked = []

    def features_of(row: int) -> torch.Tensor:
        asked.append(row)
        return torch.arange(8.0)[:, None] + 100 * row

    picked = tree.pick(features_of)[:, 0].tolist()
    assert asked == [0, 8] and picked == [*range(8), *range(804, 808)]


@pytest.mark.parametrize("length", [5, 128, 300, 1100])
def test_the_block_mask_is_the_interval(length: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    rng = np.random.default_rng(length)
    row = [
        make_row(rng.integers(0, 9, length // 3).tolist(), said(i, *range(i * 9))) for i in range(5)
    ]
    end = TokenTree.of(row).end
    end = np.concatenate((end, np.arange(len(end), length) + 1)) if len(end) < length else end
    mask = interval_mask(end, torch.device("cpu"))
    size = mask.shape[-1]
    expected = create_block_mask(mask.mask_mod, None, None, size, size, device="cpu")
    assert (mask.to_dense() == expected.to_dense()).all()
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert (getattr(mask, name) == getattr(expected, name)).all(), name
    q, k = torch.arange(size)[:, None], torch.arange(size)
    dense = mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k).numpy()
    assert (dense[: len(end), : len(end)] == visible(end)).all() and dense.any(1).all()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "at least one"),
        ([make_row(said(1, 2))], "first token is given"),
        ([make_row([])], "first token is given"),
    ],
)
def test_rows_that_make_no_tree_are_refused(rows: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TokenTree.of(rows)
