"""RolloutRows in the terms of TRL, verl and slime: plain values, without any of them imported.

All split a row where the model first speaks: the prompt before it, and all that follows, in which
tokens that were added between turns are masked out. Log-probs of masked tokens are 0. Rows keep
their names (`RolloutRow.row_id`): two rows of equal tokens may show different videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vtts_rt.rollout.rows import RolloutRow


def trl_columns(rows: Sequence[RolloutRow]) -> dict[str, list[Any]]:
    """What a `rollout_func` of TRL's GRPOTrainer returns for the prompts of these rows, in their
    order: prompt_ids, completion_ids, logprobs and env_mask, a list a row, and row_id, group_id and
    vtts_reward, which TRL hands to its reward functions."""
    return {
        "prompt_ids": [_before(row) for row in rows],
        "completion_ids": [_after(row, row.token_ids) for row in rows],
        "logprobs": [_after(row, np.where(row.mask, row.logprobs, 0.0)) for row in rows],
        "env_mask": [_after(row, row.mask.astype(np.int64)) for row in rows],
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
            "prompt_ids": _before(row),
            "response_ids": _after(row, row.token_ids),
            "response_mask": _after(row, row.mask.astype(np.int64)),
            "response_logprobs": _after(row, np.where(row.mask, row.logprobs, 0.0)),
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
        for row in rows
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
            "response_length": len(row.mask) - row.num_prompt,
            "loss_mask": _after(row, row.mask.astype(np.int64)),
            "rollout_log_probs": _after(row, np.where(row.mask, row.logprobs, 0.0)),
            "reward": _reward(row),
            "weight_versions": [str(row.weights_version)],
            "status": status.get(row.finish_reason, "aborted"),
            "metadata": {**_extra(row), "reward_parts": dict(row.reward_parts)},
        }
        for number, row in enumerate(rows)
    ]


def _before(row: RolloutRow) -> list[int]:
    ids: list[int] = row.token_ids[: row.num_prompt].tolist()
    return ids


def _after(row: RolloutRow, values: np.ndarray) -> list[Any]:
    rest: list[Any] = values[row.num_prompt :].tolist()
    return rest


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
