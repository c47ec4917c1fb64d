"""What the runs of the rounds bench come to: summaries, comparisons, and a table for people."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtts_rt.bench.peer import RoundSample
from vtts_rt.bench.setting import latencies

PHASES = ("decode", "preprocess", "vision", "prefill", "generate", "total", "ttft")


@dataclass(slots=True)
class Run:
    """One question from opening the file to the last token, seconds, and its rounds."""

    seconds: float
    rounds: list[RoundSample]


Runs = Mapping[str, Sequence[Run]]


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Field names of `vllm bench latency` (seconds), then medians by round (ms) and counters."""
    seconds = [run.seconds for run in runs]
    rounds = []
    for index, sample in enumerate(runs[0].rounds):
        timings = [run.rounds[index].timings.as_dict() for run in runs]
        median = {p: statistics.median(t[p] for t in timings) for p in PHASES}
        later = max(len(sample.token_ids) - 1, 1)
        rounds.append(
            {
                "index": index,
                "num_frames": len(sample.frame_indices),
                "prompt_tokens": sample.prompt_tokens,
                "completion_tokens": len(sample.token_ids),
                "timings_ms": {phase: round(ms, 2) for phase, ms in median.items()},
                # of `vllm bench serve`: time per output token after the first
                "tpot_ms": round((median["total"] - median["ttft"]) / later, 3),
                "reuse": None if sample.reuse is None else sample.reuse.as_dict(),
            }
        )
    tokens = sum(len(sample.token_ids) for sample in runs[0].rounds)
    return {
        **latencies(seconds),
        "output_throughput": tokens / statistics.median(seconds),
        "rounds": rounds,
    }


def comparisons(runs: Runs, pairs: Iterable[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """Ours against peers by median; pairs: names of both, and whether both do the same work.

    first_round_speedup: of the first rounds alone, in which nothing is reused (None where they took
    no time). same_work: as the pairs say; differences: where two that should do the same did not, a
    text for each difference; equal_tokens, first_difference: by round, of those that show the same
    frames.
    """
    found = []
    for name, peer, same_work in pairs:
        ours, theirs = (runs[side][0].rounds for side in (name, peer))
        both = list(zip(theirs, ours, strict=True))
        same_frames = all(a.frame_indices == b.frame_indices for a, b in both)
        parts = [_first_difference(a.token_ids, b.token_ids) for a, b in both]
        times = (statistics.median(run.seconds for run in runs[side]) for side in (name, peer))
        taken, base = times
        first, first_base = (
            statistics.median(run.rounds[0].timings.total for run in runs[side])
            for side in (name, peer)
        )
        found.append(
            {
                "name": name,
                "baseline": peer,
                "time_ratio": taken / base,
                "speedup": base / taken,
                "first_round_speedup": first_base / first if first else None,
                "same_work": same_work,
                "differences": _differences(both) if same_work else None,
                "same_frames": same_frames,
                "equal_tokens": [part is None for part in parts] if same_frames else None,
                "first_difference": parts if same_frames else None,
            }
        )
    return found


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two lists of tokens part."""
    if list(a) == list(b):
        return None
    tokens = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in tokens if x != y), min(len(a), len(b)))


def _differences(both: Sequence[tuple[RoundSample, RoundSample]]) -> list[str]:
    """What two sides (theirs, ours) did not do alike, in words."""
    found = []
    for number, (theirs, ours) in enumerate(both, 1):
        for what, a, b in (
            ("frames", theirs.frame_indices, ours.frame_indices),
            ("sizes", sorted(set(theirs.sizes)), sorted(set(ours.sizes))),
            ("prompt tokens", theirs.prompt_tokens, ours.prompt_tokens),
            ("generated tokens", len(theirs.token_ids), len(ours.token_ids)),
        ):
            if a != b:
                found.append(f"{what} of round {number}: {a} and {b}")
    return found


def print_table(result: dict[str, Any]) -> None:
    """The result for people: a row a round, then a sentence a contender and a comparison."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for run in result["runs"]:
        console.print(_table(result, run))
        for name, contender in run["contenders"].items():
            low, high = contender["min_latency"], contender["max_latency"]
            rate = contender["output_throughput"]
            median = contender["median_latency"]
            console.print(f"{name}: {median:.2f} s ({low:.2f} to {high:.2f}), {rate:.1f} tokens/s")
        for comparison in run["comparisons"]:
            console.print(sentence(comparison))


def _table(result: dict[str, Any], run: dict[str, Any]) -> Any:
    from rich.table import Table

    machine, setting = result["hardware"], result["setting"]
    table = Table(
        title=f"{result['model_id']}, {run['dtype']}, {setting['video']} video, {machine['cpu']}, "
        f"{machine['threads']} threads: medians in ms",
    )
    table.add_column("")
    for name in ("round", *PHASES, "prefilled", "reused", "pairs", "decoded"):
        table.add_column(name, justify="right")
    for name, contender in run["contenders"].items():
        for entry in contender["rounds"]:
            reuse = entry["reuse"] or {}
            table.add_row(
                name if entry["index"] == 0 else "",
                str(entry["index"] + 1),
                *(f"{entry['timings_ms'][phase]:.0f}" for phase in PHASES),
                str(reuse.get("tokens_prefilled", entry["prompt_tokens"])),
                str(reuse.get("tokens_reused", 0)),
                str(reuse.get("pairs_encoded", (entry["num_frames"] + 1) // 2)),
                str(reuse.get("frames_decoded", entry["num_frames"])),
                end_section=entry is contender["rounds"][-1],
            )
    return table


def sentence(comparison: dict[str, Any]) -> str:
    """One comparison in words: how much faster, and whether both did the same."""
    if not comparison["same_work"]:
        work = "same spans, but other frames and another prompt"
    elif comparison["differences"]:
        work = f"not the same work: {'; '.join(comparison['differences'])}"
    else:
        work = "same frames, sizes and prompt tokens"
    parts = comparison["first_difference"]
    if comparison["same_work"] and parts is not None:
        rounds = (f"{i + 1} from token {p + 1} on" for i, p in enumerate(parts) if p is not None)
        differing = ", ".join(rounds)
        work += f"; tokens differ in round {differing}" if differing else "; every token equal"
    return (
        f"{comparison['name']} against {comparison['baseline']}: {comparison['speedup']:.2f} times "
        f"as fast, {comparison['time_ratio']:.2f} of the time; the first round alone "
        f"{comparison['first_round_speedup'] or 0.0:.2f} times as fast ({work})"
    )
