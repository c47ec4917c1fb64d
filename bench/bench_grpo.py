"""A whole GRPO iteration of needle, told by phase: rollouts, weights, log-probabilities, the step.

    python bench/bench_grpo.py [--model M] [--groups N] [--members G] [--rounds K] [--steps N]

Every step rolls out new groups, so that a step is an iteration. The first one, in which memory is
taken and nothing is cached, is left out; rows are of new clips until all have been seen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from vtts_rt import bench
from vtts_rt.bench.model import allow_broken_torchvision
from vtts_rt.bench.setting import (
    add_compute_flags,
    add_output_flags,
    check_compute,
    command_line,
    origin,
)
from vtts_rt.data.needle import write_needle
from vtts_rt.data.rows import DataSet, write_manifest
from vtts_rt.types import require

# Phase -> TRL's or our metric; all of an iteration is TRL's step_time and the optimizer's part.
PHASES = {
    "rollout": "seconds/rollout",
    "weight_push": "seconds/weights",
    "old_logprobs": "seconds/scores",
    "step": "seconds/step",
    "iteration": "step_time",
}
COUNTS = ("frames_decoded", "pairs_encoded", "tokens_prefilled")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="tiny", help="tiny or a directory")
    add("--groups", type=int, default=2, help="of an iteration")
    add("--members", type=int, default=8, help="of a group")
    add("--rounds", type=int, default=3)
    add("--max-tokens", type=int, default=64, help="of a round")
    add("--steps", type=int, default=10)
    add("--clips", type=int, default=6, help="of needle, three or four rows each")
    add_compute_flags(parser, dtypes=())
    add_output_flags(parser)


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "grpo"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result (the JSON file's content)."""
    from vtts_rt.train.grpo import GrpoRecipe, run

    allow_broken_torchvision()
    check_compute(args)
    require("bench", "steps", args.steps, args.steps >= 2, ">= 2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_needle(folder / "clips", 0, args.clips)
        sets = [DataSet("needle", "video", "gqa", Path("clips"), Path("clips/rows.json"))]
        write_manifest(folder / "manifest.json", sets)
        recipe = GrpoRecipe(
            model=args.model,
            manifest=folder / "manifest.json",
            output=folder / "run",
            rewards={"answer": 1.0, "clue_spans": 0.5, "clue_boxes": 0.5},
            perception={"max_rounds": args.rounds},
            max_tokens=args.max_tokens,
            grpo={
                "num_generations": args.members,
                "per_device_train_batch_size": args.members * args.groups,
                "max_steps": args.steps,
                "save_strategy": "no",
                "report_to": "none",
                "gradient_checkpointing": False,
                "use_cpu": args.device == "cpu",
            },
        )
        steps = [entry for entry in run(recipe) if "loss" in entry][1:]
    flags = ("model", "groups", "members", "rounds", "max_tokens", "steps", "clips")
    return {
        "bench": theme(args),
        "command": command_line("grpo", args, (*flags, "device", "threads")),
        **origin(args.threads),
        "setting": {name: getattr(args, name) for name in flags},
        "seconds": {
            phase: round(statistics.median(entry[name] for entry in steps), 4)
            for phase, name in PHASES.items()
        },
        "of_a_group": {
            name: round(statistics.fmean(entry[f"group/{name}"] for entry in steps), 1)
            for name in COUNTS
        },
        "tokens_said": round(statistics.fmean(e["completions/mean_length"] for e in steps), 1),
        "worst_logprob": max(e["sampling/sampling_logp_difference/max"] for e in steps),
    }


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("phase", "seconds")
    for phase, seconds in result["seconds"].items():
        table.add_row(phase.replace("_", " "), f"{seconds:.3f}")
    console = Console()
    console.print(table)
    console.print(f"of a group: {result['of_a_group']}", highlight=False)


if __name__ == "__main__":
    sys.exit(bench.script(sys.modules[__name__]))
