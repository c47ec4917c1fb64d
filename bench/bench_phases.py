"""Where the time of a question goes: by phase, by product, beside the limits of the machine.

    python bench/bench_phases.py [--dtype D,D] [--runs N] [--repeats N] [--result-dir DIR]

The question of `vtts-rt bench rounds` (forced clues, no drafts, cold, on the CPU) is timed by
phase; then it is asked once more while every call of an op is noted, decoding steps taken apart
into the ops they consist of. One call of each shape is then repeated by itself, ours and torch's
operators in turn: those of few rows with their weights out of the caches, as a step finds them.
What a phase takes beyond the sum of its ops lies between them.

Peak: the fastest product measured in a type or a wider one, of either side and of large squares, as
a narrow type can be multiplied by widening. Floor: products and attention alone, each call the
longer of its operations at the peak and its weights or keys and values at the rate of reading.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import product_sides
from torch import Tensor, nn
from torch.nn import functional as F

from vtts_rt import bench
from vtts_rt.bench.rounds import samples
from vtts_rt.bench.setting import (
    OPTIONS,
    QUESTIONS,
    Setting,
    add_setting_flags,
    check_compute,
    heading,
    model_and_video,
    strategies_of,
    video_name,
)
from vtts_rt.bench.summary import Run, summary
from vtts_rt.config import EngineConfig, RuntimeConfig
from vtts_rt.models.base import VideoLM
from vtts_rt.models.registry import DTYPES
from vtts_rt.models.vision import MERGE_UNIT
from vtts_rt.ops.dispatch import Backend, Op, backends
from vtts_rt.ops.paged_attention import Call
from vtts_rt.runtime import Runtime
from vtts_rt.types import require

FEW_ROWS = 16  # up to here a product reads weights more than it multiplies
TOGETHER = 8  # rows of a decoding step of eight requests
MANY_ROWS = 256  # from here a product's rate counts as a peak
KEYS = 512  # decoding attention is told apart by its keys in multiples of these
_PRODUCTS, _ATTENTION = ("linear",), ("segment_attention", "paged_attention")
_CACHES = 128 << 20  # bytes, more than a CPU's caches
_SECONDS = 1.0  # for the repetitions of one call, of each side
SIDES = ("ours", "torch")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `vtts-rt bench rounds`, less its peers."""
    add_setting_flags(parser, strategy="append", several_dtypes=True)
    parser.add_argument("--repeats", type=int, default=3, help="cold questions that are timed")
    parser.add_argument("--runs", type=int, default=9, help="repetitions of a call at most")


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "phases"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result (the JSON file's content)."""
    strategy, *others = strategies_of(args)
    dtypes = (args.dtype or "float32,bfloat16").split(",")
    for name in dtypes:
        require("bench", "dtype", name, name in DTYPES, f"of {', '.join(DTYPES)}")
    for name in ("repeats", "runs"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    require("bench", "strategy", args.strategy, not others, "one")
    require("bench", "device", args.device, args.device == "cpu", "cpu")
    require("bench", "max_tokens", args.max_tokens, args.max_tokens >= 2, ">= 2")
    check_compute(args)
    folder, video, metadata = model_and_video(args)
    setting = Setting.of(args, metadata.duration_seconds)
    squares = {name: square_rate(DTYPES[name]) for name in {"float32", *dtypes}}
    runs = []
    for dtype in dtypes:
        with Runtime.from_pretrained(
            folder,
            dtype=dtype,
            device="cpu",
            engine=EngineConfig(draft_tokens=args.draft_tokens),
            config=RuntimeConfig(threads=args.threads),
        ) as runtime:
            resolved = runtime.perception(setting.perception(strategy))

            def ask(path: Path, runtime: Runtime = runtime) -> Run:
                runtime.clear_caches()
                began = time.perf_counter()
                answer = runtime.ask(
                    str(path),
                    QUESTIONS[0],
                    options=OPTIONS,
                    perception=setting.perception(strategy),
                    sampling=setting.sampling,
                    assume_clues=setting.clues,
                )
                return Run(time.perf_counter() - began, samples(answer))

            found = list(_cold(ask, video, args.repeats + 1))[1:]  # the first warms up
            with recorded(runtime.engine.model) as calls:
                list(_cold(ask, video, 1))
            with torch.inference_mode():
                runs.append(_run(dtype, found, calls, args.runs))
    return {
        **heading("phases", args, ("strategy", "rounds", "max_tokens", "repeats", "runs", "dtype")),
        "setting": setting.as_dict(video_name(args), metadata, resolved),
        "square_gflops": squares,
        "runs": [with_limits(run, runs, squares) for run in runs],
    }


def _cold(ask: Callable[[Path], Run], video: Path, count: int) -> Iterator[Run]:
    """Questions about copies of a file, of which nothing is known."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / f"{number}{video.suffix}"
            shutil.copyfile(video, path)
            yield ask(path)


# -- what a question calls --------------------------------------------------------------------


@dataclass(slots=True)
class Calls:
    """All calls of an op of one phase and shape.

    phase: preprocess, vision, prefill, a token. name: of the product, else of the op. rows: of the
    first operand. flops, num_bytes: of one call; bytes of weights, or of keys and values. rounds:
    calls in each round. seconds: of all of them where they happened. again: the call itself.
    """

    phase: str
    op: str
    name: str
    shape: str
    rows: int
    flops: float
    num_bytes: float
    again: tuple[Any, ...]
    rounds: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def recorded(model: VideoLM) -> Iterator[list[Calls]]:
    """Every call of an op meanwhile; the list is filled at the end."""
    recorder, calls = _Recorder(model), list[Calls]()
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
            yield calls
    finally:
        for hook in hooks:
            hook.remove()
        calls += recorder.found.values()


class _Recorder:
    def __init__(self, model: VideoLM) -> None:
        self.found: dict[tuple[str, ...], Calls] = {}
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

    def _name(self, op: str, call: list[Any]) -> str:
        if op in _PRODUCTS:
            sides = call[0].shape[-1], call[-1].shape[-1]
            part = "vision" if self._phase == "vision" else ""
            return self._names.get((part, *sides), f"{sides[0]} -> {sides[1]}")
        if op == "segment_attention":
            whole = max(run.length for run in call[3]) > self._window
            return f"attention, {'whole pairs' if whole else 'windows'}"
        return "attention" if op in _ATTENTION else op


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
    if op in _PRODUCTS:
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


# -- what each of them takes ------------------------------------------------------------------


def square_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's product of large squares."""
    a, b = product_sides("cpu", dtype)
    seconds = _medians({"torch": lambda: a @ b}, 9, None)["torch"]
    return round(2e-9 * len(a) ** 3 / seconds, 1)


def _medians(
    sides: Mapping[str, Callable[[], Any]], runs: int, before: Callable[[], Any] | None
) -> dict[str, float]:
    """Median seconds of each side, in turn, after one that is not counted; `before` each call."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(-1, runs):
        for name, side in sides.items():
            if before is not None:
                before()
            began = time.perf_counter()
            side()
            if run >= 0:
                times[name].append(time.perf_counter() - began)
        if run > 1 and max(map(sum, times.values())) > _SECONDS:
            break
    return {name: statistics.median(found) for name, found in times.items()}


def _sides(again: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    """The call by ours and by torch; products by torch with a matrix of the same size."""
    op, device, *call = again

    def side(name: str) -> None:
        op.choose(device, name, *call)[0].run(*call)

    if op.name in _PRODUCTS:
        x = call[0]
        outputs = op.choose(device, "auto", *call)[0].run(*call).shape[-1]
        weight = torch.randn(outputs, x.shape[-1]).to(x.dtype)
        return {"ours": partial(side, "auto"), "torch": lambda: F.linear(x, weight)}
    sides = {"ours": partial(side, "auto")}
    known = {"torch", "reference"} & {backend.name for backend in op.backends}
    if known:
        sides["torch"] = partial(side, max(known))
    return sides


def _run(dtype: str, found: list[Run], calls: list[Calls], runs: int) -> dict[str, Any]:
    """A dtype's part of the result: phases, rate of reading, and all ops."""
    weights = sum(c.num_bytes * _per_token(c, calls) for c in calls if c.op in _PRODUCTS)
    buffer = torch.ones(max(int(weights), _CACHES) // 4)
    reading = buffer.nbytes / _medians({"read": buffer.sum}, 9, None)["read"]
    caches = buffer[: _CACHES // 4]
    together = [_rows_together(c) for c in calls if c.op in _PRODUCTS and c.phase == "a token"]
    ops = []
    for entry in (*calls, *together):
        few = entry.rows <= FEW_ROWS and entry.num_bytes > 0
        medians = _medians(_sides(entry.again), runs, caches.sum if few else None)
        ops.append(
            {
                **{k: getattr(entry, k) for k in ("phase", "op", "name", "shape", "rows")},
                "calls": list(entry.rounds.values())
                and [entry.rounds.get(number, 0) for number in range(max(entry.rounds) + 1)],
                "gflop": entry.flops / 1e9,
                "mb": entry.num_bytes / 1e6,
                "ms": {name: round(1e3 * seconds, 4) for name, seconds in medians.items()},
                "ms_in_place": round(1e3 * entry.seconds, 2),
            }
        )
        told = f"{entry.phase}, {entry.name}: {entry.shape} {ops[-1]['ms']}"
        print(f"{dtype}, {told}", file=sys.stderr)
    return {
        "dtype": dtype,
        "question": summary(found),
        "read_gb_per_second": round(reading / 1e9, 2),
        "token_weights_mb": round(weights / 1e6, 1),
        "ops": ops,
    }


def _per_token(entry: Calls, calls: list[Calls]) -> float:
    """Calls in one decoding step."""
    if entry.phase != "a token":
        return 0.0
    steps = min(sum(c.rounds.values()) for c in calls if c.phase == "a token" and c.op in _PRODUCTS)
    return sum(entry.rounds.values()) / steps


def _rows_together(entry: Calls) -> Calls:
    """The product of a step of eight requests."""
    op, device, x, *rest = entry.again
    again = (op, device, x.repeat(TOGETHER, 1), *rest)
    shape = entry.shape.replace("1 x", f"{TOGETHER} x", 1)
    flops = TOGETHER * entry.flops
    phase = f"{TOGETHER} tokens"
    return Calls(phase, entry.op, entry.name, shape, TOGETHER, flops, entry.num_bytes, again)


def with_limits(
    run: dict[str, Any], runs: list[dict[str, Any]], squares: dict[str, float]
) -> dict[str, Any]:
    """A dtype's part with the machine's peak for it, and what its phases are made of."""
    itemsize = DTYPES[run["dtype"]].itemsize
    rates = {
        f"torch, squares, {name}": rate
        for name, rate in squares.items()
        if DTYPES[name].itemsize >= itemsize
    }
    for other in runs:
        if DTYPES[other["dtype"]].itemsize >= itemsize:
            for op in other["ops"]:
                if op["op"] in _PRODUCTS and op["rows"] >= MANY_ROWS:
                    for side, ms in op["ms"].items():
                        rates[f"{side}, {op['shape']}, {other['dtype']}"] = 1e3 * op["gflop"] / ms
    fastest = max(rates, key=rates.__getitem__)
    limited = {**run, "peak_gflops": round(rates[fastest], 1), "peak_of": fastest}
    return {**limited, "phases": list(_phases(limited))}


def _phases(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each phase of the first round, a token and the whole question: what was measured, and what
    its ops take by themselves, ms."""
    rounds = run["question"]["rounds"]
    first = rounds[0]["timings_ms"]
    tokens = rounds[0]["completion_tokens"] - 1
    for phase in ("preprocess", "vision", "prefill"):
        yield _made_of(run, phase, first[phase], [phase], slice(0, 1))
    yield _made_of(run, "a token", first["generate"] / tokens, ["a token"], slice(0, 1), tokens)
    every = ["preprocess", "vision", "prefill", "a token"]
    yield _made_of(run, "first round", first["total"], every, slice(0, 1))
    total = 1e3 * run["question"]["median_latency"]
    yield _made_of(run, f"all {len(rounds)} rounds", total, every, slice(None))


def _made_of(
    run: dict[str, Any], name: str, ms: float, phases: list[str], rounds: slice, share: int = 1
) -> dict[str, Any]:
    made = {"products": 0.0, "attention": 0.0, "others": 0.0, "floor": 0.0, "gflop": 0.0}
    for op in run["ops"]:
        if op["phase"] not in phases:
            continue
        calls = sum(op["calls"][rounds]) / share
        kinds = {**dict.fromkeys(_PRODUCTS, "products"), **dict.fromkeys(_ATTENTION, "attention")}
        made[kinds.get(op["op"], "others")] += calls * op["ms"]["ours"]
        bounds = 1e3 * op["gflop"] / run["peak_gflops"], op["mb"] / run["read_gb_per_second"]
        made["floor"] += calls * max(bounds)
        made["gflop"] += calls * op["gflop"]
    between = ms - made["products"] - made["attention"] - made["others"]
    found = {"ms": ms, **made, "between": between}
    return {"phase": name, **{key: round(value, 3) for key, value in found.items()}}


def print_table(result: dict[str, Any]) -> None:
    """The result for people: the phases of each dtype."""
    columns = ("ms", "products", "attention", "others", "between", "floor")
    for run in result["runs"]:
        print(f"{run['dtype']}: peak {run['peak_gflops']} GFLOP/s ({run['peak_of']}), ", end="")
        print(f"reads {run['read_gb_per_second']} GB/s")
        print(f"{'':14}", *(f"{column:>10}" for column in columns))
        for phase in run["phases"]:
            print(f"{phase['phase']:14}", *(f"{phase[column]:10.1f}" for column in columns))


if __name__ == "__main__":
    sys.exit(bench.script(sys.modules[__name__]))
