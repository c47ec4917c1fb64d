"""`vtts-rt bench soak`: thousands of mixed requests under small budgets; does memory stay?

Videos, questions, strategies, rounds, sampling and lengths vary by a seed; some requests are
aborted, some run out of time, some come together. Resident memory is read after every few of
them; the slope is a least-squares line through what comes after the warm-up.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.setting import (
    add_compute_flags,
    add_output_flags,
    check_compute,
    dtype_of,
    heading,
)
from vtts_rt.config import STRATEGIES, EngineConfig, PerceptionConfig
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, require

__all__ = ["add_flags", "measure", "print_table", "theme"]

MIB = 1 << 20
WORDS = [
    "who",
    "what",
    "where",
    "when",
    "why",
    "which",
    "hand",
    "card",
    "door",
    "cup",
    "red",
    "blue",
    "left",
    "right",
    "first",
    "last",
]
# (frames, height, width) of the clips, 10 frames a second: sizes and lengths differ.
CLIPS = (
    (40, 112, 160),
    (60, 144, 96),
    (80, 120, 160),
    (50, 180, 240),
    (90, 96, 128),
    (30, 90, 200),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench soak`."""
    add = parser.add_argument
    # What the allocator keeps swings by some 5 MB; over 2,500 requests that is noise of the
    # slope below 0.1 MB per 100 requests, over 800 it is 0.4.
    add("--num-prompts", type=int, default=3000, help="requests")
    add("--num-warmups", type=int, default=500, help="of them before the slope begins")
    add("--sample-every", type=int, default=10, help="requests between two readings")
    add("--frame-store-mib", type=int, default=4)
    add("--vision-cache-mib", type=int, default=2)
    add("--kv-mib", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="checkpoint folder; default: the embedded model")
    add_compute_flags(parser)
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "soak"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result (the JSON file's content); arguments as `--help` says."""
    for name in ("num_prompts", "sample_every", "frame_store_mib", "vision_cache_mib", "kv_mib"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    left = args.num_prompts - args.num_warmups
    few = left >= 2 * args.sample_every and args.num_warmups >= 0
    require("bench", "num_warmups", args.num_warmups, few, "two readings below num_prompts")
    check_compute(args)
    model = args.model or "tiny"
    dtype = dtype_of(args, model)
    engine = EngineConfig(
        frame_store_bytes=args.frame_store_mib * MIB,
        vision_cache_bytes=args.vision_cache_mib * MIB,
        kv_bytes=args.kv_mib * MIB,
        threads=args.threads,
    )
    with (
        tempfile.TemporaryDirectory() as files,
        Runtime.from_pretrained(model, dtype=dtype, device=args.device, engine=engine) as runtime,
    ):
        soak = _Soak(runtime, _videos(Path(files)), random.Random(args.seed), engine)
        loaded = resident_mb()
        began = time.perf_counter()
        while soak.requests < args.num_prompts:
            soak.next()
            if soak.requests >= args.sample_every * (len(soak.samples) + 1):
                soak.sample()
                if len(soak.samples) % 10 == 0:
                    now = soak.samples[-1][1]
                    print(f"{soak.requests} requests: {now:.1f} MB resident", file=sys.stderr)
        seconds = time.perf_counter() - began
        runtime.engine.check_integrity()
        stats = runtime.stats()
    measured = [sample for sample in soak.samples if sample[0] >= args.num_warmups]
    warm = measured[0][1]
    peak = max(mb for _, mb in soak.samples)
    budget = sum(bound for _, bound in soak.budgets.values())
    flags = ["num_prompts", "num_warmups", "sample_every", "frame_store_mib", "vision_cache_mib"]
    flags += ["kv_mib", "device", "dtype", "threads", "seed", "model"]
    result = heading("soak", args, flags)
    return {
        **result,
        "model_id": "tiny" if args.model is None else args.model.name,
        "dtype": dtype,
        "duration": seconds,
        "num_prompts": soak.requests,
        "outcomes": dict(sorted(soak.outcomes.items())),
        "strategies": dict(sorted(soak.strategies.items())),
        "slope_mb_per_100_requests": slope(measured),
        "loaded_rss_mb": loaded,
        "warm_rss_mb": warm,
        "peak_rss_mb": peak,
        "growth_mb": peak - warm,
        "budget_mb": budget / MIB,
        "caches": {
            name: {"peak_bytes": most, "budget_bytes": bound}
            for name, (most, bound) in soak.budgets.items()
        },
        # glibc keeps what threads freed in arenas of their own; 1 or 2 hold that down.
        "malloc_arena_max": os.environ.get("MALLOC_ARENA_MAX"),
        "preemptions": stats["scheduler"]["preemptions"],
        "evictions": {
            name: stats[name]["evictions"]
            for name in ("frame_store", "vision_cache", "prefix_tree")
        },
        "rss_mb": [[requests, round(mb, 2)] for requests, mb in soak.samples],
    }


def resident_mb() -> float:
    """Resident memory of this process in MB of 2^20 bytes. RuntimeError outside Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        raise RuntimeError("bench soak: /proc/self/statm is missing; run it on Linux") from None
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def slope(samples: list[tuple[int, float]]) -> float:
    """MB per 100 requests of the least-squares line through (requests, MB)."""
    requests, mb = np.array(samples, dtype=np.float64).T
    return float(np.polyfit(requests, mb, 1)[0]) * 100


def _videos(folder: Path) -> list[dict[str, Any]]:
    """What can be asked about, as arguments of `ask`: files, bytes and arrays."""
    from vtts_rt.video.writer import write_video  # other benches need no PyAV

    videos: list[dict[str, Any]] = []
    for number, (num_frames, height, width) in enumerate(CLIPS):
        path = folder / f"{number}.mp4"
        write_video(path, moving_frames(num_frames, (height, width)), source_fps=10)
        videos.append({"video": str(path)})
    videos.append({"video": (folder / "0.mp4").read_bytes()})
    array = np.stack(list(moving_frames(24, (84, 112))))
    videos.append({"video": array, "source_fps": 8.0})
    videos.append({"video": [str(folder / "1.mp4"), str(folder / "2.mp4")]})
    return videos


class _Soak:
    """requests: so far; outcomes: how they ended; samples: (requests, resident MB); budgets:
    cache -> [most bytes seen, budget]."""

    def __init__(
        self,
        runtime: Runtime,
        videos: list[dict[str, Any]],
        rng: random.Random,
        engine: EngineConfig,
    ) -> None:
        self._runtime = runtime
        self._videos = videos
        self._rng = rng
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.strategies: Counter[str] = Counter()
        self.samples: list[tuple[int, float]] = []
        self.budgets = {
            "frame_store": [0, engine.frame_store_bytes],
            "vision_cache": [0, engine.vision_cache_bytes],
            "kv": [0, engine.kv_bytes],
        }

    def sample(self) -> None:
        self.samples.append((self.requests, resident_mb()))
        stats = self._runtime.stats()
        for name, seen in self.budgets.items():
            used = stats[name]["bytes_used" if name == "kv" else "bytes"]
            seen[0] = max(seen[0], used)

    def next(self) -> None:
        """One request, or a few at once."""
        kind = self._rng.choices(("ask", "abort", "timeout", "together"), (70, 15, 5, 10))[0]
        if kind == "together":
            together = [self._question() for _ in range(self._rng.randint(2, 4))]
            for answer in self._runtime.ask_batch(together):
                self._note(answer.stop_reason)
            return
        question = self._question()
        if kind == "ask":
            self._note(self._runtime.ask(**question).stop_reason)
        elif kind == "timeout":
            question["timeout_seconds"] = self._rng.uniform(0.001, 0.1)
            self._note(self._runtime.ask(**question).stop_reason)
        else:
            events: Any = self._runtime.stream(**question)
            for _ in range(self._rng.randint(0, 20)):
                if next(events, None) is None:
                    break
            events.close()
            self._note("closed")

    def _note(self, outcome: str) -> None:
        self.requests += 1
        self.outcomes[outcome] += 1

    def _question(self) -> dict[str, Any]:
        rng = self._rng
        strategy = rng.choice(STRATEGIES)
        self.strategies[strategy] += 1
        rounds = rng.randint(1, 4)
        clues = [[sorted(rng.uniform(0.0, 4.0) for _ in range(2))] for _ in range(rounds)]
        return {
            **rng.choice(self._videos),
            "question": " ".join(rng.choices(WORDS, k=rng.randint(3, 20))) + "?",
            "options": rng.sample(WORDS, rng.choice((0, 0, 2, 4))),
            "context": " ".join(rng.choices(WORDS, k=rng.choice((0, 0, 0, 40)))),
            "assume_clues": clues if rng.random() < 0.5 else None,
            "perception": PerceptionConfig(
                strategy=strategy,
                max_rounds=rounds,
                sample_fps=rng.choice((1.0, 2.0)),
                max_frames=16,
                min_pixels=28 * 28 * 4,
                total_pixels=28 * 28 * 64,
            ),
            "sampling": SamplingParams(
                temperature=rng.choice((0.0, 0.8)),
                max_tokens=rng.randint(1, 16),
                seed=rng.randrange(1 << 31),
            ),
        }


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    outcomes = ", ".join(f"{num} {name}" for name, num in result["outcomes"].items())
    print(f"{result['num_prompts']} requests in {result['duration']:.0f} s: {outcomes}")
    print(
        f"resident: {result['loaded_rss_mb']:.1f} MB loaded, {result['warm_rss_mb']:.1f} MB warm, "
        f"{result['peak_rss_mb']:.1f} MB at most; budgets {result['budget_mb']:.0f} MB; "
        f"{result['slope_mb_per_100_requests']:+.2f} MB per 100 requests after the warm-up"
    )
    for name, cache in result["caches"].items():
        most, bound = cache["peak_bytes"] / MIB, cache["budget_bytes"] / MIB
        print(f"{name}: {most:.2f} of {bound:.0f} MiB")
