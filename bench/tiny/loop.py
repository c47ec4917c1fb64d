"""The training loop: AdamW, warm-up and cosine, and checkpoints from which a run goes on exactly.

Batch i of a data set depends on (seed, i) alone and nothing in a model draws random numbers, so
a checkpoint is weights, optimizer, step and what it was made with: n steps equal k steps, a resume
and n - k steps, bit for bit with one thread.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vtts_rt.checks import check_same
from vtts_rt.files import replacing

logger = logging.getLogger(__name__)

WHAT = "train tiny"
LossFunction = Callable[[Any, float], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """steps: optimizer steps in all. learning_rate: its peak. warmup_steps: linear. min_factor:
    part of the peak that the cosine ends at. weight_decay: of matrices only. workers: processes
    that make batches (0: none). log_every, save_every: steps.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    min_factor: float = 0.02
    weight_decay: float = 0.02
    workers: int = 1
    log_every: int = 50
    save_every: int = 100


# Of LoopConfig, what changes no weight.
_FREE = ("workers", "log_every", "save_every")


def learning_rate(config: LoopConfig, step: int) -> float:
    """Of one step, from 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * warm * (config.min_factor + (1 - config.min_factor) * cosine)


def train(
    name: str,
    modules: nn.Module,
    dataset: Dataset[Any],
    loss_of: LossFunction,
    config: LoopConfig,
    folder: Path,
    stop_after: int | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train until `config.steps`, going on from the stage's checkpoint in `folder` if any.

    modules: everything that learns. dataset: batch i at index i. loss_of(batch, progress): loss
    and skills of a batch; progress runs from 0 to 1. stop_after: leave after this many steps in
    all, with a checkpoint (to be resumed). made_with: JSON values that say what the weights depend
    on beside `config`; ValueError for a checkpoint of others, or of another config, with the first
    that differs. One of a version that kept none is taken as it is.

    Returns the mean skills since the last log line. Each log line in `folder`/log.jsonl has the
    skills, and the wall time of all runs of the stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    parameters = list(modules.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # 0.98: gradients of rare events (a mark in one token of a hundred) need a short memory.
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    step, elapsed = 0, 0.0
    own = {k: v for k, v in asdict(config).items() if k not in _FREE}
    made = {**(made_with or {}), **own}
    if path.is_file():
        state = torch.load(path, weights_only=True)
        check_same(WHAT, path, state.get("made_with", {}), made)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = int(state["step"]), float(state["elapsed"])
        logger.info("%s: going on from step %d", name, step)
    end = config.steps if stop_after is None else min(stop_after, config.steps)
    skills: dict[str, list[float]] = defaultdict(list)
    means: dict[str, float] = {}
    began = time.monotonic() - elapsed  # of all runs, up to their last checkpoints
    for batch in _batches(dataset, step, end, config.workers):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, found = loss_of(batch, step / config.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        for key, value in found.items():
            if not math.isnan(value):
                skills[key].append(value)
        if step % config.log_every == 0 or step == end:
            means = {key: sum(values) / len(values) for key, values in skills.items()}
            skills.clear()
            _log(folder, name, step, time.monotonic() - began, means)
        if step % config.save_every == 0 or step == end:
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "elapsed": time.monotonic() - began,
                "made_with": made,
            }
            with replacing(path) as partial:
                torch.save(state, partial)
    return means


def _batches(dataset: Dataset[Any], start: int, end: int, workers: int) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def _log(folder: Path, name: str, step: int, seconds: float, means: dict[str, float]) -> None:
    text = " ".join(f"{key} {value:.3f}" for key, value in means.items())
    logger.info("%s: step %d, %.0f s: %s", name, step, seconds, text)
    line = {"stage": name, "step": step, "elapsed_seconds": round(seconds, 1), **means}
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
