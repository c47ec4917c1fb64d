"""What training brought: models by rounds, strategies, more frames at once, curves; filed.

python bench/bench_training.py --work DIR --model NAME=FOLDER [--model ...] [--wide K=FOLDER ...]
[--strategies NAME] [--strategies-num N] [--curve NAME=FILE[@STAGE]:KEY,KEY ...] [--num N]
[--seed S] [--rounds K]

All are asked about the same held-out clips of graded difficulty, which are encoded once and kept in
DIR beside the result of every clip: a run that was killed goes on. `--wide` is the baseline, one
round with K times the frames. Each model is compared with those before it. A curve's file is
the log.jsonl of `train tiny`, or the folder of a GRPO run, whose latest checkpoint has its log.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from report.results import Result
from report.training import TABLES

from vtts_rt import bench
from vtts_rt.bench.setting import (
    add_compute_flags,
    add_output_flags,
    check_compute,
    dtype_of,
    origin,
)
from vtts_rt.checks import is_number
from vtts_rt.config import STRATEGIES, PerceptionConfig, RuntimeConfig
from vtts_rt.evaluation.needle import evaluate
from vtts_rt.evaluation.records import Record, compare, read_records
from vtts_rt.perception.layout import labelled_pairs
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.runtime import Runtime
from vtts_rt.types import StrategyName, require

WHAT = "bench_training"
RESULTS = Path(__file__).resolve().parent / "results"
POINTS = 12  # of a curve


@dataclass
class Evaluation:
    """Runs on the same clips, each kept in `work`. runtime_of: loads a model's folder."""

    work: Path
    seed: int
    num: int
    runtime_of: Callable[[str], Runtime]

    def run(
        self,
        name: str,
        folder: str,
        rounds: Sequence[int],
        strategy: StrategyName | None = None,
        num: int | None = None,
    ) -> tuple[dict[str, Any], list[Record]]:
        """Result of `evaluate`, on the first `num` clips, and its records."""
        # The wording of the embedded model says nothing of the last round (`together`).
        at_once = strategy is None or find_strategy(strategy).lay_out is labelled_pairs
        num = self.num if num is None else num
        out = self.work / f"{name}.jsonl"
        with self.runtime_of(folder) as runtime:
            result = evaluate(
                runtime,
                seed=self.seed,
                num=num,
                rounds=rounds,
                perception=PerceptionConfig(strategy=strategy),
                together=at_once,
                progress=sys.stderr.isatty(),
                difficulty="graded",
                clips=self.work / "clips",
                out=out,
            )
        records = [r for r in read_records(out)[1] if self.seed <= r["seed"] < self.seed + num]
        return {**result, "model": Path(folder).name}, records


def compared(
    evaluation: Evaluation,
    models: dict[str, str],
    wide: dict[int, str],
    strategies: str | None,
    max_rounds: int,
    strategies_num: int | None = None,
) -> dict[str, Any]:
    """{"models", "strategies", "wide", "comparisons"} of the result.

    models: name -> folder; each is compared with those before it, at every number of rounds.
    wide: times the frames -> folder, compared with each model at so many rounds. strategies: the
    model that is asked in the others, too, about strategies_num clips.
    """
    rounds = list(range(1, max_rounds + 1))
    found: dict[str, Any] = {"models": {}, "strategies": {}, "wide": {}, "comparisons": []}
    records: dict[str, list[Record]] = {}

    def pair(less: str, rounds_less: int, more: str, rounds_more: int) -> None:
        sides = {"less": less, "rounds_less": rounds_less, "more": more, "rounds_more": rounds_more}
        values = compare(records[less], rounds_less, records[more], rounds_more)
        found["comparisons"].append({**sides, **values})

    for name, folder in models.items():
        found["models"][name], records[name] = evaluation.run(name, folder, rounds)
    for less, more in combinations(models, 2):
        for count in rounds:
            pair(less, count, more, count)
    for times, folder in wide.items():
        key = f"{times} times the frames"
        found["wide"][str(times)], records[key] = evaluation.run(f"wide{times}", folder, [1])
        for name in models:
            pair(key, 1, name, times)
    if strategies is not None:
        for strategy in STRATEGIES:
            name = f"{strategies}_{strategy}"
            result, _ = evaluation.run(name, models[strategies], rounds, strategy, strategies_num)
            found["strategies"][strategy] = result
    return found


def curve(path: Path, keys: Sequence[str], stage: str = "") -> list[dict[str, float]]:
    """At most POINTS lines {"step", key: value} of a training log, evenly spread, the last one too;
    each value is the mean since the line before, as a single step's is of few answers.

    path: JSON lines, each with "step", or a trainer_state.json of transformers. stage: whose lines
    count where a file has those of several; "" is `language`, the stage that is exported, or else
    the last one. Lines without any of the keys are left out; lines of a resumed run replace those
    of the same step.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        lines = json.loads(text)["log_history"]
    else:
        lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if any(key in line for key in keys)]
    stages = list(dict.fromkeys(line.get("stage", "") for line in lines))
    require(WHAT, f"curve {path}", keys, bool(stages), "of keys that the log has")
    stage = stage or ("language" if "language" in stages else stages[-1])
    require(WHAT, f"curve {path}", stage, stage in stages, f"of a stage of {', '.join(stages)}")
    by_step = {line["step"]: line for line in lines if line.get("stage", "") == stage}
    steps = sorted(by_step)
    unknown = [key for key in keys if not any(key in line for line in by_step.values())]
    require(WHAT, f"curve {path}", unknown, not unknown, "of keys that the log has")
    num = min(POINTS, len(steps))
    found: list[dict[str, float]] = []
    for i in range(num):
        own = steps[i * len(steps) // num : (i + 1) * len(steps) // num]
        values: dict[str, list[float]] = defaultdict(list)
        for line in map(by_step.__getitem__, own):
            for key in keys:
                if is_number(line.get(key)) and math.isfinite(line[key]):
                    values[key].append(line[key])
        means = {key: round(fmean(values[key]), 4) for key in keys if key in values}
        found.append({"step": own[-1], **means})
    return found


def _named(texts: Sequence[str], what: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, _, value in pairs:
        require(WHAT, what, f"{name}={value}", bool(name and value), "as NAME=PATH")
    names = [name for name, _, _ in pairs]
    require(WHAT, what, names, len(set(names)) == len(names), "of names that differ")
    return {name: value for name, _, value in pairs}


def _curves(texts: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    found = {}
    for name, value in _named(texts, "curve").items():
        path, _, keys = value.rpartition(":")
        require(WHAT, "curve", f"{name}={value}", bool(path), "as NAME=FILE:KEY,KEY")
        stage = ""
        if not Path(path).exists():
            path, _, stage = path.rpartition("@")
        file = Path(path)
        if path and file.is_dir():
            made = {int(c.name.split("-")[1]): c for c in file.glob("checkpoint-[0-9]*")}
            file = made[max(made)] / "trainer_state.json" if made else file
        require(WHAT, "curve", f"{name}={value}", file.is_file(), "of a log that is there")
        found[name] = curve(file, keys.split(","), stage)
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    more: dict[str, Any] = {"action": "append", "default": []}
    add("--work", type=Path, required=True, help="clips and records are kept here")
    add("--model", **more, metavar="NAME=FOLDER", help="each is compared with those before it")
    add("--wide", **more, metavar="K=FOLDER", help="of `train tiny --wide K`")
    add("--strategies", metavar="NAME", help="the model asked in all strategies")
    add("--strategies-num", type=int, default=500, help="clips (default 500)")
    add("--curve", **more, metavar="NAME=FILE[@STAGE]:KEYS", help="of a training log")
    add("--rounds", type=int, default=5, help="most rounds (default 5)")
    add("--seed", type=int, default=50000, help="of the first clip")
    add("--num", type=int, default=2000, help="clips (default 2000)")
    add_compute_flags(parser, threads=1)
    add_output_flags(parser)
    parser.set_defaults(result_dir=RESULTS)


def theme(args: argparse.Namespace) -> str:
    """What its result is filed under."""
    return "training"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The result (the JSON file's content)."""
    check_compute(args)
    models, wide = _named(args.model, "model"), _named(args.wide, "wide")
    require(WHAT, "model", args.model, bool(models), "given at least once")
    ok = all(k.isdecimal() and 1 <= int(k) <= args.rounds for k in wide)
    require(WHAT, "wide", args.wide, ok, f"as K=FOLDER, K in 1..{args.rounds}")
    known = args.strategies is None or args.strategies in models
    require(WHAT, "strategies", args.strategies, known, "the name of a model")
    for name in ("rounds", "num", "strategies_num"):
        require(WHAT, name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    curves = _curves(args.curve)
    dtype = dtype_of(args, "tiny")
    config = RuntimeConfig(threads=args.threads)

    def runtime_of(folder: str) -> Runtime:
        return Runtime.from_pretrained(folder, dtype=dtype, device=args.device, config=config)

    evaluation = Evaluation(args.work, args.seed, args.num, runtime_of)
    baselines = {int(times): folder for times, folder in wide.items()}
    num = min(args.num, args.strategies_num)
    return {
        "bench": theme(args),
        **origin(args.threads),
        "dtype": dtype,
        **{"task": "training", "num": args.num, "seed": args.seed, "split": "held_out"},
        **compared(evaluation, models, baselines, args.strategies, args.rounds, num),
        "curves": curves,
    }


def print_table(result: dict[str, Any]) -> None:
    """The tables of the report."""
    shown = Result(Path("result.json"), "training", "", "", result)
    for table_theme, render in TABLES.values():
        if table_theme == shown.theme:
            print(render(shown))


if __name__ == "__main__":
    sys.exit(bench.script(sys.modules[__name__]))
