"""`vtts-rt train tiny`: make the embedded model from nothing, in three stages, and write the
questions of the fourth, `vtts-rt train grpo` (grpo.yaml)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from tiny.recipe import NUM_CLIPS, NUM_QUESTIONS
from tiny.stages import (
    DEFAULT_STEPS,
    STAGES,
    Recipe,
    export,
    run_language,
    run_sketch,
    run_vision,
    write_questions,
)
from vtts_rt.checks import CommandParser
from vtts_rt.types import require

_RUNS = {"vision": run_vision, "sketch": run_sketch, "language": run_language}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="vtts-rt train",
        description="Supervised training of the embedded model `tiny` on needle clips. A run that "
        "was interrupted goes on where its last checkpoint left it; the same seed gives the same "
        "weights.",
    )
    parser.add_argument("task", choices=["tiny"])
    parser.add_argument("folder", type=Path, help="checkpoints and log go here")
    parser.add_argument("--stage", choices=(*STAGES, "export", "questions", "all"), default="all")
    steps = ", ".join(f"{name} {count}" for name, count in DEFAULT_STEPS.items())
    parser.add_argument("--steps", type=int, help=f"of the stage (default: {steps})")
    parser.add_argument("--stop-after", type=int, metavar="N", help="leave after step N")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--clips", type=int, default=NUM_CLIPS, help="of the last stage")
    parser.add_argument(
        "--wide",
        type=int,
        default=1,
        metavar="K",
        help="last stage and export of the baseline: one round with K times the frames",
    )
    parser.add_argument(
        "--questions", type=int, default=NUM_QUESTIONS, help="of GRPO, each about a clip"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--threads", type=int, default=1, help="of the training process")
    parser.add_argument("--out", type=Path, help="write the checkpoint here (default FOLDER/model)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(argv)
    for name in ("steps", "stop_after"):
        value = getattr(args, name)
        require("train tiny", name, value, value is None or value >= 1, ">= 1")
    require("train tiny", "clips", args.clips, args.clips >= 16, ">= 16")
    require("train tiny", "questions", args.questions, args.questions >= 1, ">= 1")
    require("train tiny", "wide", args.wide, 1 <= args.wide <= 8, "in 1..8")
    require("train tiny", "workers", args.workers, args.workers >= 0, ">= 0")
    require("train tiny", "threads", args.threads, args.threads >= 1, ">= 1")
    one_stage = args.stage in STAGES
    alone = one_stage or (args.steps is None and args.stop_after is None)
    require("train tiny", "stage", args.stage, alone, "one stage when steps are given")
    logging.getLogger("vtts_rt").setLevel(logging.INFO)
    torch.set_num_threads(args.threads)
    logging.getLogger("tiny").setLevel(logging.INFO)
    recipe = Recipe(args.folder, args.seed, args.clips, args.workers, wide=args.wide)
    for stage in STAGES:
        if args.stage in (stage, "all"):
            _RUNS[stage](recipe, args.steps, args.stop_after)
    if args.stage in ("export", "all"):
        export(recipe, args.out or args.folder / f"model{recipe.suffix}")
    if args.stage in ("questions", "all"):
        manifest = write_questions(recipe, args.questions)
        print(f"written: {manifest}; next: vtts-rt train grpo --config bench/tiny/grpo.yaml")
    return 0
