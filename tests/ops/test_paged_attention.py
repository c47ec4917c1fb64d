"""paged_attention: the native kernel against the equation; the same bits however rows are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.paged_attention import paged_attention, paged_attention_ref

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]


@dataclass
class Case:
    """A packed batch whose pages lie anywhere in the pool; slots that nobody may read are NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seqlens_k: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(self.__dict__.values())

    def in_float64(self) -> Case:
        wide = (self.q.double(), self.keys.double(), self.values.double())
        return Case(*wide, *self.arguments[3:])


def make(
    num_new: list[int],
    num_keys: list[int],
    heads: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """heads: query heads, key heads, head dim."""
    num_heads, num_kv_heads, head_dim = heads
    counts = [-(-n // page_size) for n in num_keys]
    num_pages = sum(counts) + 3
    keys, values = torch.full((2, num_pages, page_size, num_kv_heads, head_dim), torch.nan)
    table = torch.zeros(len(num_new), max([*counts, 1]), dtype=torch.int64)
    order = torch.randperm(num_pages).tolist()
    for row, (count, total) in enumerate(zip(counts, num_keys, strict=True)):
        pages = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
        table[row, :count] = pages
        for pool in (keys, values):
            slots = torch.full((count * page_size, num_kv_heads, head_dim), torch.nan)
            slots[:total] = torch.randn(total, num_kv_heads, head_dim)
            pool[pages] = slots.view(count, page_size, num_kv_heads, head_dim)
    # Rows of a wider matrix, as queries inside a projection's output are.
    q = torch.randn(sum(num_new), num_heads + 2, head_dim)[:, :num_heads]
    bounds = torch.tensor([0, *num_new]).cumsum(0)
    floats = q.to(dtype), keys.to(dtype), values.to(dtype)
    return Case(*floats, table, bounds, torch.tensor(num_keys, dtype=torch.int64))


def on_isa(case: Case, isa: str, num_threads: int) -> Tensor:
    out = torch.full(case.q.shape, torch.nan, dtype=case.q.dtype)
    _C.paged_attention(
        case.q.data_ptr(),
        case.q.stride(0),
        case.keys.data_ptr(),
        case.values.data_ptr(),
        case.page_table.data_ptr(),
        case.page_table.shape[1],
        case.cu_seqlens_q.data_ptr(),
        case.seqlens_k.data_ptr(),
        out.data_ptr(),
        case.q.shape[0],
        case.page_table.shape[0],
        tuple(case.keys.shape),
        case.q.shape[1],
        case.q.shape[2] ** -0.5,
        num_threads,
        isa,
        native.STORAGE[case.q.dtype],
    )
    return out


CASES = [
    ([1], [1], (1, 1, 8), 1),
    ([1], [700], (8, 2, 64), 16),
    ([1, 1, 1], [5, 256, 257], (4, 2, 24), 4),
    ([3, 1, 16, 0, 2], [3, 40, 300, 7, 513], (6, 2, 40), 16),
    ([16], [16], (7, 1, 128), 5),  # groups that are no multiple of 4
    ([2, 2], [1030, 9], (3, 3, 256), 32),  # no groups
    ([0], [0], (2, 1, 8), 4),
    ([17], [17], (7, 1, 128), 5),
    ([180, 3, 40], [180, 20, 400], (6, 2, 40), 16),  # from the start, few rows between, a prefix
    ([33], [1030], (3, 3, 256), 32),
    ([150], [513], (8, 2, 64), 16),  # 2 blocks of 256 keys and one key; more rows than a task takes
]


def check_error(case: Case, isa: str) -> None:
    """The 2x rule of docs/ops.md, against torch's operators in the same storage type."""
    exact = paged_attention_ref(*case.in_float64().arguments)
    out = on_isa(case, isa, num_threads=1)
    assert bool(out.isfinite().all())
    if out.numel():
        torchs = paged_attention(*case.arguments, backend="torch")
        allowed = 2 * (torchs - exact).abs().max()
        ulp = torch.finfo(case.q.dtype).eps * exact.abs().max()
        assert (out - exact).abs().max() <= allowed + ulp


@pytest.mark.parametrize("dtype", native.STORAGE)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set_is_as_exact_as_torch(
    isa: str, case: tuple, dtype: torch.dtype
) -> None:
    check_error(make(*case, dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_new", [2, 90])
def test_scores_of_any_size_are_exact(isa: str, num_new: int) -> None:
    """Weights from one to vanishing: the exponential over its whole range."""
    case = make([num_new], [600], (4, 1, 64), 16)
    case.q *= 20.0
    check_error(case, isa)


@pytest.mark.parametrize("dtype", native.STORAGE)
@pytest.mark.parametrize("isa", ISAS)
def test_a_prompt_has_the_same_bits_however_it_is_cut(isa: str, dtype: torch.dtype) -> None:
    """At once, row by row, in random chunks beside other sequences, on one thread and two."""
    case = make([560, 9, 300], [560, 517, 700], (8, 2, 64), 16, dtype)
    together = on_isa(case, isa, num_threads=2)
    bounds, num_keys = case.cu_seqlens_q.tolist(), case.seqlens_k.tolist()
    cuts = [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    chunks = [[first, *(n for n in rest if torch.rand(()) < 0.01)] for first, *rest in cuts]
    for starts in (cuts, chunks):
        parts = []  # sequence, first row, end
        for s, own in enumerate(starts):
            parts += [(s, *part) for part in zip(own, [*own[1:], bounds[s + 1]], strict=True)]
        sizes = torch.tensor([0, *(end - start for _, start, end in parts)])
        cut = replace(
            case,
            page_table=case.page_table[[s for s, *_ in parts]],
            cu_seqlens_q=sizes.cumsum(0),
            seqlens_k=torch.tensor([num_keys[s] - bounds[s + 1] + end for s, _, end in parts]),
        )
        assert torch.equal(on_isa(cut, isa, num_threads=1), together)


@pytest.mark.parametrize("isa", ISAS)
def test_a_sequence_has_the_same_bits_alone(isa: str) -> None:
    case = make([1, 9, 100], [900, 517, 260], (6, 3, 40), 5)
    together = on_isa(case, isa, num_threads=2)
    bounds = case.cu_seqlens_q.tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        alone = replace(
            case,
            q=case.q[start:stop],
            page_table=case.page_table[s : s + 1],
            cu_seqlens_q=torch.tensor([0, stop - start]),
            seqlens_k=case.seqlens_k[s : s + 1],
        )
        assert torch.equal(on_isa(alone, isa, num_threads=1), together[start:stop])


def test_the_public_function_equals_the_reference_on_any_backend() -> None:
    case = make([2, 1], [30, 21], (4, 2, 16), 4)
    expected = paged_attention_ref(*case.arguments)
    for backend in ("auto", "cpu", "torch", "reference"):
        out = paged_attention(*case.arguments, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    scaled = paged_attention(*case.arguments, scale=0.5, backend="cpu")
    again = paged_attention_ref(*case.arguments, scale=0.5)
    torch.testing.assert_close(scaled, again, rtol=1e-5, atol=1e-6)


def test_indices_of_both_types_and_rows_of_a_wider_table() -> None:
    case = make([2, 1], [30, 21], (4, 2, 16), 4)
    wider = torch.zeros(2, 11, dtype=torch.int32)
    wider[:, :8] = case.page_table
    rest = (wider[:, :8], case.cu_seqlens_q.int(), case.seqlens_k.int())
    for backend in ("cpu", "reference"):
        out = paged_attention(*case.arguments[:3], *rest, backend=backend)
        assert torch.equal(out, paged_attention(*case.arguments, backend=backend))


def test_what_the_kernel_cannot_take_goes_to_torch() -> None:
    wide = make([2], [9], (4, 2, 16), 4).in_float64()
    odd = make([2], [9], (4, 2, 12), 4)
    for case in (wide, odd):
        out = paged_attention(*case.arguments)
        assert torch.equal(out, paged_attention(*case.arguments, backend="torch"))
        torch.testing.assert_close(out, paged_attention_ref(*case.arguments))
    with pytest.raises(ValueError, match="what backend 'cpu' takes, got 'head dim 12, not a mult"):
        paged_attention(*odd.arguments, backend="cpu")
    with pytest.raises(ValueError, match="got 'a tensor that is not float32 or bfloat16 on"):
        paged_attention(*wide.arguments, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_bad_arguments_are_named(backend: str) -> None:
    case = make([2, 1], [30, 21], (4, 2, 16), 4)

    def refused(message: str, **changes: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            paged_attention(*replace(case, **changes).arguments, backend=backend)

    refused("keys must be .* with page_size, K >= 1", keys=case.keys[:, :0])
    refused(r"q must be \(N, a multiple of 2, 16\), got", q=torch.randn(3, 3, 16))
    refused("values must be like keys", values=case.values[:2])
    refused(r"page_table must be \(2, 8\) int32 or int64", page_table=case.page_table.short())
    refused("page_table must be .* neighbours adj", page_table=case.page_table.repeat(1, 2)[:, ::2])
    refused(r"cu_seqlens_q must be \(3,\) int32 or", cu_seqlens_q=torch.tensor([0, 3]))
    refused("cu_seqlens_q must be ascending from 0 to 3", cu_seqlens_q=torch.tensor([0, 2, 4]))
    refused("cu_seqlens_q must be ascending from 0 to 3", cu_seqlens_q=torch.tensor([0, 4, 3]))
    refused("seqlens_k must be >= the sequence's rows", seqlens_k=torch.tensor([1, 21]))
    refused("seqlens_k must be covered by page_table", seqlens_k=torch.tensor([33, 21]))
    beyond = torch.tensor([2**63 - 1, 21])
    refused("seqlens_k must be covered by page_table", seqlens_k=beyond)
    outside = case.page_table.clone()
    outside[1, 2] = len(case.keys)
    refused("page_table must be pages of the pool", page_table=outside)
