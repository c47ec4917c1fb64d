"""How busy a consumer of decoded clips is kept, by our feed and by peers.

A sample is a clip with frames for one rollout group. A consumer takes a fixed time for each (it
sleeps, as a trainer that waits for its GPU; or computes on one thread) and is busy for the share of
the run in which it does not wait for the next. Peers are torch's DataLoader with as many worker
processes, each opening clips with decord: once a sample, or once for every rollout of a group.
Runs alternate between contenders; every clip is new to every run (no index cache).
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vtts_rt.bench import script
from vtts_rt.bench.encodings import encode
from vtts_rt.bench.model import moving_frames
from vtts_rt.bench.setting import add_compute_flags, add_output_flags, check_compute, heading
from vtts_rt.data.feed import RolloutDataFeed
from vtts_rt.data.rows import DataSet, Row, write_rows
from vtts_rt.types import require

SOURCE_FPS, GOP = 30, 12
NUM_ENCODED = 8  # clips that are encoded; the others are copies, told apart by a box at the end


def add_flags(parser: argparse.ArgumentParser) -> None:
    """See `--help`."""
    add = parser.add_argument
    add("--clips", type=int, default=200)
    add("--seconds", type=float, default=10.0, help="of each clip")
    add("--height", type=int, default=240)
    add("--width", type=int, default=320)
    add("--frames", type=int, default=16, help="of each clip, evenly spread")
    add("--group-size", type=int, default=8, help="rollouts of a sample")
    add("--sample-ms", type=float, default=100.0, help="what the consumer takes for a sample")
    add("--compute", action="store_true", help="it computes on one thread instead of sleeping")
    add("--workers", type=int, default=2)
    add("--repeats", type=int, default=3, help="runs of each contender, alternating")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "vtts_rt" / "bench")
    add_compute_flags(parser, dtypes=(), threads=None)
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    return "feed"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return the result (the JSON file's content); arguments as `--help` says."""
    for name in ("clips", "frames", "group_size", "workers", "repeats"):
        require("bench", name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    check_compute(args)
    args.threads, args.model = 1, None
    torch.set_num_threads(1)
    paths = _clips(args)
    contenders, absent = _contenders(args, paths)
    work = _computing if args.compute else time.sleep
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    with mock.patch.dict(os.environ, {"VTTS_RT_CACHE_DIR": "off"}):
        for number in range(args.repeats):
            for name, samples in contenders.items():
                print(f"run {number + 1} of {args.repeats}: {name}", file=sys.stderr)
                busy, first = _consumed(samples(), args.sample_ms / 1e3, work)
                free, _ = _consumed(samples(), 0.0, None)
                runs[name].append((busy, first, args.clips / free))
    flags = ("clips", "seconds", "height", "width", "frames", "group_size", "sample_ms")
    result = heading("feed", args, (*flags, "compute", "workers", "repeats", "device"))
    del result["model_id"]
    rows = [_row(name, found, args) for name, found in runs.items()]
    return {**result, "absent": absent, "results": rows, "busy": rows[0]["busy"]}


def _row(
    name: str, runs: list[tuple[float, float, float]], args: argparse.Namespace
) -> dict[str, Any]:
    """Medians of the runs."""
    seconds = args.clips * args.sample_ms / 1e3
    elapsed = [run[0] for run in runs]
    return {
        "name": name,
        "busy": seconds / statistics.median(elapsed),
        "least_busy": seconds / max(elapsed),
        "first_wait_ms": 1e3 * statistics.median(run[1] for run in runs),
        "samples_per_second": statistics.median(run[2] for run in runs),
        "decodes_per_sample": args.group_size if name.endswith("rollout") else 1,
    }


def _consumed(
    samples: Iterable[Any], seconds: float, work: Callable[[float], None] | None
) -> tuple[float, float]:
    """(seconds of the whole run, seconds until the first sample)."""
    began = time.perf_counter()
    first = None
    for _ in samples:
        first = first or time.perf_counter() - began
        if work is not None:
            work(seconds)
    assert first is not None
    return time.perf_counter() - began, first


def _computing(seconds: float) -> None:
    """Multiplies matrices for a time."""
    a = torch.ones(256, 256)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        a @ a


# -- clips ------------------------------------------------------------------------------------


def _clips(args: argparse.Namespace) -> list[Path]:
    """Files of different content, made on first use."""
    size = f"{args.seconds:g}s-{args.width}x{args.height}"
    num_frames = round(args.seconds * SOURCE_FPS)
    folder = args.cache_dir / f"feed-{size}"
    for number in range(min(NUM_ENCODED, args.clips)):
        if not (folder / f"{number}.mp4").is_file():
            # Another part of the moving picture for each.
            frames = moving_frames(num_frames + 40 * number, (args.height, args.width))
            part = islice(frames, 40 * number, None)
            encode(folder / f"{number}.mp4", part, "h264", source_fps=SOURCE_FPS, gop=GOP)
    for number in range(NUM_ENCODED, args.clips):
        data = (folder / f"{number % NUM_ENCODED}.mp4").read_bytes()
        box = struct.pack(">I4sI", 12, b"free", number)  # readers skip it
        (folder / f"{number}.mp4").write_bytes(data + box)
    return [folder / f"{number}.mp4" for number in range(args.clips)]


# -- contenders -------------------------------------------------------------------------------


def _contenders(
    args: argparse.Namespace, paths: list[Path]
) -> tuple[dict[str, Callable[[], Iterable[Any]]], dict[str, str]]:
    """The readers compared, ours first: name -> samples of an epoch; and of the others, why not."""
    rows = paths[0].parent / f"rows-{len(paths)}.jsonl"
    write_rows(
        rows, [Row(path.name, "What moves?", duration_seconds=args.seconds) for path in paths]
    )
    sets = [DataSet("clips", "video", "mc", paths[0].parent, rows)]

    def ours() -> Iterator[Any]:
        feed = RolloutDataFeed(
            sets,
            frames=args.frames,
            group_size=args.group_size,
            num_workers=args.workers,
            decoder="dali" if args.device == "cuda" else "pyav",
            device=0 if args.device == "cuda" else None,
        )
        yield from feed
        decoded = feed.stats()["frames_decoded"]
        assert decoded == args.clips * args.frames, f"{decoded} frames decoded"

    def loader(decodes: int) -> Callable[[], Iterable[Any]]:
        data = _DecordClips(paths, args.frames, decodes)
        return lambda: DataLoader(data, batch_size=None, num_workers=args.workers)

    found: dict[str, Callable[[], Iterable[Any]]] = {"RolloutDataFeed": ours}
    try:
        import decord
    except Exception as error:  # whatever a library that does not fit this machine raises
        return found, {"decord": f"{type(error).__name__}: {error}"}
    decord.logging.set_level(decord.logging.FATAL)
    found["DataLoader, decord"] = loader(1)
    if args.group_size > 1:
        found["DataLoader, decord for every rollout"] = loader(args.group_size)
    return found, {}


class _DecordClips(Dataset[Any]):
    """Frames of each clip, (F, H, W, 3) uint8, decoded `decodes` times."""

    def __init__(self, paths: list[Path], num_frames: int, decodes: int) -> None:
        self._paths, self._num_frames, self._decodes = paths, num_frames, decodes

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        import decord

        for _ in range(self._decodes):
            reader = decord.VideoReader(str(self._paths[number]), num_threads=1)
            indices = np.linspace(0, len(reader) - 1, self._num_frames).round().astype(int)
            frames = reader.get_batch(indices.tolist()).asnumpy()
        return torch.from_numpy(frames)


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    machine = result["hardware"]
    title = f"{result['command']}, {machine['cpu']}, {machine['cores']} cores"
    table = Table("samples from", title=title)
    for name in ("busy", "least", "first after ms", "samples/s", "decodes a sample"):
        table.add_column(name, justify="right")
    for row in result["results"]:
        table.add_row(
            row["name"],
            f"{row['busy']:.1%}",
            f"{row['least_busy']:.1%}",
            f"{row['first_wait_ms']:,.0f}",
            f"{row['samples_per_second']:,.1f}",
            str(row["decodes_per_sample"]),
        )
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)
    for name, reason in result["absent"].items():
        print(f"{name} takes no part: {reason}")


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__]))
