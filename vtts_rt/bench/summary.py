"""What the runs of the rounds bench come to: summaries, comparisons, and a table for people."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vtts_rt.bench.peer import RoundSample
from vtts_rt.bench.setting import latencies

PHASES = ("decode", "preprocess", "vision", "prefill", "generate", "total", "ttft")


class Run(Protocol):
    """A question that was run: seconds from opening the file to the last token, its rounds."""

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


def comparisons(runs: Runs) -> list[dict[str, Any]]:
    """Every contender against the first one, by median."""
    baseline, *others = runs
    base = median_seconds(runs[baseline])
    found = []
    for name in others:
        pairs = list(zip(runs[baseline][0].rounds, runs[name][0].rounds, strict=False))
        same = len(pairs) == len(runs[baseline][0].rounds) == len(runs[name][0].rounds)
        same = same and all(a.frame_indices == b.frame_indices for a, b in pairs)
        found.append(
            {
                "name": name,
                "baseline": baseline,
                "time_ratio": median_seconds(runs[name]) / base,
                "speedup": base / median_seconds(runs[name]),
                "same_frames": same,
                "equal_tokens": [a.token_ids == b.token_ids for a, b in pairs] if same else None,
            }
        )
    return found


def ratios(
    runs: Runs, peers: Sequence[str], strategies: Sequence[str], again: str
) -> dict[str, Any]:
    """What the comparison comes to, by name.

    speedup: strategy -> peer -> peer's median time over ours, all rounds. round_1_time_ratio:
    strategy -> peer -> our median of the first round over the peer's. same_question_again:
    strategy -> the most of each counter in a round of the warm run.
    """
    result: dict[str, Any] = {"speedup": {}, "round_1_time_ratio": {}, "same_question_again": {}}
    for strategy in strategies:
        ours = runs[strategy]
        result["speedup"][strategy] = {
            peer: median_seconds(runs[peer]) / median_seconds(ours) for peer in peers
        }
        result["round_1_time_ratio"][strategy] = {
            peer: _first_round(ours) / _first_round(runs[peer]) for peer in peers
        }
        reuse = [r.reuse for run in runs.get(strategy + again, ()) for r in run.rounds]
        counters = ("frames_decoded", "pairs_encoded", "tokens_prefilled")
        result["same_question_again"][strategy] = {
            counter: max((getattr(r, counter) for r in reuse if r is not None), default=None)
            for counter in counters
        }
    return result


def median_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def _first_round(runs: Sequence[Run]) -> float:
    return statistics.median(run.rounds[0].timings.total for run in runs)


def token_agreement(
    name: str, theirs: Sequence[RoundSample], baseline: str, ours: Sequence[RoundSample]
) -> dict[str, Any]:
    """Where the generated tokens of two sides part: by round None, or the first index."""
    both = list(zip(theirs, ours, strict=True))
    parts = []
    for a, b in both:
        tokens = enumerate(zip(a.token_ids, b.token_ids, strict=True))
        parts.append(next((index for index, (x, y) in tokens if x != y), None))
    return {
        "name": name,
        "baseline": baseline,
        "equal_tokens": [part is None for part in parts],
        "first_difference": parts,
        "equal_prompt_tokens": [a.prompt_tokens == b.prompt_tokens for a, b in both],
    }


def print_table(result: dict[str, Any]) -> None:
    """The result for people: a row a round, then a sentence a contender."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)
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
        rate = contender["output_throughput"]
        median = contender["median_latency"]
        console.print(f"{name}: {median:.2f} s ({low:.2f} to {high:.2f}), {rate:.1f} tokens/s")
    for comparison in result["comparisons"]:
        console.print(_sentence(comparison))
    for agreement in result["token_agreement"]:
        parts = ["all" if p is None else f"up to {p}" for p in agreement["first_difference"]]
        equal = ", ".join(parts)
        console.print(f"tokens of {agreement['name']} and {agreement['baseline']} equal: {equal}")


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
        f"{comparison['name']}: {comparison['time_ratio']:.2f} of the time of "
        f"{comparison['baseline']}, {comparison['speedup']:.2f} times as fast ({frames})"
    )
