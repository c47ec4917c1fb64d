"""RolloutRows in the terms of TRL, verl and slime: plain values, without any of them imported.

All split a row by `columns_of`. Rows keep their names (`RolloutRow.row_id`): two rows of equal
tokens may show different videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vtts_rt.rollout.rows import RolloutRow


class Columns(NamedTuple):
    """prompt_ids: token ids before the first that the model said. The others, of equal length:
    token ids from there on; their log-probabilities (natural log), 0 where they were added between
    turns of the model; and 1 where the model said them, else 0."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    mask: list[int]


def columns_of(row: RolloutRow) -> Columns:
    """A row, split where the model first speaks."""
    start = row.num_prompt
    return Columns(
        row.token_ids[:start].tolist(),
        row.token_ids[start:].tolist(),
        np.where(row.mask, row.logprobs, 0.0)[start:].tolist(),
        row.mask[start:].astype(np.int64).tolist(),
    )


def trl_columns(rows: Sequence[RolloutRow]) -> dict[str, list[Any]]:
    """What a `rollout_func` of TRL's GRPOTrainer returns for the prompts of these rows, in their
    order: prompt_ids, completion_ids, logprobs and env_mask, a list a row, and row_id, group_id and
    vtts_reward, which TRL hands to its reward functions."""
    split = [columns_of(row) for row in rows]
    return {
        "prompt_ids": [columns.prompt_ids for columns in split],
        "completion_ids": [columns.completion_ids for columns in split],
        "logprobs": [columns.logprobs for columns in split],
        "env_mask": [columns.mask for columns in split],
        "row_id": [row.row_id for row in rows],
        "group_id": [row.group_id for row in rows],
        "vtts_reward": [row.reward for row in rows],
    }


def verl_outputs(rows: Sequence[RolloutRow]) -> list[dict[str, Any]]:
    """The fields of verl's AgentLoopOutput, one a row: `[AgentLoopOutput(**fields) for ...]` is
    what an agent loop returns for one member (its v1 trainer takes lists).

    rows: of one member, a row a round. It copies the reward of the last output, and its
    reward_extra_info, to all; here all have them. num_turns counts the prompt, each answer and what
    was added between them. extra_fields: what names the row, its position_ids and vision segments
    by key (frames are the runtime's, so multi_modal_data is empty), reward parts as
    reward_extra_info, and the weights version, also as the steps by which it drops stale rows.
    """
    return [
        {
            "prompt_ids": columns.prompt_ids,
            "response_ids": columns.completion_ids,
            "response_mask": columns.mask,
            "response_logprobs": columns.logprobs,
            "multi_modal_data": {},
            "reward_score": _reward(row),
            "num_turns": 2 * _num_turns(row),
            "metrics": {},
            "extra_fields": {
                **_extra(row),
                "reward_extra_info": dict(row.reward_parts),
                "min_global_steps": row.weights_version,
                "max_global_steps": row.weights_version,
            },
        }
        for row, columns in ((row, columns_of(row)) for row in rows)
    ]


def slime_samples(rows: Sequence[RolloutRow], index: int = 0) -> list[dict[str, Any]]:
    """slime's Samples as `Sample.from_dict` takes them, one a row; those of one member share
    rollout_id, over which it averages the loss.

    index: of the group among those of the training; rollout_id is then another for every member of
    every group, of up to 2**20 members. multimodal_train_inputs is left for what the trainer's
    model takes: the features or pixels of `metadata["vision"]`.
    """
    status = {"stop": "completed", "length": "truncated"}
    return [
        {
            "group_index": index,
            "index": number,
            "rollout_id": (index << 20) + row.rollout_id,
            "tokens": row.token_ids.tolist(),
            "response_length": len(columns.mask),
            "loss_mask": columns.mask,
            "rollout_log_probs": columns.logprobs,
            "reward": _reward(row),
            "weight_versions": [str(row.weights_version)],
            "status": status.get(row.finish_reason, "aborted"),
            "metadata": {**_extra(row), "reward_parts": dict(row.reward_parts)},
        }
        for number, (row, columns) in enumerate((row, columns_of(row)) for row in rows)
    ]


def _reward(row: RolloutRow) -> float | None:
    return None if math.isnan(row.reward) else row.reward


def _num_turns(row: RolloutRow) -> int:
    return int(np.count_nonzero(np.diff(row.mask, prepend=False) & row.mask))


def _extra(row: RolloutRow) -> dict[str, Any]:
    return {
        "row_id": row.row_id,
        "group_id": row.group_id,
        "rollout_id": row.rollout_id,
        "round": row.round,
        "temperature": row.temperature,
        "weights_version": row.weights_version,
        "position_ids": row.position_ids.tolist(),
        "vision": [ref._asdict() for ref in row.vision],
    }
