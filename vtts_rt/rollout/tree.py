"""TokenTree: rows of one or several rollout groups with every shared prefix once.

Two tokens of two rows are one node iff all before them are, and their ids, positions and, inside
vision segments, pairs and places in the pair are equal. Nodes stand in depth-first order, so that
all that follows a node, in any row, is an interval: key k is visible to query q iff
k <= q < end[k].

Legend: M nodes, N tokens of a row, S scored nodes, T scored tokens of all rows, V nodes inside
vision segments, P tokens of all distinct pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtts_rt.types import require

if TYPE_CHECKING:
    from torch import Tensor

    from vtts_rt.rollout.rows import RolloutRow


class TreePair(NamedTuple):
    """A frame pair that a tree shows, once however often it is shown.

    key: as rows name it. row: one that shows it; start: where its features begin among those of all
    vision segments of that row. num_tokens: of the pair.
    """

    key: Hashable
    row: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """All arrays int64.

    token_ids: (M,). position_ids: (3, M). end: (M,), end of the interval of nodes that see each.
    places: of every row (N,), the node of each token. scored: (S,) ascending, the nodes that count
    in a loss; predicting: (S,), the node before each. index: (T,) into `scored`, of every scored
    token, row after row; offsets: (rows + 1,), where those of each row begin in `index`. pairs:
    distinct ones. vision: (V,) ascending; features: (V,), for each the row of the features of all
    `pairs`, one pair after the other.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    end: np.ndarray
    places: tuple[np.ndarray, ...]
    scored: np.ndarray
    predicting: np.ndarray
    index: np.ndarray
    offsets: np.ndarray
    pairs: tuple[TreePair, ...]
    vision: np.ndarray
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_features(self) -> int:
        """P."""
        return sum(pair.num_tokens for pair in self.pairs)

    @classmethod
    def of(cls, rows: Sequence[RolloutRow]) -> TokenTree:
        """ValueError for no rows, for one without tokens, and for one whose first token counts,
        which nothing predicts."""
        require("TokenTree", "rows", len(rows), len(rows) > 0, "at least one")
        for row in rows:
            fits = len(row.token_ids) > 0 and not row.mask[0]
            rule = "of rows whose first token is given, not generated"
            require("TokenTree", "rows", row.token_ids[:1].tolist(), fits, rule)
        pairs, tables = _tables(rows)
        lengths = [len(table) for table in tables]
        _, inverse = np.unique(np.concatenate(tables), axis=0, return_inverse=True)
        names = np.split(inverse.reshape(-1), np.cumsum(lengths)[:-1])
        places, end = _lay_out(names)

        num_nodes = len(end)
        table, before = np.empty((num_nodes, 6), np.int64), np.full(num_nodes, -1)
        for nodes, own in zip(places, tables, strict=True):
            table[nodes], before[nodes[1:]] = own, nodes[:-1]

        counted = [nodes[np.asarray(row.mask)] for nodes, row in zip(places, rows, strict=True)]
        scored, flat = np.unique(np.concatenate(counted), return_inverse=True)
        vision = np.flatnonzero(table[:, 4] >= 0)
        firsts = np.cumsum([0, *(pair.num_tokens for pair in pairs)])
        return cls(
            token_ids=table[:, 0].copy(),
            position_ids=table[:, 1:4].T.copy(),
            end=end,
            places=tuple(places),
            scored=scored,
            predicting=before[scored],
            index=flat.reshape(-1),
            offsets=np.cumsum([0, *map(len, counted)]),
            pairs=tuple(pairs),
            vision=vision,
            features=firsts[table[vision, 4]] + table[vision, 5],
        )

    def pick(self, features_of: Callable[[int], Tensor]) -> Tensor:
        """(P, feature_dim): features of all pairs, of those of rows.

        features_of: (index of a row) -> (tokens of all its vision segments, feature_dim), as
        `Runtime.features` gives them; called once for each row that some pair is taken from.
        """
        import torch

        of_row = {row: features_of(row) for row in sorted({pair.row for pair in self.pairs})}
        return torch.cat([of_row[p.row][p.start : p.start + p.num_tokens] for p in self.pairs])


def _tables(rows: Sequence[RolloutRow]) -> tuple[list[TreePair], list[np.ndarray]]:
    """Of every row (N, 6): id, position on three axes, pair or -1, place in the pair."""
    pairs: list[TreePair] = []
    numbers: dict[Hashable, int] = {}
    tables = []
    for index, row in enumerate(rows):
        table = np.full((len(row.token_ids), 6), -1, np.int64)
        table[:, 0], table[:, 1:4] = row.token_ids, np.asarray(row.position_ids).T
        start = 0
        for ref in row.vision:
            num = ref.length // len(ref.keys)
            of_keys = []
            for k, key in enumerate(ref.keys):
                if key not in numbers:
                    numbers[key] = len(pairs)
                    pairs.append(TreePair(key, index, start + k * num, num))
                known = pairs[numbers[key]].num_tokens
                require("TokenTree", "rows", num, num == known, f"of {known} tokens a pair {key!r}")
                of_keys.append(numbers[key])
            place = slice(ref.start, ref.start + ref.length)
            table[place, 4] = np.repeat(of_keys, num)
            table[place, 5] = np.tile(np.arange(num), len(ref.keys))
            start += ref.length
        tables.append(table)
    return pairs, tables


def _lay_out(names: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Of every row (N,), the nodes of its tokens; and `end`.

    names: of every row (N,), equal where tokens are the same.
    """
    places = [np.empty(len(own), np.int64) for own in names]
    runs: list[int] = []  # nodes in each
    ends: list[int] = []
    num_nodes = 0
    # Rows that agree up to a depth, with it; or a run that ends.
    work: list[tuple[list[int], int] | int] = [(list(range(len(names))), -1)]
    while work:
        item = work.pop()
        if isinstance(item, int):
            ends[item] = num_nodes
            continue
        members, depth = item
        stop = max(depth, 0)
        if depth >= 0:
            stop = _agreement([names[m] for m in members], depth)
            nodes = np.arange(num_nodes, num_nodes + stop - depth)
            for m in members:
                places[m][depth:stop] = nodes
            work.append(len(runs))
            runs.append(stop - depth)
            ends.append(0)
            num_nodes += stop - depth
        branches: dict[int, list[int]] = {}
        for m in members:
            if stop < len(names[m]):
                branches.setdefault(int(names[m][stop]), []).append(m)
        work += [(branch, stop) for branch in reversed(branches.values())]
    return places, np.repeat(np.array(ends, np.int64), runs)


def _agreement(rows: Sequence[np.ndarray], depth: int) -> int:
    """Up to where rows, equal at `depth`, are equal to the first."""
    stop = min(map(len, rows))
    first = rows[0]
    for row in rows[1:]:
        differs = first[depth:stop] != row[depth:stop]
        if differs.any():
            stop = depth + int(differs.argmax())
    return stop
