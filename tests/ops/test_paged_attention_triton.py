"""paged_attention's Triton kernels: in the interpreter, and what the host decides for them."""

from __future__ import annotations

import pytest
import torch
from triton_tools import check_interpreted, run_triton

SCRIPT = """
import torch
from op_cases.case import poisoned
from op_cases.paged_attention import Shape, _batch
from vtts_rt.ops.paged_attention import paged_attention, paged_attention_ref

torch.set_num_threads(1)


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


# A CUDA graph captured for longer sequences: more splits than these have keys for.
batch = _batch("cpu", torch.float32, Shape((1, 1), (9, 70), (4, 2, 16)), False)
out = paged_attention_ref(*batch)
for most in (None, 70, 1000, 100_000):
    with poisoned():
        found = paged_attention(
            *batch, max_seqlen_q=most and 1, max_seqlen_k=most, backend="triton"
        )
    close(found, out)
scaled = paged_attention(*batch, scale=0.7, backend="triton")
close(scaled, paged_attention_ref(*batch, scale=0.7))

# Padding: a sequence without keys, and rows of no sequence.
padded = batch._replace(
    q=torch.cat((batch.q, torch.full((2, 4, 16), torch.nan))),
    page_table=torch.cat((batch.page_table, torch.full((1, 5), -7))),
    cu_seqlens_q=torch.tensor([0, 1, 2, 3]),
    seqlens_k=torch.tensor([9, 70, 0]),
)
for most in (70, 1000):
    with poisoned():
        found = paged_attention(*padded, max_seqlen_q=1, max_seqlen_k=most, backend="triton")
    close(found[:2], out)
    assert bool((found[2] == 0).all())

# Rows of a wider table, indices of 32 bits, queries whose features are not adjacent.
wider = torch.zeros(2, 9, dtype=torch.int32)
wider[:, :5] = batch.page_table
strided = batch._replace(
    q=batch.q.transpose(1, 2).contiguous().transpose(1, 2),
    page_table=wider[:, :5],
    cu_seqlens_q=batch.cu_seqlens_q.int(),
)
close(paged_attention(*strided, backend="triton"), out)

nothing = batch._replace(
    q=batch.q[:0], page_table=wider[:0], cu_seqlens_q=torch.zeros(1).long(), seqlens_k=wider[:0, 0]
)
assert paged_attention(*nothing, backend="triton").shape == (0, 4, 16)


def refused(message, **changes):
    try:
        paged_attention(*batch._replace(**changes), backend="triton")
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


refused("torch.float64 queries and torch.float32 keys", q=batch.q.double())
refused("a tensor that needs a gradient", q=batch.q.clone().requires_grad_())
apart = batch.values.transpose(0, 1).contiguous().transpose(0, 1)
refused("not laid out alike with adjacent features", values=apart)
close(paged_attention(*batch._replace(values=apart)), out)  # "auto" goes to torch
print("done")
"""


@pytest.mark.slow
def test_cases_under_the_interpreter() -> None:
    assert check_interpreted("paged_attention") == 33


@pytest.mark.slow
def test_padding_bounds_and_layouts_under_the_interpreter() -> None:
    assert run_triton(SCRIPT, interpret=True).split()[-1] == "done"


def test_keys_are_split_while_there_is_room() -> None:
    pytest.importorskip("triton")
    from vtts_rt.kernels.paged_attention import MAX_SPLITS, num_splits

    assert num_splits(4, 4096, 132, 64) == 32  # no less than two blocks of keys each
    assert num_splits(4, 32768, 132, 64) == MAX_SPLITS
    assert num_splits(16, 32768, 132, 64) == 16  # two programs an SM
    assert num_splits(200, 32768, 132, 64) == 1
    assert num_splits(4, 1, 132, 64) == num_splits(0, 0, 132, 64) == 1


def test_tiles_hold_the_rows_of_a_sequence() -> None:
    pytest.importorskip("triton")
    from vtts_rt.kernels.paged_attention import plan

    def planned(num_rows: int, num_sequences: int, max_rows: int, max_keys: int) -> tuple[int, ...]:
        q = torch.empty(num_rows, 28, 128, dtype=torch.bfloat16)
        keys = torch.empty(1, 16, 4, 128, dtype=torch.bfloat16)
        found = plan(q, keys, num_sequences, max_rows, max_keys)
        return found.tiles.block_m, found.num_tiles, found.num_splits

    # The interpreter's machine has room for 8 programs.
    assert planned(1, 1, 1, 4096) == (16, 1, 2)
    assert planned(16, 16, 1, 4096) == (16, 1, 1)
    assert planned(9, 1, 9, 4096) == (64, 1, 2)
    assert planned(16, 1, 16, 256) == (128, 1, 2)
    assert planned(1000, 1, 1000, 4096) == (128, 55, 1)
    # Bounds beyond what there are rows for do not count as work.
    assert planned(1, 1, 1000, 4096) == (128, 55, 2)
