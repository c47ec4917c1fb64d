"""cascade_attention: the same as attention to joined pages, and groups that spare the most keys."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from triton_tools import check_interpreted

from vtts_rt.ops.cascade_attention import (
    MIN_GROUP,
    MIN_SHARED,
    Groups,
    cascade_attention,
    find_groups,
)
from vtts_rt.ops.paged_attention import paged_attention

# Two groups of three and two rows, one row alone between them; pages of 4.
PAGES = [[1, 2, 3, 9], [1, 2, 3, 10, 11], [1, 2, 3, 12], [7], [8, 5, 4], [8, 5, 6]]
NUM_KEYS = [13, 20, 14, 3, 9, 12]


def small_groups() -> Groups:
    found = find_groups(PAGES, NUM_KEYS, 4, min_group=2, min_shared=4)
    assert found is not None
    return found


def attend(q: torch.Tensor, pools: torch.Tensor, groups: Groups, **changes: object) -> torch.Tensor:
    arguments = groups._asdict() | {"scale": None} | changes
    return cascade_attention(q, *pools, **arguments)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_groups_attend_as_whole_sequences_do(index_dtype: torch.dtype) -> None:
    q, pools = torch.randn(6, 4, 8).double(), torch.randn(2, 13, 4, 2, 8).double()
    table = torch.tensor([[*pages, *[0] * (5 - len(pages))] for pages in PAGES])
    whole = paged_attention(q, *pools, table, torch.arange(7), torch.tensor(NUM_KEYS), scale=0.4)
    groups = small_groups()
    groups = Groups(*(x.to(index_dtype) for x in groups[:5]), *groups[5:])
    torch.testing.assert_close(attend(q, pools, groups, scale=0.4), whole)


def test_groups_are_whole_pages_of_neighbours() -> None:
    found = small_groups()
    assert found.cu_groups.tolist() == [0, 3, 4, 6]
    assert found.shared_seqlens.tolist() == [12, 0, 8] and found.max_shared == 12
    assert found.shared_table.tolist() == [[1, 2, 3], [0, 0, 0], [8, 5, 0]]
    assert found.seqlens_k.tolist() == [1, 8, 2, 3, 1, 4] and found.max_seqlen_k == 8
    assert found.page_table.tolist() == [[9, 0], [10, 11], [12, 0], [7, 0], [4, 0], [6, 0]]
    assert all(tensor.dtype is torch.int32 for tensor in found[:5])


def test_a_row_keeps_its_newest_key_for_itself() -> None:
    """The page that holds it may be written to, and is nobody else's."""
    found = find_groups([[1, 2], [1, 2]], [8, 8], 4, min_group=2, min_shared=1)
    assert found is not None
    assert found.shared_seqlens.tolist() == [4] and found.seqlens_k.tolist() == [4, 4]
    assert find_groups([[1], [1]], [4, 4], 4, min_group=2, min_shared=1) is None


def test_small_groups_are_not_worth_it() -> None:
    page_size = 16
    prefix = list(range(MIN_SHARED // page_size))
    rows = [[*prefix, 1000 + row] for row in range(MIN_GROUP)]
    lengths = [MIN_SHARED + 1] * MIN_GROUP
    found = find_groups(rows, lengths, page_size)
    assert found is not None and found.max_shared == MIN_SHARED
    assert find_groups(rows[1:], lengths[1:], page_size) is None
    assert find_groups([row[1:] for row in rows], [n - 16 for n in lengths], page_size) is None
    assert find_groups([], [], page_size) is None


def test_groups_spare_as_many_keys_as_any_split_does() -> None:
    def common(rows: list[list[int]]) -> int:
        count = 0
        while all(len(row) > count + 1 and row[count] == rows[0][count] for row in rows):
            count += 1
        return count

    def best(rows: list[list[int]]) -> int:
        """Most pages that are not read again, over all splits."""
        found = 0
        for size in range(1, len(rows) + 1):
            spared = (size - 1) * common(rows[:size]) if size >= 2 else 0
            found = max(found, spared + best(rows[size:]))
        return found

    choice = random.Random(0)
    for _ in range(60):
        # Pages hold one key; the last of a row is its own.
        rows: list[list[int]] = []
        for row in range(choice.randint(1, 7)):
            kept = rows[-1][: choice.randint(0, len(rows[-1]) - 1)] if rows else []
            fresh = [100 * (row + 1) + i for i in range(choice.randint(1, 4))]
            rows.append(kept + fresh)
        found = find_groups(rows, [len(row) for row in rows], 1, min_group=2, min_shared=1)
        if found is None:
            assert best(rows) == 0
            continue
        starts = found.cu_groups.tolist()
        spared = 0
        for group, (start, stop) in enumerate(pairwise(starts)):
            shared = int(found.shared_seqlens[group])
            spared += (stop - start - 1) * shared
            for row in range(start, stop):
                own = int(found.seqlens_k[row])
                pages = found.shared_table[group, :shared].tolist()
                assert pages + found.page_table[row, :own].tolist() == rows[row]
        assert spared == best(rows)


def test_bad_arguments_are_named() -> None:
    q, pools, groups = torch.randn(6, 4, 8), torch.randn(2, 13, 4, 2, 8), small_groups()

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match="cascade_attention: " + message):
            attend(q, pools, groups, **changes)

    refused(r"cu_groups must be \(4,\) int32 or int64 on cpu", cu_groups=torch.arange(3))
    refused(r"shared_seqlens must be \(3,\)", shared_seqlens=torch.ones(3))
    refused(r"page_table must be \(6, 2\)", page_table=groups.page_table[1:])
    refused(r"seqlens_k must be \(6,\)", seqlens_k=groups.seqlens_k[1:])
    with pytest.raises(ValueError, match="cascade_attention: values must be like keys"):
        cascade_attention(q, pools[0], pools[1].half(), **groups._asdict())
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        attend(q, pools, groups, backend="triton")


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("cascade_attention") == 15
