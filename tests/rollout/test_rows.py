"""Rows of rollout groups: what they hold, their journal form, and what trainers get of them."""

from __future__ import annotations

import base64
import json
import math
import random
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torchvision_shim
from hypothesis import given
from hypothesis import strategies as st
from utils import LOOK, request, tiny_checkpoint, tiny_qwen2_5_vl

from vtts_rt import Ask, EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.tokenizer import VisionSpan
from vtts_rt.rollout import converters
from vtts_rt.rollout.rows import RolloutRow, Score, rows_of
from vtts_rt.types import PairRef, PixelBox, Segment, StrategyName

RAW = SamplingParams(temperature=0.7, seed=3, max_tokens=6, ignore_eos=True)


def made(num: int = 40, **changes: Any) -> RolloutRow:
    """A row of two segments, two turns of the model and numbers that are not round."""
    pairs = tuple(PairRef(0, "id é", i, i + 1, i / 3, None if i else 0.1) for i in (0, 2))
    view = (PixelBox(0, 0, 56, 57), (56, 56), GEOMETRY, 1 / 3)
    spans = (
        VisionSpan(2, 8, Segment(pairs, *view)),
        VisionSpan(20, 4, Segment(pairs[1:], *view, is_image=True, resize="pil")),
    )
    mask = np.isin(np.arange(num), [12, 13, 14, 30, 31, 39])
    logprobs = np.where(mask, -np.arange(num) / 7, np.nan)
    fields: dict[str, Any] = {
        "token_ids": np.arange(num) * 3,
        "mask": mask,
        "logprobs": logprobs,
        "position_ids": np.arange(3 * num).reshape(3, num) - 5,
        "spans": spans,
        "temperature": 0.3,
        "group_id": "g/1",
        "rollout_id": 4,
        "round": 2,
        "weights_version": 7,
        "parity": "transformers",
        "finish_reason": "length",
        "reward": 1 / 3,
        "reward_parts": {"a": 0.1, "b": -2.0},
    }
    return RolloutRow(**fields | changes)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: Any) -> Iterator[Runtime]:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("model"), tiny_qwen2_5_vl)
    engine = EngineConfig(kv_bytes=1 << 26)
    with Runtime.from_pretrained(checkpoint, dtype="float32", engine=engine) as runtime:
        yield runtime


@pytest.mark.parametrize("strategy", ["official", "append"])
def test_rows_of_a_group(runtime: Runtime, clips: list[Path], strategy: StrategyName) -> None:
    perception = PerceptionConfig(strategy=strategy, **LOOK)
    asked = request(clips[0], perception=perception, sampling=RAW)
    answers = [runtime.ask(**asked, member=member) for member in range(2)]
    members = (answers[0], TimeoutError("late"), answers[1])
    ask = Ask(asked["video"], "which?", sampling=RAW)
    group = SimpleNamespace(group_id="g", ask=ask, members=members)
    rows = rows_of(group, [Score(1.5, {"a": 1.5}), None, Score(-0.5, {"a": -0.5})])
    whole = strategy == "append"
    rounds = [2] if whole else [0, 1, 2]
    names = [f"g/{member}/{k}" for member in (0, 2) for k in rounds]
    assert [row.row_id for row in rows] == names
    assert [row.reward for row in rows] == [1.5] * len(rounds) + [-0.5] * len(rounds)
    for answer, own in zip(answers, (rows[: len(rounds)], rows[len(rounds) :]), strict=True):
        said = [row.token_ids[row.mask].tolist() for row in own]
        told = [result.token_ids for result in answer.rounds]
        assert [result.is_final for result in answer.rounds] == [False, False, True]
        assert said == ([sum(told, [])] if whole else told)
        for row in own:
            assert row.temperature == 0.7 and row.parity == answer.parity
            assert np.isnan(row.logprobs[~row.mask]).all()
            assert not np.isnan(row.logprobs[row.mask]).any()
            assert runtime.features(row.transcript).shape[0] == sum(v.length for v in row.vision)
            assert json.loads(json.dumps(row.as_dict(), allow_nan=False)) == row.as_dict()
            assert RolloutRow.from_dict(row.as_dict()).as_dict() == row.as_dict()
    for ends in (("length", "stop", "stop"), ("stop", "stop", "timeout"), ("stop",) * 3):
        rounds = [replace(r, finish_reason=e) for r, e in zip(answers[0].rounds, ends, strict=True)]
        members = (replace(answers[0], rounds=rounds), *members[1:])
        cut = SimpleNamespace(group_id="g", ask=ask, members=members)
        told = [row.finish_reason for row in rows_of(cut) if row.rollout_id == 0]
        assert told == (sorted(ends, key="stop".__eq__)[:1] if whole else list(ends))
    unscored = rows_of(group)
    assert math.isnan(unscored[0].reward) and not unscored[0].reward_parts
    with pytest.raises(ValueError, match="^rows_of: scores must be 3, one a member, got 1"):
        rows_of(group, [None])
    cold = SimpleNamespace(group_id="g", ask=Ask("a", "b", sampling=SamplingParams(temperature=0)))
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        rows_of(SimpleNamespace(**vars(cold), members=members))


def test_vision_segments_are_named_by_their_pixels() -> None:
    first, second = made().vision
    assert (first.start, first.length, first.grid_thw) == (2, 8, (2, 4, 4))
    assert first.keys == tuple(
        f"id é:{frames}:0,0,56,57:56x56:fixed" for frames in ("0,1", "2,3")
    )  # fmt: skip
    assert second.is_image and second.keys == ("id é:2,3:0,0,56,57:56x56:pil",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": np.zeros(39, bool)}, "mask must be of shape (40,)"),
        ({"logprobs": np.zeros(40, np.float32)}, "logprobs must be of shape (40,)"),
        ({"position_ids": np.zeros((40, 3), np.int64)}, "position_ids must be of shape (3, 40)"),
        ({"spans": made().spans[::-1]}, "span must be in order"),
        ({"temperature": math.nan}, "temperature must be a finite number > 0"),
        ({"rollout_id": -1}, "rollout_id must be a whole number >= 0"),
        ({"parity": "none"}, "parity must be one of"),
        ({"reward_parts": {"a": math.inf}}, "reward_parts must be finite"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^RolloutRow: ") as error:
        made(**changes)
    assert message in str(error.value)


@given(
    st.lists(st.floats(width=64), min_size=1, max_size=30),
    st.floats(),
    st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
def test_the_journal_form_is_exact(values: list[float], reward: float, parts: Any) -> None:
    logprobs = np.array(values)
    num = len(values)
    row = made(
        num,
        spans=(),
        logprobs=logprobs,
        reward=reward,
        reward_parts=parts,
        token_ids=np.full(num, 2**63 - 1),
    )
    text = json.dumps(row.as_dict(), allow_nan=False)
    again = RolloutRow.from_dict(json.loads(text))
    assert again.logprobs.tobytes() == logprobs.tobytes()
    assert again.token_ids.tolist() == row.token_ids.tolist()
    assert repr(again.reward) == repr(reward) and again.reward_parts == parts
    assert json.dumps(again.as_dict()) == text


def test_the_journal_form_keeps_everything() -> None:
    row = made()
    again = RolloutRow.from_dict(json.loads(json.dumps(row.as_dict())))
    assert again.spans == row.spans and again.vision == row.vision
    for name in ("token_ids", "mask", "logprobs", "position_ids"):
        value = getattr(again, name)
        np.testing.assert_array_equal(value, getattr(row, name))
        assert value.dtype == getattr(row, name).dtype and value.flags.writeable


def damaged(rng: random.Random, value: Any) -> Any:
    """A JSON value with one thing in it replaced, dropped or cut."""
    hostile = (None, -1, 2**70, 1e308, math.nan, "", "x", [], {}, True, [[1]], "\ud800", 10**400)
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        out = dict(value)
        if rng.random() < 0.1:
            del out[key]
        else:
            out[key] = damaged(rng, value[key])
        return out
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], damaged(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("", "A", "é", "=", "//")) + value[at + 1 :]
    return rng.choice(hostile)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_rows_are_value_errors(count: int) -> None:
    whole = json.loads(json.dumps(made().as_dict()))
    refused = 0
    for seed in range(count):
        try:
            RolloutRow.from_dict(damaged(random.Random(seed), whole)).as_dict()
        except ValueError:
            refused += 1
    assert refused > count // 2


def test_an_array_is_never_unpacked_beyond_its_size() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    with pytest.raises(ValueError, match="array must be zlib of 320 bytes"):
        RolloutRow.from_dict(made().as_dict() | {"token_ids": bomb})
    with pytest.raises(ValueError, match="num_tokens must be a whole number, at most"):
        RolloutRow.from_dict(made().as_dict() | {"num_tokens": 1 << 40})


def test_columns_of_trl() -> None:
    row = made()
    columns = converters.trl_columns([row, row])
    assert columns["prompt_ids"][0] == list(range(0, 36, 3))
    assert columns["completion_ids"][1] == list(range(36, 120, 3))
    assert columns["env_mask"][0] == row.mask[12:].astype(int).tolist()
    said = [at for at, counts in enumerate(columns["env_mask"][0]) if counts]
    assert [columns["logprobs"][0][at] for at in said] == row.logprobs[row.mask].tolist()
    assert columns["logprobs"][0][3] == 0.0
    assert columns["row_id"] == ["g/1/4/2"] * 2 and columns["vtts_reward"] == [1 / 3] * 2


def test_samples_of_slime() -> None:
    sample, other = converters.slime_samples([made(), made(rollout_id=5, reward=math.nan)], 2)
    assert sample["tokens"] == list(range(0, 120, 3)) and sample["response_length"] == 28
    assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"]) == 28
    assert sample["rollout_id"] == (2 << 20) + 4 and sample["status"] == "truncated"
    assert other["rollout_id"] != sample["rollout_id"] and other["reward"] is None
    json.dumps([sample, other], allow_nan=False)


@pytest.mark.slow
def test_outputs_of_verl_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its pydantic class and what its v1 trainer makes of it."""
    monkeypatch.setenv("RAY_NODE_IP_ADDRESS", "127.0.0.1")
    torchvision_shim.install()
    loop = pytest.importorskip("verl.experimental.agent_loop.agent_loop", exc_type=ImportError)
    row, bare = made(), made(round=3, reward=math.nan)
    first, last = (loop.AgentLoopOutput(**f) for f in converters.verl_outputs([row, bare]))
    assert last.reward_score is None and first.num_turns == 6
    fields = first.as_dict()
    both = fields["prompts"].tolist() + fields["responses"].tolist()
    assert both == row.token_ids.tolist()
    assert fields["response_mask"].bool().tolist() == row.mask[12:].tolist()
    told = fields["rollout_log_probs"][fields["response_mask"].bool()]
    assert told.tolist() == pytest.approx(row.logprobs[row.mask])
    assert fields["rm_scores"].sum().item() == pytest.approx(1 / 3)
    assert fields["rm_scores"][-1] == fields["rm_scores"].sum()
    assert fields["extra_fields"]["reward_extra_info"] == {"a": 0.1, "b": -2.0}
    assert fields["extra_fields"]["min_global_steps"] == 7
