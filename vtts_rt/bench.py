"""`vtts-rt bench rounds`: the published loop on transformers against ours, decoding included.

Both sides answer the same question about the same file with the same weights, forced clues and
a fixed number of greedy tokens a round. Runs alternate, and every run is cold: a fresh copy of
the file, caches cleared. Loading a model is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtts_rt.bench_model import MODEL_ID, bench_model, synthetic_video
from vtts_rt.bench_peer import PublishedLoop, RoundSample
from vtts_rt.config import STRATEGIES, EngineConfig, PerceptionConfig
from vtts_rt.perception.clue import clue_from_json
from vtts_rt.results import versions
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, Strategy, require
from vtts_rt.video import open_video

PEER = "transformers loop"
WARM = ", same question again"
PHASES = ("decode", "preprocess", "vision", "prefill", "generate", "total")
# The setting: a frame every two seconds in the coarse pass (15 pairs of the 60 s clip), clues
# at 20-30 s then 24-28 s, as fractions of the duration so that they fit any file.
SAMPLE_FPS = 0.5
CLUES = ((20 / 60, 30 / 60), (24 / 60, 28 / 60))
QUESTION = "What does the person do right after the red card has been put on the table?"
OPTIONS = (
    "They open the window and look outside",
    "They write a note and fold it twice",
    "They pour water into the glass",
    "They leave the room with the bag",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vtts-rt bench`; argv without the program's name. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    result = bench_rounds(args)
    print_table(result)
    if args.output_json is not None:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        args.output_json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {args.output_json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtts-rt bench", description=__doc__.split("\n")[0])
    rounds = parser.add_subparsers(dest="bench", required=True).add_parser(
        "rounds", help="three rounds on one video: ours against the published loop"
    )
    add = rounds.add_argument
    add("--peer", choices=("hf", "none"), default="hf", help="whom to compare with")
    add("--strategy", default="official,append", help="ours, comma-separated")
    add("--rounds", type=int, default=3, help=f"1 to {len(CLUES) + 1}")
    add("--max-tokens", type=int, default=32, help="tokens generated in every round")
    add("--repeats", type=int, default=3, help="runs of each side")
    add("--threads", type=int, default=2, help="CPU threads of both sides")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--video", default="synthetic", help="a file, or `synthetic`: 60 s of 640x360 H.264")
    add("--model", type=Path, help="checkpoint folder; default: the random 118 M bench model")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "vtts_rt" / "bench")
    add("--output-json", type=Path, help="where to write the result")
    return parser


def bench_rounds(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result (the JSON file's content); arguments as `--help` says."""
    strategies = [name for name in args.strategy.split(",") if name]
    for name in strategies:
        require("bench", "strategy", name, name in STRATEGIES, f"one of {', '.join(STRATEGIES)}")
    top = len(CLUES) + 1
    require("bench", "rounds", args.rounds, 1 <= args.rounds <= top, f"in 1..{top}")
    for name in ("repeats", "threads", "max_tokens"):
        value = getattr(args, name)
        require("bench", name, value, value >= 1, ">= 1")
    torch.set_num_threads(args.threads)
    folder = args.model or bench_model(args.cache_dir)
    video = synthetic_video(args.cache_dir) if args.video == "synthetic" else Path(args.video)
    with open_video(str(video)) as source:
        metadata = source.metadata
    clues = [
        [[round(share * metadata.duration_seconds, 6) for share in span]]
        for span in CLUES[: args.rounds - 1]
    ]
    setting = _Setting(clues, args.rounds, args.max_tokens)
    with Runtime.from_pretrained(
        folder, dtype=args.dtype, device="cpu", engine=EngineConfig(threads=args.threads)
    ) as runtime:
        contenders = [_ours(runtime, strategy) for strategy in strategies]
        if args.peer == "hf":
            loop = PublishedLoop(folder, dtype=getattr(torch, args.dtype))
            contenders.insert(0, _peer(loop))
        runs = _alternate(contenders, video, setting, args.repeats)
    return {
        "bench": "rounds",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": _command(args),
        "commit": commit(),
        "hardware": hardware(args.threads),
        "versions": {**versions(), "python": platform.python_version()},
        "model_id": MODEL_ID if args.model is None else args.model.name,
        "dtype": args.dtype,
        "setting": {
            "video": "synthetic" if args.video == "synthetic" else video.name,
            "duration_seconds": metadata.duration_seconds,
            "source_fps": metadata.source_fps,
            "height": metadata.height,
            "width": metadata.width,
            "sample_fps": SAMPLE_FPS,
            "total_pixels": setting.perception("official").total_pixels,
            "min_pixels": setting.perception("official").min_pixels,
            "mrope": setting.perception("official").mrope,
            "rounds": args.rounds,
            "max_tokens": args.max_tokens,
            "assume_clues": clues,
            "repeats": args.repeats,
            "unmeasured": "loading the models; a warm-up of one round and two tokens a side",
        },
        "contenders": {name: _summary(samples) for name, samples in runs.items()},
        "comparisons": _comparisons(runs),
    }


def _command(args: argparse.Namespace) -> str:
    """The command that measures this again; where its files lie changes nothing."""
    words = ["vtts-rt", "bench", "rounds"]
    for name in ("peer", "strategy", "rounds", "max_tokens", "repeats", "threads", "dtype"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.video != "synthetic":
        words += ["--video", Path(args.video).name]
    if args.model is not None:
        words += ["--model", args.model.name]
    return shlex.join(words)


# -- the two sides ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Setting:
    clues: list[Any]
    rounds: int
    max_tokens: int

    def perception(self, strategy: Strategy) -> PerceptionConfig:
        # Budgets of VideoChat-R1.5 are the defaults; hf5: the positions the peer computes.
        return PerceptionConfig(
            strategy=strategy, max_rounds=self.rounds, sample_fps=SAMPLE_FPS, mrope="hf5"
        )


@dataclass(slots=True)
class _Run:
    """One question from opening the file to the last token, seconds, and its rounds."""

    seconds: float
    rounds: list[RoundSample]


@dataclass(slots=True)
class _Contender:
    """ask: rounds of one question about a file; forget: make the next question a cold one."""

    name: str
    ask: Callable[[Path, _Setting], list[RoundSample]]
    forget: Callable[[], None] | None = None

    def run(self, video: Path, setting: _Setting) -> _Run:
        began = time.perf_counter()
        rounds = self.ask(video, setting)
        return _Run(time.perf_counter() - began, rounds)


def _peer(loop: PublishedLoop) -> _Contender:
    def ask(video: Path, setting: _Setting) -> list[RoundSample]:
        return loop.ask(
            video,
            QUESTION,
            options=OPTIONS,
            perception=setting.perception("official"),
            clues=[clue_from_json(clue) for clue in setting.clues],
            max_tokens=setting.max_tokens,
        )

    return _Contender(PEER, ask)


def _ours(runtime: Runtime, strategy: Strategy) -> _Contender:
    def ask(video: Path, setting: _Setting) -> list[RoundSample]:
        answer = runtime.ask(
            str(video),
            QUESTION,
            options=OPTIONS,
            perception=setting.perception(strategy),
            sampling=SamplingParams(max_tokens=setting.max_tokens, ignore_eos=True),
            assume_clues=setting.clues,
        )
        return [
            RoundSample(r.token_ids, list(r.frames), r.prompt_tokens, r.timings, r.reuse)
            for r in answer.rounds
        ]

    return _Contender(strategy, ask, runtime.clear_caches)


def _alternate(
    contenders: list[_Contender], video: Path, setting: _Setting, repeats: int
) -> dict[str, list[_Run]]:
    """Runs by name, one of each contender after the other; ours once more while warm.

    A copy of the file for each run: content hashes are remembered by file identity, and a
    cold run must pay for them.
    """
    runs: dict[str, list[_Run]] = {}

    def note(name: str, run: _Run) -> None:
        runs.setdefault(name, []).append(run)
        print(f"run {len(runs[name])}/{repeats} {name}: {run.seconds:.2f} s", file=sys.stderr)

    for contender in contenders:  # code, threads and allocator, not caches
        contender.run(video, _Setting(clues=[], rounds=1, max_tokens=2))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for contender in contenders:
                path = Path(folder) / f"{repeat}-{contender.name}{video.suffix}"
                shutil.copyfile(video, path)
                if contender.forget is not None:
                    contender.forget()
                note(contender.name, contender.run(path, setting))
                if contender.forget is not None:
                    note(contender.name + WARM, contender.run(path, setting))
                path.unlink()
    return runs


# -- results ----------------------------------------------------------------------------------


def _summary(runs: list[_Run]) -> dict[str, Any]:
    """Field names of `vllm bench latency` (seconds), then medians by round (ms) and counters."""
    seconds = [run.seconds for run in runs]
    rounds = []
    for index, sample in enumerate(runs[0].rounds):
        timings = [run.rounds[index].timings.as_dict() for run in runs]
        rounds.append(
            {
                "index": index,
                "num_frames": len(sample.frame_indices),
                "prompt_tokens": sample.prompt_tokens,
                "completion_tokens": len(sample.token_ids),
                "timings_ms": {
                    phase: round(statistics.median(t[phase] for t in timings), 2)
                    for phase in PHASES
                },
                "reuse": None if sample.reuse is None else sample.reuse.as_dict(),
            }
        )
    percentiles = (10, 25, 50, 75, 90, 99)
    values = np.percentile(seconds, percentiles)
    return {
        "avg_latency": statistics.fmean(seconds),
        "median_latency": statistics.median(seconds),
        "min_latency": min(seconds),
        "max_latency": max(seconds),
        "latencies": seconds,
        "percentiles": {str(p): float(value) for p, value in zip(percentiles, values, strict=True)},
        "rounds": rounds,
    }


def _comparisons(runs: dict[str, list[_Run]]) -> list[dict[str, Any]]:
    """Each of ours against the loop, by median."""
    if PEER not in runs:
        return []
    peer = runs[PEER]
    base = statistics.median(run.seconds for run in peer)
    comparisons = []
    for name, ours in runs.items():
        if name == PEER:
            continue
        pairs = list(zip(peer[0].rounds, ours[0].rounds, strict=False))
        same = len(pairs) == len(peer[0].rounds) == len(ours[0].rounds)
        same = same and all(a.frame_indices == b.frame_indices for a, b in pairs)
        comparisons.append(
            {
                "name": name,
                "time_ratio": statistics.median(run.seconds for run in ours) / base,
                "speedup": base / statistics.median(run.seconds for run in ours),
                "same_frames": same,
                "equal_tokens": [a.token_ids == b.token_ids for a, b in pairs] if same else None,
            }
        )
    return comparisons


def print_table(result: dict[str, Any]) -> None:
    """The result for people: a row a round, then a sentence a contender."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = result["hardware"]
    table = Table(
        title=f"{result['model_id']}, {result['dtype']}, {machine['cpu']}, "
        f"{machine['threads']} threads: medians in ms",
    )
    table.add_column("")
    for name in ("round", *PHASES, "prefilled", "reused", "pairs", "decoded"):
        table.add_column(name, justify="right")
    for name, contender in result["contenders"].items():
        for entry in contender["rounds"]:
            reuse = entry["reuse"] or {}
            last = entry is contender["rounds"][-1]
            table.add_row(
                name if entry["index"] == 0 else "",
                str(entry["index"] + 1),
                *(f"{entry['timings_ms'][phase]:.0f}" for phase in PHASES),
                str(reuse.get("tokens_prefilled", entry["prompt_tokens"])),
                str(reuse.get("tokens_reused", 0)),
                str(reuse.get("pairs_encoded", (entry["num_frames"] + 1) // 2)),
                str(reuse.get("frames_decoded", entry["num_frames"])),
                end_section=last,
            )
    console.print(table)
    for name, contender in result["contenders"].items():
        low, high = contender["min_latency"], contender["max_latency"]
        median = contender["median_latency"]
        console.print(f"{name}: {median:.2f} s ({low:.2f} to {high:.2f})")
    for comparison in result["comparisons"]:
        console.print(_sentence(comparison))


def _sentence(comparison: dict[str, Any]) -> str:
    tokens = comparison["equal_tokens"]
    if tokens is None:
        frames = "same spans, other frames"
    elif all(tokens):
        frames = "same frames, every token equal"
    else:
        differing = ", ".join(str(i + 1) for i, equal in enumerate(tokens) if not equal)
        frames = f"same frames, tokens differ in round {differing}"
    return (
        f"{comparison['name']}: {comparison['time_ratio']:.2f} of the loop's time, "
        f"{comparison['speedup']:.2f} times as fast ({frames})"
    )


# -- surroundings -----------------------------------------------------------------------------


def hardware(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "threads": threads, "gpu": None}


def results_name(theme: str) -> str:
    """`<theme>_<hardware>_<yyyymm>.json`."""
    machine = hardware(0)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']}c".lower()).strip("-")
    return f"{theme}_{slug}_{datetime.now(timezone.utc):%Y%m}.json"


def commit() -> str | None:
    """Commit of the source tree that runs, with `+` when it has changes; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
