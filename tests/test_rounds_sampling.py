"""Sampling settings over the rounds of a question: what ends a round, what counts as its answer,
what a checkpoint and a rollout fill in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from utils import LOOK, as_ask, choose_by, request, tokens, told

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.engine.sequence import GenerationRequest
from vtts_rt.rounds.results import Answer
from vtts_rt.sampling import ResolvedSampling


@pytest.fixture()
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 26)) as runtime:
        yield runtime


def ask(runtime: Runtime, clips: list[Path], strategy: str, **more: Any) -> Answer:
    return runtime.ask(**request(clips[0], strategy, **more))


def test_a_clue_ends_where_bans_leave_nothing_else(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token may come twice, and yet the grammar's clue comes to its end."""
    pytest.importorskip("llguidance")
    opening = runtime.engine.tokenizer.encode("<glue>")

    def choose(logits: Any, params: Any, *, position: int, **_: Any) -> Any:
        return int(opening[position] if position < len(opening) else logits.argmax()), -0.5

    choose_by(monkeypatch, choose)
    config = PerceptionConfig(strategy="append", max_rounds=1, constrain_clues=True, **LOOK)
    sampling = SamplingParams(max_tokens=1500, stop="</glue>", no_repeat_ngram_size=1)
    answer = ask(runtime, clips, "append", perception=config, assume_clues=None, sampling=sampling)
    assert answer.rounds[0].finish_reason == "stop" and answer.rounds[0].clue.usable


@pytest.mark.parametrize(
    ("texts", "text", "option"),
    [
        (["<answer>A</answer>[[2, 5]]", "<answer>B, because"], "A", "A"),  # cut in the tag
        (["<answer>A</answer>", "B, because it"], "A", "A"),  # cut without a tag
        (["<answer>A</answer>", "<answer>B</answer> and more"], "B", "B"),  # cut behind it
        (["nothing", "(B)"], "(B)", "B"),  # a letter is whole
        (["nothing", "C"], "", None),  # of an option, of which there are two
        (["<answer>A, as", "or B, as"], "", None),
    ],
)
def test_a_cut_round_is_no_answer(
    runtime: Runtime,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    text: str,
    option: str | None,
) -> None:
    script = [runtime.engine.tokenizer.encode(each) for each in texts]

    def choose(logits: Any, params: Any, *, round_index: int, position: int, **_: Any) -> Any:
        return script[round_index][position], -0.5

    choose_by(monkeypatch, choose)
    monkeypatch.setattr("vtts_rt.engine.engine.resolve", cut_to(script))
    clues = [[[2, 5]], [[3, 4]]]
    config = PerceptionConfig(strategy="append", max_rounds=2, **LOOK)
    answer = ask(runtime, clips, "append", perception=config, assume_clues=clues)
    assert (answer.text, answer.option) == (text, option)
    assert [r["finish_reason"] for r in answer.as_dict()["rounds"]] == ["length"] * 2


def test_a_stop_id_is_not_part_of_the_conversation(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is not part of the text; the next round closes the turn itself."""
    engine = runtime.engine
    asked: list[list[int]] = []
    add = engine.add

    def noted(wanted: GenerationRequest) -> int:
        asked.append(wanted.prompt.token_ids)
        return add(wanted)

    said = tokens(ask(runtime, clips, "append"))[0]
    monkeypatch.setattr(engine, "add", noted)
    sampling = SamplingParams(max_tokens=6, stop_token_ids=[said[3]])
    first = ask(runtime, clips, "append", sampling=sampling).rounds[0]
    assert first.finish_reason == "stop" and first.token_ids[-1] == said[3]
    end = engine.tokenizer.token_id("<|im_end|>")
    conversation = [*asked[0], *first.token_ids[:-1], end]
    assert asked[1][: len(conversation)] == conversation


def cut_to(script: list[list[int]]) -> Any:
    """Every round may write just as many tokens as its script has."""
    lengths = iter(script)

    def resolve(params: Any, defaults: Any, room: int) -> ResolvedSampling:
        return ResolvedSampling(max_tokens=len(next(lengths)))

    return resolve


def test_an_unset_max_tokens_is_cut_to_what_fits(checkpoint: Path, clips: list[Path]) -> None:
    """By the KV pool or the model's positions; the answer ends by length, not with an error."""
    page_bytes = 2 * 3 * 16 * 2 * 16 * 4
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=20 * page_bytes)) as one:
        one.engine.tokenizer.eos_token_ids = frozenset()  # it never ends by itself
        completion = one.generate("a b c")
        assert completion.finish_reason == "length"
        total = completion.num_prompt_tokens + len(completion.token_ids)
        assert total == one.engine.token_budget == 320
        with pytest.raises(ValueError, match="generate: prompt plus max_tokens must be <= 320"):
            one.generate("a b c", SamplingParams(max_tokens=320))
        with pytest.raises(ValueError, match=r"must be <= 320 tokens, got at least 400 \+ 1"):
            one.generate("a" * 400)


def test_members_of_a_group_are_rollouts(
    runtime: Runtime, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ignore the checkpoint's settings, alone as together; other questions do not."""
    engine = runtime.engine
    filled = SamplingParams(temperature=0.0, suppress_tokens=range(200))
    monkeypatch.setattr(engine.model, "config", replace(engine.model.config, sampling=filled))
    short = SamplingParams(max_tokens=12, ignore_eos=True, seed=2)
    arguments = request(clips[0], sampling=short)
    group = runtime.rollouts(as_ask(clips[0], sampling=short), 3)
    said = [told(answer) for answer in group.answers]
    assert said[0] != said[1] != said[2]
    assert any(token < 200 for answer in said for ids, _ in answer for token in ids)
    assert told(runtime.ask(**arguments, member=1)) == said[1]
    plain = told(runtime.ask(**arguments))
    assert all(token >= 200 for ids, _ in plain for token in ids)
    assert told(runtime.ask(**request(clips[0], sampling=replace(short, temperature=0.0)))) == plain
