"""What training brought: models by rounds, strategies, more frames at once, curves; filed.

python bench/bench_training.py --work DIR --model NAME=FOLDER [--model ...] [--wide K=FOLDER ...]
[--strategies NAME] [--strategies-num N] [--curve NAME=FILE:KEY,KEY ...] [--num N] [--seed S]
[--rounds K]

All are asked about the same held-out clips of graded difficulty, which are encoded once and kept in
DIR beside the result of every clip: a run that was killed goes on. `--wide` is the baseline, one
round with K times the frames. The first model is what the others are compared with. A curve's file
is a stage's log.jsonl or the trainer_state.json of a GRPO run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    dtype_of,
    origin,
    results_name,
    write_result,
)
from vtts_rt.config import STRATEGIES, PerceptionConfig, RuntimeConfig
from vtts_rt.evaluation.needle import evaluate
from vtts_rt.evaluation.records import Record, compare, read_records
from vtts_rt.perception.layout import labelled_pairs
from vtts_rt.perception.strategy import find_strategy
from vtts_rt.runtime import Runtime
from vtts_rt.types import StrategyName, require

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
        return result, records


def measure(
    evaluation: Evaluation,
    models: dict[str, str],
    wide: dict[int, str],
    strategies: str | None,
    max_rounds: int,
    strategies_num: int | None = None,
) -> dict[str, Any]:
    """{"models", "strategies", "wide", "comparisons"} of the result.

    models: name -> folder, the first is what the others are compared with, at every number of
    rounds. wide: times the frames -> folder, compared with each model at so many rounds.
    strategies: the model that is asked in the others, too, about strategies_num clips.
    """
    rounds = list(range(1, max_rounds + 1))
    found: dict[str, Any] = {"models": {}, "strategies": {}, "wide": {}, "comparisons": []}
    records: dict[str, list[Record]] = {}

    def compared(less: str, rounds_less: int, more: str, rounds_more: int) -> None:
        sides = {"less": less, "rounds_less": rounds_less, "more": more, "rounds_more": rounds_more}
        values = compare(records[less], rounds_less, records[more], rounds_more)
        found["comparisons"].append({**sides, **values})

    for name, folder in models.items():
        found["models"][name], records[name] = evaluation.run(name, folder, rounds)
    first, *others = models
    for name in others:
        for count in rounds:
            compared(first, count, name, count)
    for times, folder in wide.items():
        key = f"{times} times the frames"
        found["wide"][str(times)], records[key] = evaluation.run(f"wide{times}", folder, [1])
        for name in models:
            if times <= max_rounds:
                compared(key, 1, name, times)
    if strategies is not None:
        for strategy in STRATEGIES:
            name = f"{strategies}_{strategy}"
            result, _ = evaluation.run(name, models[strategies], rounds, strategy, strategies_num)
            found["strategies"][strategy] = result
    return found


def curve(path: Path, keys: Sequence[str]) -> list[dict[str, float]]:
    """At most POINTS lines {"step", key: value} of a training log, evenly spread, the last one too.

    path: JSON lines, each with "step", or a trainer_state.json of transformers. Lines without any
    of the keys are left out; a stage's lines of a resumed run replace those of the same step.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        lines = json.loads(text)["log_history"]
    else:
        lines = [json.loads(line) for line in text.splitlines()]
    by_step = {line["step"]: line for line in lines if any(key in line for key in keys)}
    require("bench_training", f"curve {path}", keys, bool(by_step), "keys that the log has")
    steps = sorted(by_step)
    num = min(POINTS, len(steps))
    chosen = sorted({steps[(i + 1) * len(steps) // num - 1] for i in range(num)})
    return [
        {"step": step, **{k: round(by_step[step][k], 4) for k in keys if k in by_step[step]}}
        for step in chosen
    ]


def _named(texts: Sequence[str], what: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, _, value in pairs:
        require("bench_training", what, f"{name}={value}", bool(name and value), "as NAME=PATH")
    return {name: value for name, _, value in pairs}


def _curves(texts: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    found = {}
    for name, value in _named(texts, "curve").items():
        path, _, keys = value.rpartition(":")
        require("bench_training", "curve", f"{name}={value}", bool(path), "as NAME=FILE:KEY,KEY")
        found[name] = curve(Path(path), keys.split(","))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    more: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--work", type=Path, required=True, help="clips and records are kept here")
    parser.add_argument("--model", **more, metavar="NAME=FOLDER", help="the first is the baseline")
    parser.add_argument("--wide", **more, metavar="K=FOLDER", help="of `train tiny --wide K`")
    parser.add_argument("--strategies", metavar="NAME", help="the model asked in all strategies")
    parser.add_argument("--strategies-num", type=int, default=500, help="clips (default 500)")
    parser.add_argument("--curve", **more, metavar="NAME=FILE:KEYS", help="of a training log")
    parser.add_argument("--rounds", type=int, default=5, help="most rounds (default 5)")
    parser.add_argument("--seed", type=int, default=50000, help="of the first clip")
    parser.add_argument("--num", type=int, default=2000, help="clips (default 2000)")
    parser.add_argument("--result-dir", type=Path, default=RESULTS)
    add_compute_flags(parser, threads=1)
    args = parser.parse_args(argv)
    check_compute(args)
    what = "bench_training"
    models, wide = _named(args.model, "model"), _named(args.wide, "wide")
    require(what, "model", args.model, bool(models), "given at least once")
    require(what, "wide", args.wide, all(k.isdigit() for k in wide), "as K=FOLDER")
    known = args.strategies is None or args.strategies in models
    require(what, "strategies", args.strategies, known, "the name of a model")
    curves = _curves(args.curve)
    dtype = dtype_of(args, "tiny")
    config = RuntimeConfig(threads=args.threads)

    def runtime_of(folder: str) -> Runtime:
        return Runtime.from_pretrained(folder, dtype=dtype, device=args.device, config=config)

    evaluation = Evaluation(args.work, args.seed, args.num, runtime_of)
    baselines = {int(times): folder for times, folder in wide.items()}
    num = min(args.num, args.strategies_num)
    found = measure(evaluation, models, baselines, args.strategies, args.rounds, num)
    setting = {"task": "training", "num": args.num, "seed": args.seed, "split": "held_out"}
    write_result(
        args.result_dir / results_name("training"),
        {**origin(args.threads), "dtype": dtype, **setting, **found, "curves": curves},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
