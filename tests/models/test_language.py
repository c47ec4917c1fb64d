"""The language model: packed batches, paged batches, gradients, bad batches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from vtts_rt.models.attention import Attend, Cascade, PagedKV, plan_calls, upload, with_tensors
from vtts_rt.models.config import LanguageConfig
from vtts_rt.models.language import ForwardBatch, LanguageModel, VisionRows
from vtts_rt.ops import paged_sdpa
from vtts_rt.ops.cascade_attention import find_groups

CONFIG = LanguageConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e6,
    mrope_section=(2, 3, 3),
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(2)
    return LanguageModel(CONFIG)


def bounds(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def tokens(count: int) -> Tensor:
    return torch.randint(0, 50, (count,))


def alone(model: LanguageModel, ids: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
    outputs = []
    for start, length in zip(bounds(lengths), lengths, strict=False):
        part = slice(start, start + length)
        outputs.append(model(ForwardBatch(ids[part], None, positions[:, part], [0, length])))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", [[9], [7, 7, 7], [5, 5, 8, 1, 5], [3, 0, 4], [0, 2]])
def test_packed_sequences_do_not_see_each_other(model: LanguageModel, lengths: list[int]) -> None:
    ids = tokens(sum(lengths))
    positions = torch.randint(0, 40, (3, sum(lengths)))
    with torch.no_grad():
        together = model(ForwardBatch(ids, None, positions, torch.tensor(bounds(lengths))))
        expected = alone(model, ids, positions, lengths)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)


def test_a_token_sees_nothing_after_it(model: LanguageModel) -> None:
    ids, positions = tokens(12), torch.arange(12).expand(3, -1)
    touched = ids.clone()
    touched[7] = (ids[7] + 1) % 50
    with torch.no_grad():
        change = model(ForwardBatch(touched, None, positions, [0, 12]))
        change = (change - model(ForwardBatch(ids, None, positions, [0, 12]))).abs().amax(1)
    assert torch.all(change[:7] == 0)
    assert torch.all(change[7:] > 0)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "auto")],
)
def test_paged_batch_of_prefill_chunk_and_decode(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences at different stages in one pass, their pages interleaved.

    By torch's operators a prefill that continues is masked in float64 and split at the cached keys
    in float32.
    """
    monkeypatch.setenv("VTTS_RT_BACKEND", f"paged_attention={backend}")
    torch.manual_seed(2)
    model = LanguageModel(CONFIG).to(dtype)
    monkeypatch.setattr(paged_sdpa, "QUERY_BLOCK", 4)  # several mask blocks for one chunk
    page_size = 4
    totals, cached = [19, 6, 13], [5, 5, 0]
    table = torch.randperm(15).view(3, 5)
    pages = torch.full((2, 2, 15, page_size, 2, 16), float("nan"), dtype=dtype)
    x = [tokens(total) for total in totals]
    places = [torch.randint(0, 40, (3, total)) for total in totals]

    def run(starts: list[int], ends: list[int], num_last: list[int] | None = None) -> Tensor:
        """num_last: how many of the last rows of each sequence are wanted."""
        slots = []
        for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
            index = torch.arange(start, end)
            slots.append(table[b, index // page_size] * page_size + index % page_size)
        spans = [slice(a, b) for a, b in zip(starts, ends, strict=True)]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        plan = partial(plan_calls, table.tolist(), seqlens_k=ends, page_size=page_size)
        rows = last = None
        if num_last is not None:
            last = plan(seqlens_q=num_last)
            wanted = zip(bounds(sizes)[1:], num_last, strict=True)
            rows = torch.cat([torch.arange(end - num, end) for end, num in wanted])
        return model(
            ForwardBatch(
                torch.cat([item[span] for item, span in zip(x, spans, strict=True)]),
                None,
                torch.cat([item[:, span] for item, span in zip(places, spans, strict=True)], 1),
                bounds(sizes),
                PagedKV(pages, torch.cat(slots), plan(seqlens_q=sizes), last),
                rows,
            )
        )

    run([0, 0, 0], cached)
    hidden = run(cached, totals)
    assert not hidden.requires_grad
    assert not pages.requires_grad
    expected = [
        model(ForwardBatch(item, None, place, [0, len(item)]))[start:]
        for item, place, start in zip(x, places, cached, strict=True)
    ]
    torch.testing.assert_close(hidden, torch.cat(expected).detach(), rtol=0, atol=1e-5)
    written = pages.clone()
    for num_last in ([0, 0, 0], [1, 0, 3], [14, 1, 13], [2, 1, 1], [9, 0, 0]):
        pages.fill_(float("nan"))
        run([0, 0, 0], cached, [0, 0, 0])
        some = run(cached, totals, num_last)
        kept = [part[len(part) - num :] for part, num in zip(expected, num_last, strict=True)]
        assert some.shape == (sum(num_last), 64)
        torch.testing.assert_close(some, torch.cat(kept).detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(pages, written, equal_nan=True, rtol=0, atol=1e-5)
    used = {int(p) for row, total in zip(table, totals, strict=True) for p in row[: -(-total // 4)]}
    for page in set(range(15)) - used:
        assert pages[:, :, page].isnan().all()


@pytest.mark.parametrize("chosen", [None, [], [18], [0, 13, 18, 19]])
def test_metadata_on_the_device_gives_what_lists_give(
    model: LanguageModel, chosen: list[int] | None
) -> None:
    """A prefill that continues, two decoding rows in a cascade, a row of padding."""
    torch.manual_seed(3)
    lengths, ends = [17, 1, 1], [19, 13, 11]
    table = torch.tensor([[5, 2, 9, 7, 0], [1, 3, 4, 8, 0], [1, 3, 6, 0, 0]])
    pages = torch.randn(2, 2, 10, 4, 2, 16)
    index = torch.cat([torch.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)])
    sequence = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    slots = table[sequence, index // 4] * 4 + index % 4
    ids, positions = tokens(20), torch.randint(0, 40, (3, 20))
    rows = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    expected_pages = pages.clone()
    inside = None if rows is None else rows[rows < 19]
    with torch.no_grad():
        kv = PagedKV(expected_pages, slots, plan_calls(table.tolist(), lengths, ends, 4))
        expected = model(
            ForwardBatch(ids[:19], None, positions[:, :19], bounds(lengths), kv, inside)
        )
    groups = find_groups(table[1:, :4].tolist(), ends[1:], 4, min_group=2, min_shared=8)
    assert groups is not None
    groups = groups._replace(
        page_table=torch.cat([groups.page_table, torch.zeros_like(groups.page_table[:1])]),
        seqlens_k=torch.tensor([*groups.seqlens_k, 1]),
        cu_groups=torch.tensor([0, 3]),
    )
    calls = [
        Attend(0, 17, table[:1], torch.tensor([0, 17]), torch.tensor([19]), 17, 19),
        Cascade(17, 20, *groups),
    ]
    tensors = [x for call in calls for x in call if isinstance(x, Tensor)]
    padded, *moved = upload([torch.tensor([*slots, -1]), *tensors], torch.device("cpu"))
    assert all(t.data_ptr() % 16 == padded.data_ptr() % 16 for t in moved)
    given = iter(moved)
    plan = PagedKV(pages, padded, with_tensors(calls, given))
    with torch.no_grad():
        hidden = model(ForwardBatch(ids, None, positions, [*bounds(lengths), 20], plan, rows))
    wanted = range(20) if chosen is None else chosen
    real = torch.tensor([row < 19 for row in wanted], dtype=torch.bool)
    torch.testing.assert_close(hidden[real], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pages, expected_pages, rtol=0, atol=1e-6)


def test_every_parameter_gets_a_gradient(model: LanguageModel) -> None:
    features = torch.randn(3, 64, requires_grad=True)
    vision = VisionRows(torch.tensor([2, 3, 9]), features)
    hidden = model(ForwardBatch(tokens(12), vision, torch.arange(6).repeat(3, 2), [0, 6, 12]))
    model.logits(hidden).log_softmax(-1)[:, 0].sum().backward()
    trained = [*model.parameters(), features]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    model.zero_grad()


def test_empty_batch_gives_no_hidden_states(model: LanguageModel) -> None:
    batch = ForwardBatch(tokens(0), None, torch.empty(3, 0, dtype=torch.long), [0])
    assert model(batch).shape == (0, 64)


def test_wanted_rows_are_those_of_all_in_any_order(model: LanguageModel) -> None:
    ids, positions, rows = tokens(9), torch.randint(0, 40, (3, 9)), torch.tensor([7, 0, 3])
    with torch.no_grad():
        every = model(ForwardBatch(ids, None, positions, [0, 4, 9]))
        some = model(ForwardBatch(ids, None, positions, [0, 4, 9], rows=rows))
    torch.testing.assert_close(some, every[rows], rtol=0, atol=1e-6)


def test_batches_that_do_not_fit_are_named(model: LanguageModel) -> None:
    ids, positions = tokens(4), torch.arange(4).expand(3, -1)
    with pytest.raises(ValueError, match="cu_seqlens_q must be"):
        model(ForwardBatch(ids, None, positions, [0, 3]))
    with pytest.raises(ValueError, match=r"position_ids must be \(3, 4\), got \(3, 3\)"):
        model(ForwardBatch(ids, None, positions[:, :3], [0, 4]))
    for rows in ([-1, 2], [4]):
        with pytest.raises(ValueError, match=r"rows must be in \[0, 4\), got"):
            model(ForwardBatch(ids, None, positions, [0, 4], rows=torch.tensor(rows)))
    with pytest.raises(ValueError, match="seqlens_k must be >= 4 new, got 3"):
        plan_calls([[0]], [4], [3], 4)


@pytest.mark.parametrize(
    ("field", "value"), [("num_key_value_heads", 3), ("mrope_section", (2, 3, 4))]
)
def test_impossible_shapes_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        LanguageModel(replace(CONFIG, **{field: value}))  # type: ignore[arg-type]
