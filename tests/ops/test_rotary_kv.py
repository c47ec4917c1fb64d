"""rotary_kv: every backend against float64, what is written and what is left alone."""

from __future__ import annotations

import pytest
import torch
from op_cases import cases
from op_cases.case import error_of
from torch import Tensor
from triton_tools import check_interpreted

from vtts_rt.ops.dispatch import backends
from vtts_rt.ops.rotary_kv import rotary_kv

HERE = [name for name in backends("rotary_kv", "cpu") if name != "triton"]


@pytest.mark.parametrize("backend", HERE)
def test_every_case_is_within_rounding_of_the_equation(backend: str) -> None:
    for case in cases("rotary_kv", "cpu", "check"):
        if case.takes(backend):
            error = error_of(case, backend)
            assert error.within, (case.name, case.dtype, error)


def some(slots: list[int]) -> dict[str, Tensor]:
    """Rows of 3 query heads and 2 key/value heads, and pools of 3 pages of 4 slots."""
    angles = torch.randn(len(slots), 4)
    return {
        "qkv": torch.randn(len(slots), 7, 8),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "keys": torch.randn(3, 4, 2, 8),
        "values": torch.randn(3, 4, 2, 8),
        "slot_mapping": torch.tensor(slots),
    }


@pytest.mark.parametrize("backend", ["auto", *HERE])
@pytest.mark.parametrize("slots", [[3, -1, 7, 0, -5], [-1, -1, -1], [11, 10]])
def test_only_the_named_slots_are_written(backend: str, slots: list[int]) -> None:
    args = some(slots)
    before = {name: args[name].clone() for name in ("qkv", "keys", "values")}
    q = rotary_kv(**args, num_heads=3, backend=backend)
    assert q.shape == (len(slots), 3, 8) and q.stride()[1:] == (8, 1)
    written = [slot for slot in slots if slot >= 0]
    others = [slot for slot in range(12) if slot not in written]
    for name in ("keys", "values"):
        now, then = args[name].flatten(0, 1), before[name].flatten(0, 1)
        assert torch.equal(now[others], then[others])
    real = [row for row, slot in enumerate(slots) if slot >= 0]
    assert torch.equal(args["values"].flatten(0, 1)[written], before["qkv"][real, -2:])


def test_turned_by_nothing_it_is_a_copy() -> None:
    args = some([5, 1])
    args["cos"], args["sin"] = torch.ones(2, 4), torch.zeros(2, 4)
    qkv = args["qkv"].clone()
    q = rotary_kv(**args, num_heads=3)
    assert torch.equal(q, qkv[:, :3])
    assert torch.equal(args["keys"][1, 1], qkv[0, 3:5])
    assert torch.equal(args["values"][0, 1], qkv[1, 5:])


@pytest.mark.skipif("cpu" not in HERE, reason="built without the native extension")
def test_slots_beyond_the_pool_are_refused_before_anything_is_written() -> None:
    args = some([3, 12])
    before = {name: x.clone() for name, x in args.items()}
    with pytest.raises(ValueError, match="rotary_kv: slot_mapping must be below 12, got 12"):
        rotary_kv(**args, num_heads=3, backend="cpu")
    assert all(torch.equal(x, before[name]) for name, x in args.items())


@pytest.mark.parametrize(
    ("name", "make", "rule"),
    [
        ("qkv", lambda x: x[:, :6], r"qkv must be floats \(N, 7, 8\), D even, got \(2, 6, 8\)"),
        ("qkv", lambda x: torch.randn(2, 8, 7).mT, r"qkv's strides must be \(any, 8, 1\)"),
        ("qkv", lambda x: x.int(), "qkv must be floats"),
        ("cos", lambda x: x[:1], r"cos must be \(2, 4\) of one float dtype"),
        ("sin", lambda x: x.half(), r"sin must be \(2, 4\) of one float dtype"),
        ("keys", lambda x: x.mT, "keys must be .* contiguous"),
        ("values", lambda x: x.half(), "values must be"),
        ("slot_mapping", lambda x: x.float(), r"slot_mapping must be \(2,\) int64 or int32"),
        ("slot_mapping", lambda x: x[:1], r"slot_mapping must be \(2,\) int64 or int32"),
        ("cos", lambda x: x.to("meta"), "devices must be one device"),
    ],
)
def test_bad_arguments_are_named(name: str, make, rule: str) -> None:
    args = some([0, 1])
    args[name] = make(args[name])
    with pytest.raises(ValueError, match=f"rotary_kv: {rule}"):
        rotary_kv(**args, num_heads=3)


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("rotary_kv") == 17
