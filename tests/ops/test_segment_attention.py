"""segment_attention: the native kernel against the equation and torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_tools import check_interpreted

from vtts_rt.ops import native
from vtts_rt.ops.segment_attention import (
    Run,
    _table,
    _triton_refuses,
    segment_attention,
    segment_attention_ref,
)

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
ISAS = [isa for isa in ("scalar", "avx2", "avx512", "neon") if _C.isa_supported(isa)]
CASES = [  # runs, heads, head dim
    ([Run(0, 1, 1)], 1, 1),
    ([Run(0, 3, 64), Run(192, 2, 32), Run(256, 1, 4)], 2, 80),
    ([Run(0, 1, 480), Run(480, 1, 513)], 3, 64),  # 2 blocks of 256 keys and one key
    ([Run(0, 5, 16)], 2, 12),
    ([Run(0, 2, 0), Run(0, 2, 7)], 1, 256),
    ([], 2, 8),
]


def some(
    runs: list[Run], heads: int, dim: int, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, of a size, keys and values in one projection's output."""
    num_rows = sum(run.num * run.length for run in runs)
    qkv = torch.randn(num_rows, 3 * heads, dim)
    qkv[:, :heads] *= size
    qkv = qkv.to(dtype)
    return qkv[:, :heads], qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]


def on_isa(qkv: tuple[Tensor, ...], runs: list[Run], isa: str, num_threads: int) -> Tensor:
    q = qkv[0]
    out = torch.full((q.shape[0], q.shape[1] * q.shape[2]), torch.nan, dtype=q.dtype)
    _C.segment_attention(
        *(x.data_ptr() for x in qkv),
        q.stride(0),
        [start + i * length for start, num, length in runs for i in range(num)],
        [length for _, num, length in runs for _ in range(num)],
        out.data_ptr(),
        tuple(q.shape),
        q.shape[2] ** -0.5,
        num_threads,
        isa,
        native.STORAGE[q.dtype],
    )
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1), (torch.float32, 20), (torch.bfloat16, 1)]
)
def test_every_instruction_set_is_as_exact_as_torch(
    isa: str, case: tuple, dtype: torch.dtype, size: float
) -> None:
    runs = case[0]
    q, k, v = some(*case, dtype, size)
    exact = segment_attention_ref(q.double(), k.double(), v.double(), runs)
    out = on_isa((q, k, v), runs, isa, num_threads=2)
    assert out.shape == exact.shape and bool(out.isfinite().all())
    if out.numel():
        torchs = segment_attention(q, k, v, runs, backend="torch")
        allowed = 2 * (torchs - exact).abs().max()
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        assert (out - exact).abs().max() <= allowed + ulp


@pytest.mark.parametrize("dtype", native.STORAGE)
@pytest.mark.parametrize("isa", ISAS)
def test_a_segment_has_the_same_bits_alone(isa: str, dtype: torch.dtype) -> None:
    runs = [Run(0, 3, 200), Run(600, 2, 33)]
    qkv = some(runs, 2, 64, dtype)
    together = on_isa(qkv, runs, isa, num_threads=2)
    for start, length in ((200, 200), (633, 33)):
        rows = slice(start, start + length)
        alone = on_isa(tuple(x[rows] for x in qkv), [Run(0, 1, length)], isa, num_threads=1)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_the_public_function_equals_the_reference(backend: str) -> None:
    runs = CASES[1][0]
    q, k, v = some(*CASES[1])
    out = segment_attention(q, k, v, runs, backend=backend)
    torch.testing.assert_close(out, segment_attention_ref(q, k, v, runs), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("segment_attention") == 18


def test_the_table_holds_every_row_once_with_its_segment() -> None:
    runs = (Run(0, 3, 5), Run(15, 2, 0), Run(15, 1, 33), Run(48, 2, 16))
    table = _table(runs, 16, torch.device("cpu"), 0).tolist()
    assert table[0] == [15, 15, 48]  # the longest first
    found = {row: (first, end) for begin, first, end in table for row in range(begin, end)[:16]}
    segments = [(s + i * n, s + (i + 1) * n) for s, num, n in runs for i in range(num)]
    assert found == {row: segment for segment in segments for row in range(*segment)}
    assert sum(min(16, end - begin) for begin, _, end in table) == 80
    assert _table((), 16, torch.device("cpu"), 0).shape == (0, 3)


def test_heads_are_split_where_that_leaves_less_empty() -> None:
    pytest.importorskip("triton")
    from vtts_rt.kernels.segment_attention import split_features

    right = {1: (16, 0), 16: (16, 0), 17: (32, 0), 48: (32, 16), 64: (64, 0), 72: (64, 16)}
    right |= {80: (64, 16), 96: (64, 32), 100: (128, 0), 128: (128, 0)}
    assert {dim: split_features(dim) for dim in right} == right


def test_what_triton_cannot_take_is_named() -> None:
    pytest.importorskip("triton")
    q, k, v = some([Run(0, 2, 4)], 2, 8)
    assert _triton_refuses(q, k, v, []) is None
    assert "float32, float16 or bfloat16" in str(_triton_refuses(q, k.half(), v, []))
    assert _triton_refuses(*some([Run(0, 1, 4)], 1, 136), []) == "head dim 136, not 1 to 128"
    assert "needs a gradient" in str(_triton_refuses(q.clone().requires_grad_(), k, v, []))
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        segment_attention(q, k, v, [Run(0, 2, 4)], backend="triton")


def test_what_the_kernel_cannot_take_goes_to_torch() -> None:
    runs = [Run(0, 2, 4)]
    q, k, v = some(runs, 2, 8)
    wide = segment_attention(q.double(), k.double(), v.double(), runs)
    assert wide.dtype == torch.float64
    mixed = segment_attention(q.contiguous(), k, v, runs)
    torch.testing.assert_close(mixed, wide.float(), rtol=1e-5, atol=1e-6)
    q = q.clone().requires_grad_()
    segment_attention(q, k, v, runs).sum().backward()
    assert q.grad is not None
    with pytest.raises(ValueError, match="what backend 'cpu' takes, got 'heads that are not pack"):
        segment_attention(k.contiguous(), k, v, runs, backend="cpu")


def test_bad_arguments_are_named() -> None:
    runs = [Run(0, 2, 4)]
    q, k, v = some(runs, 2, 8)
    with pytest.raises(ValueError, match=r"segment_attention: v must be \(8, 2, 8\), got \(7, 2"):
        segment_attention(q, k, v[:7], runs)
    with pytest.raises(ValueError, match=r"runs must be from row 4 on, got Run\(start=5"):
        segment_attention(q, k, v, [Run(0, 1, 4), Run(5, 1, 3)])
    with pytest.raises(ValueError, match="runs must be 8 rows in all, got 4"):
        segment_attention(q, k, v, [Run(0, 1, 4)])
    with pytest.raises(ValueError, match="starts must be inside the rows, got 5"):
        on_isa((q, k, v), [Run(5, 1, 4)], "auto", 1)
