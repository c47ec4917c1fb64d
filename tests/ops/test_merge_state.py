"""merge_state: halves of a softmax make the whole, whatever a half without keys holds."""

from __future__ import annotations

import pytest
import torch
from triton_tools import check_interpreted

from vtts_rt.ops.merge_state import merge_state, merge_state_ref


def parts_of(scores: torch.Tensor, values: torch.Tensor, keys: slice) -> tuple[torch.Tensor, ...]:
    """(out, lse) of softmax attention over some keys; scores: (N, H, keys), values: (keys, D)."""
    scores, values = scores[..., keys], values[keys]
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("split", [0, 1, 5, 12])
def test_two_parts_make_the_whole(split: int) -> None:
    scores, values = 4 * torch.randn(3, 5, 12).double(), torch.randn(12, 7).double()
    a, b = (parts_of(scores, values, keys) for keys in (slice(0, split), slice(split, 12)))
    out, lse = merge_state_ref(*a, *b)
    whole, whole_lse = parts_of(scores, values, slice(0, 12))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(merge_state_ref(*b, *a), (out, lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_part_without_keys_counts_for_nothing(dtype: torch.dtype) -> None:
    out_a = torch.randn(2, 3, 4).to(dtype)
    out_b = torch.full_like(out_a, torch.nan)
    lse_a, lse_b = torch.randn(2, 3), torch.full((2, 3), -torch.inf)
    out, lse = merge_state(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out, out_a) and out.dtype is dtype and torch.equal(lse, lse_a)
    out, lse = merge_state(out_b, lse_b, out_b, lse_b)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_bad_arguments_are_named() -> None:
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"out_a must be \(N, H, D\), got \(2, 3\)"):
        merge_state(lse, lse, lse, lse)
    with pytest.raises(ValueError, match="dtype must be a float of up to 32 bits, got torch.float"):
        merge_state(out.double(), lse, out.double(), lse)
    with pytest.raises(ValueError, match=r"out_b must be \(2, 3, 4\) torch.float32 on cpu, got"):
        merge_state(out, lse, out.half(), lse)
    with pytest.raises(ValueError, match=r"lse_b must be \(2, 3\) torch.float32 on cpu, got"):
        merge_state(out, lse, out, lse[:1])
    with pytest.raises(RuntimeError, match="backend 'triton' unavailable: tensors are on cpu"):
        merge_state(out, lse, out, lse, backend="triton")


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("merge_state") == 18
