"""CUDA graphs without CUDA: a capture that repeats by calling again, and says where a graph would
not have done the same.

The operators that have no reference free of questions to the host get a stand-in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vtts_rt.engine import graphs, runner
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.passes import Passes
from vtts_rt.models import attention
from vtts_rt.ops.cascade_attention import find_groups
from vtts_rt.ops.paged_attention import paged_attention
from vtts_rt.ops.sampling import sample

# What a graph cannot hold: the host reads a value, or the shape of the outcome depends on one.
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Trace(TorchDispatchMode):
    """The operators that run, with the shapes of their tensors, the addresses of those that were
    there before, and all other arguments: what a graph would have baked in."""

    active: Trace | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.paused = False
        self._made: set[int] = set()

    def __enter__(self) -> Trace:
        Trace.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Trace.active = None
        super().__exit__(*error)

    def unseen(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Results of a kernel, as it were: what it does in torch is not looked at."""
        self.paused = True
        try:
            outputs = function()
        finally:
            self.paused = False
        self._made |= set(map(storage, outputs))
        return outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        name = func.overloadpacket.__name__
        given = tree_leaves((args, kwargs))
        assert name not in HOST_READS, f"{name} asks the host"
        masks = [x for x in given if isinstance(x, Tensor) and x.dtype is torch.bool]
        assert not (name.startswith("index") and masks), f"{name} with a mask asks the host"
        before = {storage(x) for x in given if isinstance(x, Tensor)}
        self._made |= {storage(x) for x in tree_leaves(out) if isinstance(x, Tensor)} - before
        self.calls.append((str(func), *map(self._note, given)))
        return out

    def _note(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        place = "made here" if storage(value) in self._made else value.data_ptr()
        return tuple(value.shape), value.stride(), value.dtype, place


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class FakeCapture:
    """Captures as CUDA does: no question to the host, and a repetition computes what was recorded,
    from the same addresses to the same addresses."""

    def __call__(self, function: graphs.Step) -> graphs.Step:
        function()
        with Trace() as recorded:
            output = function()

        kept = weakref.ref(function)
        del function

        def replay() -> Tensor:
            repeated = kept()
            assert repeated is not None, "what a graph would read is gone"
            with Trace() as again:
                fresh = repeated()
            assert len(again.calls) == len(recorded.calls)
            for now, then in zip(again.calls, recorded.calls, strict=True):
                assert now == then, f"{now} was recorded as {then}"
            return output.copy_(fresh)

        return replay


def give_graphs(engine: Engine, capture: graphs.Capture | None = None) -> Passes:
    """Let an engine on the CPU compute as one on a GPU does."""
    capture = capture or FakeCapture()
    passes = Passes(engine.model, engine.pool, on_device=True, capture=capture)
    engine._passes = passes
    return passes


def with_stand_ins(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("VTTS_RT_BACKEND", "rotary_kv=torch,linear=torch,swiglu=torch")
    patch.setattr(attention, "paged_attention", paged)
    patch.setattr(attention, "cascade_attention", cascade)
    for module in (attention, graphs):  # groups of two that share two pages are enough
        patch.setattr(module, "find_groups", partial(find_groups, min_group=2, min_shared=8))
    patch.setattr(runner, "sample", draw)


def draw(logits: Tensor, *args: Any, **more: Any) -> tuple[Tensor, ...]:
    """`sample`, which takes no float64, as one kernel."""
    if Trace.active is None:
        return sample(logits.float(), *args, **more)
    return Trace.active.unseen(lambda: sample(logits.float(), *args, **more))


def paged(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    if max_seqlen_q > 1:
        return paged_attention(q, keys, values, page_table, cu_seqlens_q, seqlens_k)
    assert max_seqlen_k <= page_table.shape[1] * keys.shape[1]
    return attend(q, keys, values, (page_table, seqlens_k))


def cascade(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    shared_table: Tensor,
    shared_seqlens: Tensor,
    cu_groups: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    max_shared: int,
    max_seqlen_k: int,
) -> Tensor:
    group = torch.bucketize(torch.arange(len(q)), cu_groups[1:], right=True)
    group = group.clamp(max=len(shared_table) - 1)
    shared = shared_table.index_select(0, group), shared_seqlens.index_select(0, group)
    return attend(q, keys, values, shared, (page_table, seqlens_k))


def attend(q: Tensor, keys: Tensor, values: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """One row of each sequence to its keys in all parts: (table, number of keys)."""
    pages = torch.cat([table for table, _ in parts], 1)
    slots = [torch.arange(table.shape[1] * keys.shape[1]) for table, _ in parts]
    seen = torch.cat([s < num[:, None] for s, (_, num) in zip(slots, parts, strict=True)], 1)
    heads = q.shape[1] // keys.shape[2]
    key, value = (pool[pages].flatten(1, 2).repeat_interleave(heads, 2) for pool in (keys, values))
    value = torch.where(seen[..., None, None], value, 0)
    scores = torch.einsum("shd,sjhd->shj", q, key) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("shj,sjhd->shd", weights, value)
