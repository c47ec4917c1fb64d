"""`vtts-rt rollout`: rollout groups of the rows of a manifest, written to a journal."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

from vtts_rt.checks import CommandParser, check
from vtts_rt.types import require

_LEAST = {"num_answers": 2, "max_groups": 1, "epochs": 1, "workers": 1, "limit": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Sample groups until the manifest is through; returns the exit status: 2 for a user's mistake.
    RuntimeError where groups failed, or there was none; the others are in the journal."""
    from vtts_rt.data.command import tell_bad
    from vtts_rt.data.rows import BadRows

    parser = CommandParser(prog="vtts-rt rollout", description=(__doc__ or "").split("\n")[0])
    _add_flags(parser)
    args = parser.parse_args(argv)
    for name, least in _LEAST.items():
        value = getattr(args, name)
        require("rollout", name, value, value is None or value >= least, f"{least} or more")
    try:
        return asyncio.run(_run(args))
    except BadRows as error:
        return tell_bad("rollout", error)
    except KeyboardInterrupt:
        print(f"interrupted; go on with --resume --out {args.out}", file=sys.stderr)
        return 130


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", type=Path, help="data sets (docs/feed.md)")
    add("--out", type=Path, required=True, metavar="JOURNAL", help="file of finished groups")
    add("--num-answers", type=int, default=8, metavar="G", help="members of a group")
    add("--resume", action="store_true", help="go on with JOURNAL, if it is there")
    add("--epochs", type=int, default=1, help="times that every row comes up")
    add("--limit", type=int, metavar="N", help="end after so many groups")
    add("--max-groups", type=int, default=4, help="in flight at a time, in each worker")
    add("--workers", type=int, default=1, help="processes, each with a runtime")
    add("--shuffle-seed", type=int, help="order of the rows; unset: the manifest's")
    add("--model", default="tiny", help="tiny, a directory, or a hub id")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--device", default="auto", help="auto, cpu or cuda[:n]")
    add("--threads", type=int, default=0, help="CPU threads (0: as they are)")
    add("--strategy", help="official, grid, refresh or append; unset: the model's")
    add("--rounds", dest="max_rounds", type=int, metavar="K", help="looks at the video")
    add("--sample-fps", type=float, metavar="F")
    add("--max-frames", type=int, metavar="N")
    add("--total-pixels", type=int, metavar="N")
    add("--min-pixels", type=int, metavar="N")
    add("--temperature", type=float, metavar="T", help="above 0 (1)")
    add("--max-tokens", type=int, metavar="N", help="per round (2048, cut to what fits)")
    add("--timeout-seconds", type=float, help="a member stops with what it has")
    add(
        "--reward",
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help="may be repeated; `published`: those of each row's task",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out rows that cannot be taken, rewarded or read",
    )
    add("--fsync-seconds", type=float, default=0.0, help="see RolloutJournal (0: every group)")


def _weight(text: str) -> tuple[str, float]:
    from vtts_rt.rollout.rewards import BY_TASK, find_reward

    name, _, number = (text if text != BY_TASK else f"{text}=1").partition("=")
    if name != BY_TASK:
        find_reward(name)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    require("rollout", "reward", text, math.isfinite(value), "NAME=WEIGHT with a finite number")
    return name, value


async def _run(args: argparse.Namespace) -> int:
    from vtts_rt.cli import made_of
    from vtts_rt.cluster import RolloutCluster
    from vtts_rt.config import PerceptionConfig
    from vtts_rt.data.command import tell_bad
    from vtts_rt.data.feed import RolloutDataFeed
    from vtts_rt.data.rows import BadRows
    from vtts_rt.rollout.engine import RolloutEngine
    from vtts_rt.rollout.journal import JOURNAL_RULES, RolloutJournal
    from vtts_rt.rollout.rewards import check_rewards, score_group
    from vtts_rt.rounds.ask import ASK_RULES
    from vtts_rt.rounds.rollouts import check_sampling
    from vtts_rt.types import SamplingParams
    from vtts_rt.video import FrameStore
    from vtts_rt.workers import ProcessWorker

    weights: dict[str, float] = {}
    for name, weight in map(_weight, args.reward):
        require("rollout", "reward", name, name not in weights, "named once")
        weights[name] = weight

    def score(group: Any, item: Any) -> Any:
        return score_group(group, item.row, weights, item.task)

    def check_row(row: Any, task: str) -> None:
        check_rewards("row", weights, row, task, is_sized=False)

    for rules, name in ((ASK_RULES, "timeout_seconds"), (JOURNAL_RULES, "fsync_seconds")):
        check("rollout", rules, {name: getattr(args, name)})
    perception = made_of(PerceptionConfig, args)
    sampling = made_of(SamplingParams, args)
    check_sampling("rollout", sampling)
    ask = {"perception": repr(perception), "sampling": repr(sampling)}
    made_with = {"num_answers": args.num_answers, **ask}
    made_with |= {"rewards": weights} if weights else {}
    with ExitStack() as stack:
        make = partial(_runtime, args.model, args.dtype, args.device, args.threads)
        sampler: Any
        store = None
        if args.workers > 1:
            workers = [ProcessWorker(make) for _ in range(args.workers)]
            sampler = stack.enter_context(RolloutCluster(workers))
            sampler.perception(perception)  # a model that does not load is told here
            frames: Any = 1  # decoded by the workers
            made_with["model"] = sampler.weights_hash()
        else:
            store = FrameStore(1 << 30)
            sampler = stack.enter_context(make(store))
            frames = sampler.perception(perception)
            made_with["model"] = sampler.engine.model.weights_hash()
        feed = RolloutDataFeed(
            args.manifest,
            frames=frames,
            shuffle_seed=args.shuffle_seed,
            frame_store=store,
            on_bad="skip" if args.skip_bad else "raise",
            check_row=check_row if weights else None,
        )
        engine = partial(
            RolloutEngine,
            sampler,
            args.num_answers,
            max_groups=args.max_groups * args.workers,
            perception=perception,
            sampling=sampling,
            timeout_seconds=args.timeout_seconds,
            score=score if weights else None,
        )
        engine()  # what it does not take is said before the journal is there
        journal = stack.enter_context(
            RolloutJournal(
                args.out,
                resume=args.resume,
                made_with=made_with,
                fsync_seconds=args.fsync_seconds,
            )
        )
        try:
            return await _sample(args, engine(journal=journal), feed, journal)
        except BadRows as error:
            status = tell_bad("rollout", error)
            print(f"{args.out} holds what is finished; go on with --resume", file=sys.stderr)
            return status


async def _sample(args: argparse.Namespace, engine: Any, feed: Any, journal: Any) -> int:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    began, tokens, sampled = time.monotonic(), 0, 0
    failures: list[str] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as progress:
        most = args.epochs * len(feed)
        total = most if args.limit is None else min(most, len(journal) + args.limit)
        task = progress.add_task("groups", total=total, completed=len(journal))
        is_over = False
        while feed.epoch < args.epochs and not is_over:
            async with aclosing(engine.run(feed)) as groups:
                async for finished in groups:
                    sampled += 1
                    if not finished.is_complete:
                        failures.append(f"{finished.group.group_id}: {finished.failure}")
                    tokens += sum(int(row.mask.sum()) for row in finished.rows)
                    progress.update(task, advance=1)
                    is_over = sampled == args.limit or not getattr(engine.sampler, "num_workers", 1)
                    if is_over:
                        break
    seconds = time.monotonic() - began
    skipped = len(feed.skipped) + feed.stats()["rows_skipped"].get("malformed", 0)
    print(
        f"{sampled - len(failures)} groups of {args.num_answers} in {seconds:.1f} s, "
        f"{tokens / max(seconds, 1e-9):.0f} tokens/s; {len(failures)} failed, {skipped} rows "
        f"skipped; {args.out} holds {len(journal)}"
    )
    if failures:
        told = f"{len(failures)} of {sampled} groups failed, first {failures[0]}"
        raise RuntimeError(f"rollout: {told}; --resume tries them again")
    if not len(journal):
        raise RuntimeError(f"rollout: there was no group: {skipped} rows were skipped")
    return 0


def _runtime(model: str, dtype: str, device: str, threads: int, store: Any = None) -> Any:
    from vtts_rt.config import RuntimeConfig
    from vtts_rt.runtime import Runtime

    config = RuntimeConfig(threads=threads)
    return Runtime.from_pretrained(
        model, dtype=dtype, device=device, config=config, frame_store=store
    )
