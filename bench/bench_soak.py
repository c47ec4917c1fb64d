"""Thousands of mixed requests under small budgets; does memory stay?

Videos, questions, strategies, rounds, sampling and lengths vary by a seed; some requests are
closed early, some run out of time, some come together. They come from several threads. Resident
memory and open files are read after every few of them; the slope is a least-squares line through
what comes after the warm-up. Nothing calls the garbage collector or trims the heap.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.bench import script
from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.setting import (
    add_compute_flags,
    add_output_flags,
    check_compute,
    dtype_of,
    heading,
)
from vtts_rt.config import STRATEGIES, EngineConfig, PerceptionConfig, RuntimeConfig
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, require

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
    """See `--help`."""
    add = parser.add_argument
    # What the allocator keeps swings by some 5 MB and grows for thousands of requests.
    add("--num-prompts", type=int, default=16000, help="requests")
    add("--num-warmups", type=int, default=4000, help="of them before the slope begins")
    add("--sample-every", type=int, default=50, help="requests between two readings")
    add("--concurrency", type=int, default=4, help="threads that ask")
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
    sizes = ("frame_store_mib", "vision_cache_mib", "kv_mib")
    for name in ("num_prompts", "sample_every", "concurrency", *sizes):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    left = args.num_prompts - args.num_warmups
    few = left >= 2 * args.sample_every and args.num_warmups >= 0
    require("bench", "num_warmups", args.num_warmups, few, "two readings below num_prompts")
    check_compute(args)
    model = args.model or "tiny"
    dtype = dtype_of(args, model)
    engine = EngineConfig(
        vision_cache_bytes=args.vision_cache_mib * MIB, kv_bytes=args.kv_mib * MIB
    )
    config = RuntimeConfig(frame_store_bytes=args.frame_store_mib * MIB, threads=args.threads)
    with (
        tempfile.TemporaryDirectory() as files,
        Runtime.from_pretrained(
            model, dtype=dtype, device=args.device, engine=engine, config=config
        ) as runtime,
    ):
        soak = _Soak(runtime, _videos(Path(files)), args.sample_every)
        loaded = resident_mb()
        began = time.perf_counter()
        rngs = [random.Random(args.seed + number) for number in range(args.concurrency)]
        with ThreadPoolExecutor(args.concurrency) as pool:
            for done in [pool.submit(soak.ask_until, args.num_prompts, rng) for rng in rngs]:
                done.result()
        seconds = time.perf_counter() - began
        runtime.engine.check_integrity()
        stats = runtime.stats()
    measured = [sample for sample in soak.samples if sample[0] >= args.num_warmups]
    warm = measured[0][1]
    peak = max(mb for _, mb in soak.samples)
    budget = sum(bound for _, bound in soak.budgets.values())
    flags = ["num_prompts", "num_warmups", "sample_every", "frame_store_mib", "vision_cache_mib"]
    flags += ["kv_mib", "concurrency", "device", "dtype", "threads", "seed", "model"]
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
        "open_files": soak.open_files,
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
        raise RuntimeError("bench: /proc/self/statm is missing; run it on Linux") from None
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
    for name, codec, form in (("6.avi", "mjpeg", "yuvj420p"), ("7.gif", "gif", "rgb8")):
        frames = moving_frames(20, (96, 128))
        write_video(folder / name, frames, source_fps=10, codec=codec, pixel_format=form)
        videos.append({"video": str(folder / name)})
    videos.append({"video": (folder / "0.mp4").read_bytes()})
    array = np.stack(list(moving_frames(24, (84, 112))))
    videos.append({"video": array, "source_fps": 8.0})
    videos.append({"video": array[0]})
    videos.append({"video": [str(folder / "1.mp4"), str(folder / "2.mp4")]})
    return videos


class _Soak:
    """requests: so far; outcomes: how they ended; samples: (requests, resident MB); open_files:
    descriptors at each sample; budgets: cache -> [most bytes seen, budget]."""

    def __init__(
        self,
        runtime: Runtime,
        videos: list[dict[str, Any]],
        sample_every: int,
    ) -> None:
        self._runtime = runtime
        self._videos = videos
        self._sample_every = sample_every
        self._lock = threading.Lock()
        self.open_files: list[int] = []
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.strategies: Counter[str] = Counter()
        self.samples: list[tuple[int, float]] = []
        self.budgets = {
            "frame_store": [0, runtime.config.frame_store_bytes],
            "vision_cache": [0, runtime.engine.config.vision_cache_bytes],
            "kv": [0, runtime.engine.config.kv_bytes],
        }

    def ask_until(self, num_prompts: int, rng: random.Random) -> None:
        """Ask, as one of several threads, until all of them have asked so often."""
        while self.requests < num_prompts:
            self._next(rng)
            with self._lock:
                if self.requests >= self._sample_every * (len(self.samples) + 1):
                    self._sample()

    def _sample(self) -> None:
        self.samples.append((self.requests, resident_mb()))
        self.open_files.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        if len(self.samples) % 10 == 0:
            now = self.samples[-1][1]
            print(f"{self.requests} requests: {now:.1f} MB resident", file=sys.stderr)
        stats = self._runtime.stats()
        for name, seen in self.budgets.items():
            used = stats[name]["bytes_used" if name == "kv" else "bytes"]
            seen[0] = max(seen[0], used)

    def _next(self, rng: random.Random) -> None:
        """One request, or a few at once."""
        kind = rng.choices(("ask", "close", "timeout", "together"), (75, 10, 5, 10))[0]
        if kind == "together":
            together = [self._question(rng) for _ in range(rng.randint(2, 4))]
            for answer in self._runtime.ask_batch(together):
                self._note(answer.stop_reason)
            return
        question = self._question(rng)
        if kind == "ask":
            self._note(self._runtime.ask(**question).stop_reason)
        elif kind == "timeout":
            question["timeout_seconds"] = rng.uniform(0.001, 0.1)
            try:
                self._note(self._runtime.ask(**question).stop_reason)
            except TimeoutError:  # before the video was open
                self._note("timeout")
        else:
            events: Any = self._runtime.stream(**question)
            for _ in range(rng.randint(0, 20)):
                if next(events, None) is None:
                    break
            events.close()
            self._note("closed")

    def _note(self, outcome: str) -> None:
        with self._lock:
            self.requests += 1
            self.outcomes[outcome] += 1

    def _question(self, rng: random.Random) -> dict[str, Any]:
        strategy = rng.choice(list(STRATEGIES))
        with self._lock:
            self.strategies[strategy] += 1
        rounds = rng.randint(1, 3)
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
                sample_fps=rng.choice((0.5, 1.0)),
                max_frames=8,
                min_pixels=28 * 28 * 4,
                total_pixels=28 * 28 * 64,
            ),
            "sampling": SamplingParams(
                temperature=rng.choice((0.0, 0.8)),
                max_tokens=rng.randint(1, 6),
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
        f"{result['slope_mb_per_100_requests']:+.2f} MB per 100 requests after the warm-up; "
        f"{min(result['open_files'])} to {max(result['open_files'])} open files"
    )
    for name, cache in result["caches"].items():
        most, bound = cache["peak_bytes"] / MIB, cache["budget_bytes"] / MIB
        print(f"{name}: {most:.2f} of {bound:.0f} MiB")


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__]))
