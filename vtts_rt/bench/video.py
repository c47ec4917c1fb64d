"""`vtts-rt bench decode`: what getting frames out of video files costs, ours and its peers.

Every run opens a fresh copy of a file, which no cache has seen, and asks for frames: some evenly
over all of it, spans here and there, and the same frames again. Runs alternate between contenders.
Before anything is timed, every contender's frames are compared with PyAV's.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.bench.encodings import ENCODINGS, codec_names, encode
from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.readers import Contender, NotHere, Reader, absolute, contenders, host
from vtts_rt.bench.setting import add_compute_flags, add_output_flags, check_compute, heading
from vtts_rt.checkout import FOLDER, source_module
from vtts_rt.types import require

SOURCE_FPS = 30
LONG, SMALL = (60, 720, 1280), (2, 120, 160)  # seconds, height, width
# Codec and most frames from keyframe to keyframe.
FILES = (("h264", 12), ("h264", 250), ("vp9", 12), ("vp9", 250), ("mjpeg", 1))
NUM_UNIFORM, NUM_SPANS, SPAN_FRAMES = 64, 8, 8
# Mean absolute difference of a frame from PyAV's, of 255, that is still the same frame: DALI
# interpolates chroma, which this clip's hard colour edges show more than a camera's would; the
# next frame is further off.
MAX_MEAN_DIFFERENCE = 6.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `vtts-rt bench decode`."""
    add = parser.add_argument
    seconds, height, width = SMALL
    add("--small", action="store_true", help=f"files of {seconds} s and {width}x{height}: a trial")
    add("--codec", default="h264,vp9,mjpeg", help="comma-separated")
    add("--repeats", type=int, default=5, help="runs of each contender, alternating")
    add("--clips", type=int, default=8, help="whose pixels are compared between decoders")
    add("--seed", type=int, default=0, help="of the random spans")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "vtts_rt" / "bench")
    add_compute_flags(parser, dtypes=(), threads=None)
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    return "video"


@dataclass(frozen=True, slots=True)
class _Case:
    """One file and what is asked of it: lists of frame indices, one after another."""

    codec: str
    gop: int
    pattern: str
    path: Path
    requests: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.codec}, GOP {self.gop}, {self.pattern}"

    @property
    def num_frames(self) -> int:
        return sum(len(request) for request in self.requests)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row for each case and contender; the files are made on first use."""
    require("bench", "repeats", args.repeats, args.repeats >= 1, ">= 1")
    check_compute(args)
    from vtts_rt.video.packets import num_decoder_threads  # PyAV is not everywhere

    codecs = codec_names(args.codec)
    rows, skipped, failures = [], [], []
    args.threads, args.model = num_decoder_threads(), None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        able, absent = contenders(work / "index", args.device)
        for case in _cases(args, codecs):
            print(f"{case.name}: {case.path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
            here, why_not, wrong = _checked(case, able)
            skipped += [{"case": case.name, "name": n, "reason": r} for n, r in why_not.items()]
            failures += [f"{case.name}: {name}: {reason}" for name, reason in wrong.items()]
            rows += _measured(case, here, args.repeats, work)
        found = []
        if FOLDER.is_dir():  # not in an installed wheel
            differences = source_module("the comparison of pixels", "differences.py")
            found = differences.measured(args.clips, work)
    seconds, height, width = SMALL if args.small else LONG
    flags = ("small", "codec", "repeats", "clips", "seed", "device")
    result = heading("decode", args, flags)
    del result["model_id"]
    return {
        **result,
        "setting": {
            "duration_seconds": seconds,
            "source_fps": SOURCE_FPS,
            "height": height,
            "width": width,
            "max_mean_difference": MAX_MEAN_DIFFERENCE,
        },
        "peers": _versions(able),
        "absent": absent,
        "skipped": skipped,
        "results": rows,
        "comparisons": _comparisons(rows, able),
        "differences": found,
        "failures": failures,
    }


# -- files and what is asked of them ----------------------------------------------------------


def _cases(args: argparse.Namespace, codecs: Sequence[str]) -> list[_Case]:
    seconds, height, width = SMALL if args.small else LONG
    num_frames = seconds * SOURCE_FPS
    # Half of a trial's frames: frames asked for twice would come from our store.
    spread = np.linspace(0, num_frames - 1, min(NUM_UNIFORM, num_frames // 2)).round().astype(int)
    slots = random.Random(args.seed).sample(
        range(num_frames // SPAN_FRAMES), NUM_SPANS // (1 + args.small)
    )
    spans = tuple(tuple(range(k * SPAN_FRAMES, (k + 1) * SPAN_FRAMES)) for k in slots)
    patterns = {"uniform": (tuple(spread.tolist()),), "spans": spans}
    found = []
    for codec, gop in FILES:
        if codec not in codecs:
            continue
        name = f"decode-{codec}-gop{gop}-{seconds}s-{width}x{height}{ENCODINGS[codec].suffix}"
        path = args.cache_dir / name
        if not path.is_file():
            print(f"encoding {name}", file=sys.stderr)
            frames = moving_frames(num_frames, (height, width))
            encode(path, frames, codec, source_fps=SOURCE_FPS, gop=gop)
        found += [_Case(codec, gop, name, path, asked) for name, asked in patterns.items()]
    return found


def _checked(
    case: _Case, able: Sequence[Contender]
) -> tuple[list[Contender], dict[str, str], dict[str, str]]:
    """The decoders that give the frames of PyAV (the first); why others do not decode the file;
    and those that give other frames."""
    here: list[Contender] = []
    why_not: dict[str, str] = {}
    wrong: dict[str, str] = {}
    expected: list[np.ndarray] = []
    for contender in able:
        try:
            reader = contender.open(case.path)
            try:
                frames = [host(f) for asked in case.requests for f in reader.frames(asked)]
            finally:
                reader.close()
        except NotHere as reason:
            why_not[contender.name] = str(reason)
            continue
        expected = expected or frames
        off = max(
            absolute(a, b).mean() if a.shape == b.shape else np.inf
            for a, b in zip(expected, frames, strict=True)
        )
        if off <= MAX_MEAN_DIFFERENCE:
            here.append(contender)
        else:
            wrong[contender.name] = f"a frame is {off:.1f} levels off PyAV's"
    return here, why_not, wrong


# -- times ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds of one run: opening, the frames, the same frames again; CPU: of the first two."""

    opening: float
    decoding: float
    again: float
    cpu: float


def _measured(
    case: _Case, here: Sequence[Contender], repeats: int, work: Path
) -> list[dict[str, Any]]:
    runs: dict[str, list[_Run]] = {contender.name: [] for contender in here}
    for number in range(repeats):
        first = number % len(here)  # the order rotates: no decoder always runs first
        for contender in (*here[first:], *here[:first]):
            path = case.path
            if not contender.index_cache:
                path = work / f"fresh{case.path.suffix}"
                shutil.copyfile(case.path, path)
            runs[contender.name].append(_run(contender, path, case.requests))
    return [
        {
            "codec": case.codec,
            "gop": case.gop,
            "pattern": case.pattern,
            "name": name,
            "num_frames": case.num_frames,
            **_summary(found, case.num_frames),
        }
        for name, found in runs.items()
    ]


def _run(contender: Contender, path: Path, requests: Sequence[Sequence[int]]) -> _Run:
    def read(reader: Reader) -> None:
        kept = [reader.frames(asked) for asked in requests]
        assert len(kept) == len(requests)

    cpu, began = time.process_time(), time.perf_counter()
    reader = contender.open(path)
    opened = time.perf_counter()
    read(reader)
    decoded = time.perf_counter()
    cpu = time.process_time() - cpu
    again = time.perf_counter()
    read(reader)
    ended = time.perf_counter()
    reader.close()
    return _Run(opened - began, decoded - opened, ended - again, cpu)


def _summary(runs: Sequence[_Run], num_frames: int) -> dict[str, float]:
    """Medians over the runs, ms: with opening, its least and most, and the parts."""
    whole = [1e3 * (run.opening + run.decoding) for run in runs]
    opening, decoding, again, cpu = (
        1e3 * statistics.median(getattr(run, part) for run in runs)
        for part in ("opening", "decoding", "again", "cpu")
    )
    return {
        "median_ms": statistics.median(whole),
        "min_ms": min(whole),
        "max_ms": max(whole),
        "cpu_ms": cpu,
        "opening_ms": opening,
        "decoding_ms": decoding,
        "again_ms": again,
        "frames_per_second": 1e3 * num_frames / statistics.median(whole),
        "again_speedup": decoding / again,
    }


def _comparisons(rows: Sequence[dict[str, Any]], able: Sequence[Contender]) -> list[dict[str, Any]]:
    """Of each case: the fastest peer, and PyAV's time, opening included, as a share of its."""
    peers = {contender.name for contender in able if not contender.ours}
    found = []
    for ours in rows:
        case = {name: ours[name] for name in ("codec", "gop", "pattern")}
        rivals = [row for row in rows if row["name"] in peers and case.items() <= row.items()]
        if ours["name"] == "pyav" and rivals:
            best = min(rivals, key=lambda row: row["median_ms"])
            found.append(
                {
                    **case,
                    "peer": best["name"],
                    "time_ratio": ours["median_ms"] / best["median_ms"],
                    "cpu_ratio": ours["cpu_ms"] / min(row["cpu_ms"] for row in rivals),
                }
            )
    return found


def _versions(able: Sequence[Contender]) -> dict[str, str]:
    modules = {c.name: sys.modules.get({"opencv": "cv2"}.get(c.name, c.name)) for c in able}
    return {name: str(module.__version__) for name, module in modules.items() if module}


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    setting, machine = result["setting"], result["hardware"]
    clip = f"{setting['duration_seconds']} s of {setting['width']}x{setting['height']}"
    table = Table("case", "decoder", title=f"{clip}, {machine['cpu']}, {machine['cores']} cores")
    for name in ("ms", "least", "most", "CPU ms", "opening", "frames/s", "again ms"):
        table.add_column(name, justify="right")
    for row in result["results"]:
        table.add_row(
            f"{row['codec']}, GOP {row['gop']}, {row['pattern']}",
            row["name"],
            *(f"{row[f'{name}_ms']:,.0f}" for name in ("median", "min", "max", "cpu", "opening")),
            f"{row['frames_per_second']:,.0f}",
            f"{row['again_ms']:,.2f}",
        )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    pixels = Table("pixels against pyav's", "codec", title="absolute differences, of 255")
    for name in ("frames", "most", "99.9 %", "mean"):
        pixels.add_column(name, justify="right")
    for row in result["differences"]:
        known = (str(row[name]) for name in ("decoder", "codec", "num_frames", "max", "p999"))
        pixels.add_row(*known, f"{row['mean']:.2f}")
    console.print(pixels)
    for name, reason in result["absent"].items():
        print(f"{name} takes no part: {reason}")
    for name, reason in {(row["name"], row["reason"]) for row in result["skipped"]}:
        print(f"{name} takes no part in some cases: {reason}")
