"""What benches share: the question asked, where the forced clues point, and where it all ran."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtts_rt.bench.model import MODEL_ID, bench_model, synthetic_video
from vtts_rt.config import STRATEGIES, EngineConfig, ResolvedPerception
from vtts_rt.perception.clue import Clue, clue_from_json
from vtts_rt.results import versions
from vtts_rt.types import Parity, Strategy, VideoMetadata, require
from vtts_rt.video import open_video

# The setting: a frame every two seconds in the coarse pass (15 pairs of the 60 s clip), clues
# at 20-30 s, 24-28 s and so on, as fractions of the duration so that they fit any file.
SAMPLE_FPS = 0.5
CLUES = ((20 / 60, 30 / 60), (24 / 60, 28 / 60), (25 / 60, 27 / 60), (25.5 / 60, 26.5 / 60))
# One question for each of eight askers; where there is one asker, it is the first.
QUESTIONS = (
    "What does the person do right after the red card has been put on the table?",
    "Which hand opens the door before the light goes out?",
    "How many cups stand on the shelf when the camera stops?",
    "What is written on the sign behind the second car?",
    "Why does the child turn around in the middle of the room?",
    "Which of the two boxes is lifted first, and by whom?",
    "What colour is the bag that is left on the chair?",
    "Where does the ball lie when the whistle is blown?",
)
OPTIONS = (
    "They open the window and look outside",
    "They write a note and fold it twice",
    "They pour water into the glass",
    "They leave the room with the bag",
)
PERCENTILES = (10, 25, 50, 75, 90, 99)  # of `vllm bench latency`


def question(number: int) -> str:
    """The question of an asker: every number has one of its own."""
    text = QUESTIONS[number % len(QUESTIONS)]
    return text if number < len(QUESTIONS) else f"{text} ({number})"


@dataclass(frozen=True, slots=True)
class Setting:
    """One question: its rounds, tokens generated in each, and the clues after all but the last
    (a list of `[[start, end]]` seconds)."""

    rounds: int
    max_tokens: int
    clues: list[list[list[float]]]
    text_first: bool = True

    @classmethod
    def of(cls, args: argparse.Namespace, duration_seconds: float) -> Setting:
        """From --rounds and --max-tokens, for a video of that duration."""
        clues = [
            [[round(share * duration_seconds, 6) for share in span]]
            for span in CLUES[: args.rounds - 1]
        ]
        return cls(args.rounds, args.max_tokens, clues)

    @property
    def parsed_clues(self) -> list[Clue]:
        return [clue_from_json(clue) for clue in self.clues]

    def perception(self, strategy: Strategy, parity: Parity = "transformers") -> ResolvedPerception:
        """Budgets of VideoChat-R1.5; "transformers": the numbers of the loop on it."""
        return ResolvedPerception(
            strategy=strategy,
            max_rounds=self.rounds,
            sample_fps=SAMPLE_FPS,
            parity=parity,
            text_first=self.text_first,
        )

    def as_dict(self, video: str, metadata: VideoMetadata) -> dict[str, Any]:
        """The JSON of a result's "setting"."""
        perception = self.perception("official")
        return {
            "video": video,
            "duration_seconds": metadata.duration_seconds,
            "source_fps": metadata.source_fps,
            "height": metadata.height,
            "width": metadata.width,
            "sample_fps": SAMPLE_FPS,
            "total_pixels": perception.total_pixels,
            "min_pixels": perception.min_pixels,
            "parity": perception.parity,
            "rounds": self.rounds,
            "max_tokens": self.max_tokens,
            "assume_clues": self.clues,
        }


# -- flags that several benches take ----------------------------------------------------------


def add_setting_flags(parser: argparse.ArgumentParser, *, strategy: str) -> None:
    """Flags of what is asked and of what; the second names are those of `vllm bench`."""
    add = parser.add_argument
    add("--strategy", default=strategy, help="ours, comma-separated")
    add("--rounds", type=int, default=3, help=f"1 to {len(CLUES) + 1}")
    add("--max-tokens", "--output-len", type=int, default=32, help="generated in every round")
    drafts = EngineConfig().draft_tokens
    add("--draft-tokens", type=int, default=drafts, help="most tokens drafted by ours; 0: none")
    add("--threads", type=int, default=2, help="CPU threads of every side")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--video", default="synthetic", help="a file, or `synthetic`: 60 s of 640x360 H.264")
    add("--model", type=Path, help="checkpoint folder; default: the random 118 M bench model")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "vtts_rt" / "bench")
    add_output_flags(parser)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of where a result goes."""
    add = parser.add_argument
    add("--output-json", type=Path, help="where to write the result")
    add("--result-dir", type=Path, help="folder to file it in, named by theme, machine and month")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """--device, for benches that run on either; `check_device` says whether it is there."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cpu", "cuda"))


def check_device(device: str) -> None:
    """RuntimeError where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench: no CUDA device is available; use --device cpu")


def strategies_of(args: argparse.Namespace) -> list[Strategy]:
    """--strategy, checked. Also checks --rounds; ValueError names what is wrong."""
    names = [name for name in args.strategy.split(",") if name]
    for name in names:
        require("bench", "strategy", name, name in STRATEGIES, f"one of {', '.join(STRATEGIES)}")
    top = len(CLUES) + 1
    require("bench", "rounds", args.rounds, 1 <= args.rounds <= top, f"in 1..{top}")
    return [strategy for name in names for strategy in STRATEGIES if strategy == name]


def model_and_video(args: argparse.Namespace) -> tuple[Path, Path, VideoMetadata]:
    """Checkpoint folder, file and its metadata; the default ones are built on first use."""
    folder = args.model or bench_model(args.cache_dir)
    video = synthetic_video(args.cache_dir) if args.video == "synthetic" else Path(args.video)
    with open_video(str(video)) as source:
        return folder, video, source.metadata


# -- results ----------------------------------------------------------------------------------


def heading(bench: str, args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """The first fields of every result: when, how (`flags` by name) and where it was measured."""
    words = ["vtts-rt", "bench", bench]
    for name in flags:
        value = getattr(args, name)
        if isinstance(value, Path) or name == "video":  # where files lie changes nothing
            value = Path(value).name
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False) and (name, value) != ("video", "synthetic"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return {
        "bench": bench,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(words),
        "commit": commit(),
        "hardware": hardware(args.threads),
        "versions": {**versions(), "python": platform.python_version()},
        "model_id": MODEL_ID if args.model is None else args.model.name,
    }


def latencies(seconds: Sequence[float]) -> dict[str, Any]:
    """Field names of `vllm bench latency`, seconds."""
    values = np.percentile(seconds, PERCENTILES)
    return {
        "avg_latency": statistics.fmean(seconds),
        "median_latency": statistics.median(seconds),
        "min_latency": min(seconds),
        "max_latency": max(seconds),
        "latencies": list(seconds),
        "percentiles": {str(p): float(v) for p, v in zip(PERCENTILES, values, strict=True)},
    }


def hardware(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": cores, "threads": threads, "gpu": gpu}


def results_name(theme: str) -> str:
    """`<theme>_<hardware>_<yyyymm>.json`."""
    machine = hardware(0)
    known = machine["gpu"] or f"{machine['cpu']} {machine['cores']}c"
    slug = re.sub(r"[^a-z0-9]+", "-", known.lower()).strip("-")
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
