"""Where the time of a question goes: by phase, by product, beside the limits of the machine.

    python bench/bench_phases.py [--dtype D,D] [--runs N] [--repeats N] [--result-dir DIR]

The question of `vtts-rt bench rounds` (forced clues, no drafts, cold, on the CPU) is timed by
phase; then it is asked once more while every call of an op is noted, decoding steps taken apart
into the ops they consist of. One call of each shape is then repeated by itself, ours and torch's
operators in turn; of decoding the last step of each round, call after call, so that caches hold
as little of the weights as in a step. What a phase takes beyond the sum of its ops lies between
them.

Peak: the fastest product or attention measured in a type or a wider one, of either side and of
large squares, as a narrow type can be multiplied by widening. Floor: products and attention alone,
each call the longer of its operations at the peak and its weights or keys and values at the rate of
reading.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from op_calls import ATTENTION, PRODUCTS, Again, Calls, Recorder, recorded
from timing import product_sides
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
from vtts_rt.models.registry import DTYPES
from vtts_rt.runtime import Runtime
from vtts_rt.types import require

FEW_ROWS = 16  # up to here a product reads weights more than it multiplies
TOGETHER = 8  # rows of a decoding step of eight requests
MANY_ROWS = 256  # from here a rate counts as a peak
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
            with recorded(runtime.engine.model) as recorder:
                list(_cold(ask, video, 1))
            with torch.inference_mode():
                runs.append(_run(dtype, found, recorder, args.runs))
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


# -- what each of them takes ------------------------------------------------------------------


def square_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's product of large squares."""
    a, b = product_sides("cpu", dtype)
    # Rows times the rows of a matrix, as weights lie: torch is slow at other 16-bit products.
    seconds = _medians({"torch": lambda: F.linear(a, b)}, 9, None)["torch"]
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


def _sides(again: Again) -> dict[str, Callable[[], Any]]:
    """The call by ours and by torch; products by torch with a matrix of the same size."""
    op, device, *call = again

    def side(name: str) -> Any:
        return op.choose(device, name, *call)[0].run(*call)

    sides = {"ours": partial(side, "auto")}
    known = {"torch", "reference"} & {backend.name for backend in op.backends}
    if op.name in PRODUCTS:
        x = call[0]
        weight = torch.randn(side("auto").shape[-1], x.shape[-1]).to(x.dtype)
        sides["torch"] = lambda: F.linear(x, weight)
    elif known:
        sides["torch"] = partial(side, max(known))
    return sides


def _stepped(step: Sequence[tuple[Calls, Again]], runs: int) -> dict[int, dict[str, float]]:
    """Median seconds of the calls of a decoding step in its order, by the id of their `Calls`."""
    sides = [(id(calls), _sides(again)) for calls, again in step]
    times: dict[tuple[int, str], list[float]] = {}
    for run in range(-1, runs):
        for name in SIDES:
            for key, both in sides:
                began = time.perf_counter()
                both[name]()
                if run >= 0:
                    times.setdefault((key, name), []).append(time.perf_counter() - began)
    return {key: {name: statistics.median(times[key, name]) for name in SIDES} for key, _ in sides}


def _run(dtype: str, found: list[Run], recorder: Recorder, runs: int) -> dict[str, Any]:
    """A dtype's part of the result: phases, rate of reading, and all ops."""
    step = recorder.steps[0]
    weights = sum(calls.num_bytes for calls, _ in step if calls.op in PRODUCTS)
    buffer = torch.ones(max(int(weights), _CACHES) // 4)
    reading = buffer.nbytes / _medians({"read": buffer.sum}, 9, None)["read"]
    caches = buffer[: _CACHES // 4].sum
    together = _of_eight(step)
    medians: dict[int, dict[str, float]] = {}
    for calls in (*recorder.steps.values(), together):
        medians |= _stepped(calls, runs)
    ops = []
    for entry in (*recorder.found.values(), *{id(c): c for c, _ in together}.values()):
        if id(entry) not in medians:
            few = entry.rows <= FEW_ROWS and entry.num_bytes > 0
            medians[id(entry)] = _medians(_sides(entry.again), runs, caches if few else None)
        rounds = range(max(entry.rounds, default=-1) + 1)
        ops.append(
            {
                **{k: getattr(entry, k) for k in ("phase", "op", "name", "shape", "rows")},
                "calls": [entry.rounds.get(number, 0) for number in rounds],
                "gflop": entry.flops / 1e9,
                "mb": entry.num_bytes / 1e6,
                "ms": {name: round(1e3 * sec, 4) for name, sec in medians[id(entry)].items()},
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


def _of_eight(step: Sequence[tuple[Calls, Again]]) -> list[tuple[Calls, Again]]:
    """The products of a decoding step of eight requests."""
    made: dict[int, Calls] = {}
    found = []
    for calls, (op, device, *call) in step:
        if calls.op in PRODUCTS:
            again = (op, device, call[0].repeat(TOGETHER, 1), *call[1:])
            made.setdefault(
                id(calls),
                replace(
                    calls,
                    **{"phase": f"{TOGETHER} tokens", "rows": TOGETHER, "again": again},
                    **{"shape": calls.shape.replace("1 x", f"{TOGETHER} x", 1)},
                    **{"flops": TOGETHER * calls.flops, "rounds": {}, "seconds": 0.0},
                ),
            )
            found.append((made[id(calls)], again))
    return found


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
                if op["gflop"] and op["rows"] >= MANY_ROWS:
                    for side, ms in op["ms"].items():
                        rates[f"{side}, {op['name']}, {op['shape']}, {other['dtype']}"] = (
                            1e3 * op["gflop"] / ms
                        )
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
        kinds = {**dict.fromkeys(PRODUCTS, "products"), **dict.fromkeys(ATTENTION, "attention")}
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
