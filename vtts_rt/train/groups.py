"""One rollout group of a training step: asked, scored, and what it shows of itself."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtts_rt.data.row import Row, row_from_dict
from vtts_rt.perception.metrics import regions_box_iou, regions_span_iou
from vtts_rt.rollout.converters import Columns, columns_of
from vtts_rt.rollout.rewards import BY_TASK, score_group, weights_of_task
from vtts_rt.rollout.rows import RolloutRow, rows_of
from vtts_rt.rollout.tree import TokenTree
from vtts_rt.rounds.ask import Ask, Perception
from vtts_rt.rounds.rollouts import RolloutGroup
from vtts_rt.runtime import Runtime
from vtts_rt.train.settings import WHAT
from vtts_rt.types import ReuseStats, SamplingParams

logger = logging.getLogger(__name__)

_COUNTS = ("frames_decoded", "pairs_encoded", "tokens_prefilled", "text_tokens_prefilled")


class Example(NamedTuple):
    """A row to train on. media: its file; task: as a manifest names it."""

    media: Path
    row: Row
    task: str

    def weights(self, rewards: Mapping[str, float] | None) -> Mapping[str, float]:
        """Of its rewards; None: the published ones of its task."""
        return weights_of_task(WHAT, {BY_TASK: 1.0} if rewards is None else rewards, self.task)


def examples_of(
    records: Iterable[Mapping[str, Any]], folder: str | Path, task: str
) -> list[Example]:
    """Rows in the form of `vtts_rt.data.rows`, of a `datasets.Dataset` say, which fills fields that
    a row has not with None: these are taken for absent. folder: of their media."""
    rows = (row_from_dict(_without_none(dict(record))) for record in records)
    return [Example(Path(folder) / row.media, row, task) for row in rows]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


class ScoredGroup(NamedTuple):
    """group: as it was rolled out; row: what it was scored by, boxes as fractions. parts: by member
    its rewards, None for one that failed; rows: likewise. features: of every frame pair that the
    rows show, by its key, as the tower sees it."""

    group: RolloutGroup
    row: Row
    parts: list[Mapping[str, float] | None]
    rows: list[RolloutRow | None]
    features: Mapping[str, Tensor]

    def columns(self, ends: Collection[int]) -> list[Columns]:
        """Of every member. One without a row says only the first of `ends`, which does not count.

        TRL takes a completion for cut off where its last token is none of `ends`. Where that is not
        what the row's finish_reason says, one more token that does not count says it: of a
        conversation of which an earlier round was cut off, or of a round that a stop text ended.
        """
        prompt = columns_of(next(row for row in self.rows if row is not None)).prompt_ids
        end = next(iter(ends))
        other = next(token for token in range(len(ends) + 1) if token not in ends)
        found = []
        for row in self.rows:
            told = Columns(prompt, [end], [0.0], [0]) if row is None else columns_of(row)
            is_whole = row is None or row.finish_reason == "stop"
            if is_whole != (told.completion_ids[-1] in ends):
                last = end if is_whole else other
                more = ([*told.completion_ids, last], [*told.logprobs, 0.0], [*told.mask, 0])
                told = Columns(told.prompt_ids, *more)
            found.append(told)
        return found

    def metrics(self) -> dict[str, float]:
        """Counts of the whole group, means over its members, and of every round, `@0` being the
        first as in names of rewards, the IoU of its clue with the evidence, over the members that
        had it."""
        answers, row = self.group.answers, self.row
        reuse = sum((r.reuse for answer in answers for r in answer.rounds), ReuseStats())
        found = {f"group/{name}": float(getattr(reuse, name)) for name in _COUNTS}
        found["group/failed"] = float(len(self.group.errors))
        found["group/rounds"] = _mean(len(answer.rounds) for answer in answers)
        for index in range(max(len(answer.rounds) for answer in answers)):
            rounds = [answer.rounds[index] for answer in answers if index < len(answer.rounds)]
            if row.spans:
                spans = (regions_span_iou(r.regions, row.spans) for r in rounds)
                found[f"clue/span_iou@{index}"] = _mean(spans)
            if row.boxes:
                boxes = (regions_box_iou(r.regions, row.boxes[0]) for r in rounds)
                found[f"clue/box_iou@{index}"] = _mean(boxes)
        return found


def roll_out(
    runtime: Runtime,
    example: Example,
    num_answers: int,
    rewards: Mapping[str, float] | None,
    *,
    perception: Perception,
    sampling: SamplingParams,
    group_id: str,
) -> ScoredGroup:
    """The video is opened once, for the rollouts and for the features of what they saw. The row of
    a member is that of `trained_rows`. RuntimeError where no member has one."""
    row = example.row
    with runtime.open(example.media) as video:
        if row.pixel_boxes:
            row = row.sized(video.metadata.height, video.metadata.width)
        asked = {"options": row.options, "perception": perception, "sampling": sampling}
        ask = Ask([video], row.question, **asked)  # type: ignore[arg-type]
        group = runtime.rollouts(ask, num_answers, group_id=group_id)
        if errors := group.errors:
            told = (len(errors), num_answers, example.media, errors[0])
            logger.warning("%d of %d rollouts of %s failed: %s", *told)
        scores = score_group(group, row, example.weights(rewards), example.task)
        trained = trained_rows(rows_of(group, scores))
        if not trained:
            error = next(iter(group.errors), "no member said anything")
            raise RuntimeError(f"{WHAT}: no rollout of {example.media} ended: {error}")
        rows = list(trained.values())
        tree = TokenTree.of(rows)
        found = tree.pick(lambda i: runtime.features(rows[i].transcript, videos=[video]))
    sizes = [pair.num_tokens for pair in tree.pairs]
    features = {str(p.key): f for p, f in zip(tree.pairs, torch.split(found, sizes), strict=True)}
    parts = [None if score is None else score.parts for score in scores]
    return ScoredGroup(group, row, parts, [trained.get(i) for i in range(num_answers)], features)


def trained_rows(rows: Iterable[RolloutRow]) -> dict[int, RolloutRow]:
    """Member -> the row that is trained, of rows in the order of `rows_of`: the last one in which
    the model said anything. A round that was cut before its first token has nothing to train, and
    no part in the reward (`RewardInput.of_answer`). A member that never spoke has no row."""
    return {row.rollout_id: row for row in rows if row.mask.any()}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
