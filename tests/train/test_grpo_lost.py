"""GRPO by TRL where a group is not whole, and where all its members are worth the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grpo_tools import SIZE, recipe, steps_of

from vtts_rt import Answer, Runtime
from vtts_rt.rollout.rewards import REWARDS, Reward, Score, group_advantages
from vtts_rt.train import trl as trainer_file
from vtts_rt.train.groups import Example, ScoredGroup, examples_of, roll_out
from vtts_rt.train.grpo import read_examples, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
Member = Answer | Exception
LOST = RuntimeError("lost")


def silent(member: Member) -> Member:
    """Out of time before its first round."""
    assert isinstance(member, Answer)
    return replace(member, rounds=[], text="", option=None, stop_reason="timeout")


def train(
    runtime: Runtime,
    manifest: Path,
    output: Path,
    patch: pytest.MonkeyPatch,
    change: Callable[[int, Member], Member],
    **more: Any,
) -> tuple[Any, dict[str, Any], list[ScoredGroup], bool]:
    """A step on groups with changed members: trainer, what it logged, groups, and whether a weight
    moved."""
    rollouts, seen = runtime.rollouts, list[ScoredGroup]()

    def changed(*args: Any, **options: Any) -> Any:
        group = rollouts(*args, **options)
        members = tuple(change(i, member) for i, member in enumerate(group.members))
        return replace(group, members=members)

    patch.setattr(runtime, "rollouts", changed)
    patch.setattr(
        trainer_file, "roll_out", lambda *a, **k: seen.append(roll_out(*a, **k)) or seen[-1]
    )
    grpo = {"max_steps": 1, "save_strategy": "no", "num_iterations": 1, **more.pop("grpo", {})}
    trainer = trainer_of(
        recipe(manifest, output, grpo=grpo, **more), runtime, read_examples(manifest)
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    pairs = zip(before, trainer.model.parameters(), strict=True)
    moved = any(not torch.equal(a, b) for a, b in pairs)
    return trainer, steps_of(trainer.state.log_history)[0], seen, moved


@pytest.mark.parametrize(
    ("lost", "quiet"), [((0,), ()), ((1, 3), ()), ((1, 2, 3), ()), ((), (2,)), ((0,), (1, 2))]
)
def test_members_that_are_not_there_count_for_nothing(
    lost: tuple[int, ...],
    quiet: tuple[int, ...],
    runtime: Runtime,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lost: failed; quiet: has an answer, judged as one without rounds, and not a token."""

    def change(number: int, member: Member) -> Member:
        return LOST if number in lost else silent(member) if number in quiet else member

    # Values of their own, so that there is an advantage to get wrong.
    values = iter((1.0, 3.0, 4.0, 0.0))
    monkeypatch.setitem(REWARDS, "own", Reward("own", lambda _: next(values)))
    trainer, entry, (group,), moved = train(
        runtime, manifest, tmp_path, monkeypatch, change, rewards={"own": 0.5}
    )
    assert [row is None for row in trainer._generation.rows] == [
        i in (*lost, *quiet) for i in range(SIZE)
    ]
    scores = [p and Score(0.5 * p["own"], p) for p in group.parts]
    expected = np.nan_to_num(group_advantages(scores))
    inputs = trainer._buffered_inputs[0]
    np.testing.assert_allclose(inputs["advantages"], expected, atol=1e-5)
    counted = (inputs["completion_mask"] * inputs["tool_mask"]).sum(1)
    assert [int(n) for n in counted] == [
        0 if row is None else int(row.mask.sum()) for row in trainer._generation.rows
    ]
    assert entry["group/failed"] == len(lost) and math.isfinite(entry["loss"])
    assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    assert moved == (len(lost) < SIZE - 1)  # one alone has no advantage
    assert not any(value is None for value in entry.values())


def test_rows_are_masked_where_any_of_their_rounds_was_cut_off(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever token a row ends on. The ends of both rounds, by member."""
    ends = (("length", "stop"), ("stop", "stop"), ("stop", "timeout"), ("stop", "stop"))

    def change(number: int, member: Member) -> Member:
        assert isinstance(member, Answer)
        rounds = [
            replace(r, finish_reason=end)  # type: ignore[arg-type]
            for r, end in zip(member.rounds, ends[number], strict=False)
        ]
        return replace(member, rounds=rounds)

    values = iter((1.0, 3.0, 4.0, 0.0))
    monkeypatch.setitem(REWARDS, "own", Reward("own", lambda _: next(values)))
    trainer, entry, _, moved = train(
        *(runtime, manifest, tmp_path, monkeypatch, change),
        rewards={"own": 0.5},
        grpo={"mask_truncated_completions": True},
    )
    rows, inputs = trainer._generation.rows, trainer._buffered_inputs[0]
    is_cut = [row.finish_reason != "stop" for row in rows]
    assert is_cut[0] and not is_cut[1] and not is_cut[3] and moved
    counted = (inputs["completion_mask"] * inputs["tool_mask"]).sum(1)
    assert [int(n) for n in counted] == [
        0 if cut else int(row.mask.sum()) for row, cut in zip(rows, is_cut, strict=True)
    ]
    assert entry["completions/clipped_ratio"] == sum(is_cut) / SIZE


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_equal_rewards_move_nothing(
    beta: float,
    runtime: Runtime,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REWARDS, "same", Reward("same", lambda _: 0.7))
    trainer, entry, _, moved = train(
        *(runtime, manifest, tmp_path, monkeypatch, lambda _, member: member),
        rewards={"same": 1.0},
        grpo={"beta": beta, "optim": "sgd"},
    )
    assert trainer._buffered_inputs[0]["advantages"].tolist() == [0.0] * SIZE
    assert entry["frac_reward_zero_std"] == 1.0 and entry["reward"] == pytest.approx(0.7)
    assert abs(entry["loss"]) < 1e-6 and entry["grad_norm"] < 1e-4
    assert beta > 0 or not moved


def test_a_group_of_which_all_members_are_lost_names_its_clip(
    runtime: Runtime, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"no rollout of .*\.mp4 ended: lost"):
        train(runtime, manifest, tmp_path, monkeypatch, lambda *_: LOST)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="no member said anything"):
        train(runtime, manifest, tmp_path, monkeypatch, lambda _, member: silent(member))


def test_rewards_of_other_tasks_are_not_logged(
    runtime: Runtime, manifest: Path, tmp_path: Path
) -> None:
    """Six questions of which one is of another task, with the published rewards of each."""
    gqa, *others = read_examples(manifest)
    asked = recipe(
        *(manifest, tmp_path), rewards=None, grpo={"max_steps": 1, "save_strategy": "no"}
    )
    examples = [gqa, *(one._replace(task="mc") for one in others)]
    trainer = trainer_of(asked, runtime, examples)
    names = {"rewards/letter/mean", "rewards/format_answer/mean", "rewards/format_gqa/mean"}
    trainer.train()
    (entry,) = steps_of(trainer.state.log_history)
    assert names - entry.keys() and all(value is not None for value in entry.values())


def test_what_a_reward_compares_with_is_checked_before_a_run(
    runtime: Runtime, manifest: Path, tmp_path: Path
) -> None:
    examples = read_examples(manifest)
    asked = recipe(manifest, tmp_path, rewards={"clue_spans": 1.0})
    last = examples[-1]
    lacking = [*examples[:-1], last._replace(row=replace(last.row, spans=()))]
    with pytest.raises(ValueError, match="row must be one with spans, which reward 'clue_spans'"):
        trainer_of(asked, runtime, lacking)
    (odd,) = examples_of([last.row.as_dict()], tmp_path, "guessing")
    assert isinstance(odd, Example)
    with pytest.raises(ValueError, match="task must be one of tg, gqa"):
        trainer_of(replace(asked, rewards=None), runtime, [*examples, odd])
