"""What benches share: the question asked, where the forced clues point, and where it all ran."""

from __future__ import annotations

import argparse
import json
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

from vtts_rt.bench.footage import FOOTAGE
from vtts_rt.bench.model import MODEL_ID, bench_model
from vtts_rt.config import PARITIES, PerceptionConfig, ResolvedPerception
from vtts_rt.models.registry import DTYPES, checkpoint_dtype
from vtts_rt.perception.clue import Clue, clue_from_json
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.rounds.results import versions
from vtts_rt.types import Parity, SamplingParams, StrategyName, VideoMetadata, require
from vtts_rt.video import open_video

# The setting: a frame every two seconds in the coarse pass (15 pairs of the 60 s clip), clues
# at 20-30 s, 24-28 s and so on, as fractions of the duration so that they fit any file.
SAMPLE_FPS = 0.5
CLUES = ((20 / 60, 30 / 60), (24 / 60, 28 / 60), (25 / 60, 27 / 60), (25.5 / 60, 26.5 / 60))
# One question for each of eight concurrent requests; a single one asks the first.
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
# Settings that change no logit; an unset one is the checkpoint's.
NEUTRAL: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_tokens": 0,
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "bad_words_ids": (),
}
PERCENTILES = (10, 25, 50, 75, 90, 99)  # of `vllm bench latency`


def question(number: int) -> str:
    """The question of a request: every number has one of its own."""
    text = QUESTIONS[number % len(QUESTIONS)]
    return text if number < len(QUESTIONS) else f"{text} ({number})"


@dataclass(frozen=True, slots=True)
class Setting:
    """One question: its rounds, tokens generated in each, and the clues after all but the last
    (a list of `[[start, end]]` seconds)."""

    rounds: int
    max_tokens: int
    clues: list[list[list[float]]]
    parity: Parity = "release"
    text_first: bool = True

    @classmethod
    def of(cls, args: argparse.Namespace, duration_seconds: float) -> Setting:
        """From --rounds, --max-tokens and --parity, for a video of that duration."""
        clues = [
            [[round(share * duration_seconds, 6) for share in span]]
            for span in CLUES[: args.rounds - 1]
        ]
        return cls(args.rounds, args.max_tokens, clues, args.parity)

    @property
    def parsed_clues(self) -> list[Clue]:
        return [clue_from_json(clue) for clue in self.clues]

    @property
    def sampling(self) -> SamplingParams:
        """Greedy and always `max_tokens` tokens, whatever the checkpoint's generation_config.json
        says."""
        known = SamplingParams.__dataclass_fields__
        neutral = {name: value for name, value in NEUTRAL.items() if name in known}
        return SamplingParams(max_tokens=self.max_tokens, ignore_eos=True, **neutral)

    def perception(self, strategy: StrategyName) -> PerceptionConfig:
        """What this setting fixes; the model's own settings fill the rest, for every side
        (`Runtime.perception`)."""
        return PerceptionConfig(
            strategy=strategy,
            max_rounds=self.rounds,
            sample_fps=SAMPLE_FPS,
            parity=self.parity,
            text_first=self.text_first,
        )

    def as_dict(
        self, video: str, metadata: VideoMetadata, resolved: ResolvedPerception
    ) -> dict[str, Any]:
        """The JSON of a result's "setting"; resolved: the budgets that all sides were given."""
        return {
            "video": video,
            "duration_seconds": metadata.duration_seconds,
            "source_fps": metadata.source_fps,
            "height": metadata.height,
            "width": metadata.width,
            "sample_fps": resolved.sample_fps,
            "max_frames": resolved.max_frames,
            "total_pixels": resolved.total_pixels,
            "min_pixels": resolved.min_pixels,
            "parity": self.parity,
            "rounds": self.rounds,
            "max_tokens": self.max_tokens,
            "assume_clues": self.clues,
        }


# -- flags that several benches take ----------------------------------------------------------


def add_setting_flags(
    parser: argparse.ArgumentParser,
    *,
    strategy: str,
    draft_tokens: int = 0,
    several_dtypes: bool = False,
) -> None:
    """Flags of what is asked and of what; the second names are those of `vllm bench`."""
    add = parser.add_argument
    add("--strategy", default=strategy, help="ours, comma-separated")
    add("--rounds", type=int, default=3, help=f"1 to {len(CLUES) + 1}")
    add("--max-tokens", "--output-len", type=int, default=32, help="generated in every round")
    add("--draft-tokens", type=int, default=draft_tokens, help="most tokens ours drafts; 0: none")
    add("--parity", choices=PARITIES, default="release", help="whose numbers, on every side")
    add("--footage", choices=tuple(FOOTAGE), default="real", help="60 s of 640x360 H.264")
    add("--video", type=Path, help="a file instead")
    add("--model", type=Path, help="checkpoint folder; default: the random 118 M bench model")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "vtts_rt" / "bench")
    if several_dtypes:
        known = ", ".join(DTYPES)
        add("--dtype", help=f"of {known}, comma-separated; default: the checkpoint's own")
    add_compute_flags(parser, dtypes=() if several_dtypes else tuple(DTYPES))
    add_output_flags(parser)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of where a result goes."""
    add = parser.add_argument
    add("--output-json", type=Path, help="where to write the result")
    add("--result-dir", type=Path, help="folder to file it in, named by theme, machine and month")


def add_compute_flags(
    parser: argparse.ArgumentParser,
    *,
    devices: Sequence[str] = ("cpu", "cuda"),
    dtypes: Sequence[str] = tuple(DTYPES),
    threads: int | None = 2,
    dtype_help: str = "default: the checkpoint's own",
) -> None:
    """--device, --dtype and --threads of every bench; `check_compute` reads them.

    devices: what the bench runs on; the default is a GPU where there is one and it takes it.
    dtypes: what --dtype may be, none where nothing is computed in one. threads: the default, None
    where it is not for the caller to choose.
    """
    add = parser.add_argument
    here = "cuda" if torch.cuda.is_available() and "cuda" in devices else devices[0]
    add("--device", choices=devices, default=here)
    if dtypes:
        only = dtypes[0] if len(dtypes) == 1 else None
        add("--dtype", choices=dtypes, default=only, help="" if only else dtype_help)
    if threads is not None:
        add("--threads", type=int, default=threads, help="CPU threads of every side")


def check_compute(args: argparse.Namespace) -> None:
    """Check --device and --threads, where it is a flag, and set the threads of torch. RuntimeError
    where there is no such device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench: no CUDA device is available; use --device cpu")
    if (threads := getattr(args, "threads", None)) is not None:
        require("bench", "threads", threads, threads >= 1, ">= 1")
        torch.set_num_threads(threads)


def dtype_of(args: argparse.Namespace, model: str | Path) -> str:
    """--dtype, or the checkpoint's own."""
    return args.dtype or str(checkpoint_dtype(model)).removeprefix("torch.")


def strategies_of(args: argparse.Namespace) -> list[StrategyName]:
    """--strategy, checked. Also checks --rounds; ValueError names what is wrong."""
    names = [name for name in args.strategy.split(",") if name]
    strategies = [find_strategy(name, "bench").name for name in names]
    top = len(CLUES) + 1
    require("bench", "rounds", args.rounds, 1 <= args.rounds <= top, f"in 1..{top}")
    return strategies


def model_and_video(args: argparse.Namespace) -> tuple[Path, Path, VideoMetadata]:
    """Checkpoint folder, file and its metadata; the default ones are built on first use."""
    folder = args.model or bench_model(args.cache_dir)
    video = args.video or FOOTAGE[args.footage](args.cache_dir)
    with open_video(str(video)) as source:
        metadata = source.metadata
    require("bench", "video", video.name, metadata.num_frames > 1, "a video of several frames")
    return folder, video, metadata


def video_name(args: argparse.Namespace) -> str:
    """How results name what was looked at: the footage, or the file without its folder."""
    return args.footage if args.video is None else Path(args.video).name


# -- results ----------------------------------------------------------------------------------


def heading(bench: str, args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """The first fields of every result: when, how (`flags` by name) and where it was measured."""
    return {
        "bench": bench,
        "command": command_line(bench, args, flags),
        **origin(args.threads),
        "model_id": MODEL_ID if args.model is None else args.model.name,
    }


def command_line(bench: str, args: argparse.Namespace, flags: Sequence[str]) -> str:
    """What measures the same again, with `flags` by name."""
    own = bench in ("rounds", "serve", "decode", "ops")
    words = ["vtts-rt", "bench", bench] if own else ["python", f"bench/bench_{bench}.py"]
    for name in flags:
        value = getattr(args, name)
        if isinstance(value, Path):  # where files lie changes nothing
            value = value.name
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def origin(threads: int) -> dict[str, Any]:
    """Fields of every result: when and where it was measured, with which code."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "hardware": hardware(threads),
        "versions": {**versions(), "python": platform.python_version()},
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


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
    """What the numbers were measured on; `cpu` with the instruction set, as processors of one name
    differ in it, and bfloat16 products by several times."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1].strip() if found else name
        name += " " + torch.backends.cpu.get_cpu_capability()  # AVX2, AVX512, ...
        name += " BF16" * bool(re.search(r"\bavx512_bf16\b", text))
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
    """Commit of the source tree that runs, with `+` when its code has changes; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[2]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code = ("vtts_rt", "kernels", "csrc", "bench/*.py")
    try:
        changed = git("status", "--porcelain", "--", *code)
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
