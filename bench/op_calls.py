"""Notes every call of an op that a model makes, by phase, product and shape.

A decoding step is noted as the ops it consists of, not as one native call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from torch import Tensor, nn

from vtts_rt.models.base import VideoLM
from vtts_rt.models.vision import MERGE_UNIT
from vtts_rt.ops.dispatch import Backend, Op, backends
from vtts_rt.ops.paged_attention import Call

PRODUCTS, ATTENTION = ("linear",), ("segment_attention", "paged_attention")
KEYS = 512  # decoding attention is told apart by its keys in multiples of these

Again = tuple[Any, ...]  # an op, a device and arguments


@dataclass(slots=True)
class Calls:
    """All calls of an op of one phase and shape.

    phase: preprocess, vision, prefill, a token. name: of the product, else of the op. rows: of the
    first operand. flops, num_bytes: of one call; bytes of weights, or of keys and values. rounds:
    calls in each round. seconds: of all of them where they happened. again: the first call.
    """

    phase: str
    op: str
    name: str
    shape: str
    rows: int
    flops: float
    num_bytes: float
    again: Again
    rounds: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def recorded(model: VideoLM) -> Iterator[Recorder]:
    """Notes every call of an op meanwhile."""
    recorder = Recorder(model)
    native = "cpu" in backends("swiglu", "cpu")
    # An op that is asked for by name is called by itself: no step is one native call then.
    override = {"VTTS_RT_BACKEND": "swiglu=cpu"} if native else {}
    hooks = [
        model.visual.register_forward_pre_hook(recorder.encodes),
        model.language.register_forward_pre_hook(recorder.computes),
    ]
    try:
        with (
            mock.patch.dict(os.environ, override),
            mock.patch.object(Op, "choose", recorder.choose),
        ):
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()


class Recorder:
    """found: by phase, op and shape. steps: the calls of each round's last decoding step."""

    def __init__(self, model: VideoLM) -> None:
        self.found: dict[tuple[str, ...], Calls] = {}
        self.steps: dict[int, list[tuple[Calls, Again]]] = {}
        self._phase, self._round, self._depth = "", 0, 0
        self._choose = Op.choose
        self._window = MERGE_UNIT * model.visual.window_tokens**2  # patch rows
        self._names = {
            **{("vision", *shape): name for shape, name in _products(model.visual)},
            **{("", *shape): name for shape, name in _products(model.language)},
        }

    def encodes(self, *_: Any) -> None:
        self._enter("vision")

    def computes(self, _: nn.Module, batch: tuple[Any, ...]) -> None:
        self._enter("a token" if batch[0].token_ids.numel() == 1 else "prefill")
        self.steps[self._round] = []

    def _enter(self, phase: str) -> None:
        self._round += self._phase == "a token" != phase
        self._phase = phase

    @property
    def choose(self) -> Callable[..., tuple[Backend, str]]:
        """In the place of `Op.choose`: what it gives notes its calls."""

        def chosen(op: Op, device: str, name: str, *asked: Any) -> tuple[Backend, str]:
            backend, reason = self._choose(op, device, name, *asked)

            def run(*call: Any) -> Any:
                if op.name == "patchify":
                    self._enter("preprocess")
                self._depth += 1
                began = time.perf_counter()
                try:
                    out = backend.run(*call)
                finally:
                    seconds = time.perf_counter() - began
                    self._depth -= 1
                if not self._depth:  # what ops call of others is theirs
                    self._note(op, (op, device, *call), call, out, seconds)
                return out

            return replace(backend, run=run), reason

        return chosen

    def _note(
        self, op: Op, again: tuple[Any, ...], given: tuple[Any, ...], out: Any, seconds: float
    ) -> None:
        call = [*(given[0] if isinstance(given[0], Call) else given), out]
        first = next(x for x in call if isinstance(x, Tensor))
        shape, flops, num_bytes = _work(op.name, first, call)
        key = (self._phase, op.name, shape)
        if key not in self.found:
            name = self._name(op.name, call)
            self.found[key] = Calls(
                self._phase, op.name, name, shape, len(first), flops, num_bytes, again
            )
        calls = self.found[key]
        calls.rounds[self._round] = calls.rounds.get(self._round, 0) + 1
        calls.seconds += seconds
        if self._phase == "a token":
            self.steps[self._round].append((calls, again))

    def _name(self, op: str, call: list[Any]) -> str:
        if op in PRODUCTS:
            sides = call[0].shape[-1], call[-1].shape[-1]
            part = "vision" if self._phase == "vision" else ""
            return self._names.get((part, *sides), f"{sides[0]} -> {sides[1]}")
        if op == "segment_attention":
            whole = max(run.length for run in call[3]) > self._window
            return f"attention, {'whole pairs' if whole else 'windows'}"
        return "attention" if op in ATTENTION else op


def _products(tower: nn.Module) -> Iterator[tuple[tuple[int, int], str]]:
    """Channels and outputs of every matrix, and what it is called in tables."""
    for path, module in tower.named_modules():
        if isinstance(module, nn.Embedding):
            yield (module.embedding_dim, module.num_embeddings), "head"
        elif isinstance(module, nn.Linear):
            words = path.split(".")
            name = "merger" if words[0] == "merger" else words[-1].removesuffix("_proj")
            yield (module.in_features, module.out_features), name


def _work(op: str, x: Tensor, call: list[Any]) -> tuple[str, float, float]:
    """Shape in words, floating-point operations, and bytes of weights or of keys and values.

    x: the first tensor of the call; call: its arguments and what came out.
    """
    if op in PRODUCTS:
        rows, channels, outputs = x.numel() // x.shape[-1], x.shape[-1], call[-1].shape[-1]
        size = channels * outputs
        shape = f"{rows:,} x {channels:,} x {outputs:,}"
        return shape, 2.0 * rows * size, float(size * x.itemsize)
    if op == "segment_attention":
        _, heads, dim = x.shape
        runs = call[3]
        squares = sum(run.num * run.length**2 for run in runs)
        shape = ", ".join(f"{run.num} of {run.length}" for run in runs)
        return shape, 4.0 * heads * dim * squares, 2.0 * x.numel() * x.itemsize
    if op == "paged_attention":
        keys, bounds, lengths = call[1], call[4].tolist(), call[5].tolist()
        news = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        scores = sum(n * (m - n) + n * (n + 1) / 2 for n, m in zip(news, lengths, strict=True))
        most = max(lengths)
        told = most if max(news) > 1 else -(-most // KEYS) * KEYS
        shape = f"{max(news)} of {told:,} keys"
        flops = 4.0 * scores * x.shape[1] * x.shape[2]
        return shape, flops, 2.0 * sum(lengths) * keys[0, 0].numel() * keys.itemsize
    return " x ".join(f"{n:,}" for n in x.shape), 0.0, 0.0
