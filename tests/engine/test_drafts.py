from __future__ import annotations

from typing import Any

import pytest
from engine_tools import encode, in_dtypes, make_engine, run

from vtts_rt.engine.drafts import NgramDrafter
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.types import SamplingParams

ANSWER = [10, 11, 12, 13, 14, 11, 12, 20, 21]


def written(tokens: list[int], earlier: list[list[int]], most: int = 4) -> NgramDrafter:
    drafter = NgramDrafter(earlier, most)
    for token in tokens:
        drafter.append(token)
    return drafter


def test_an_answer_begins_like_the_last_one() -> None:
    assert written([], [[1, 2, 3], ANSWER]).propose(3) == [10, 11, 12]
    assert written([], []).propose(3) == []


def test_what_followed_the_last_tokens_follows_again() -> None:
    assert written([99, 10, 11], [ANSWER]).propose(8) == [12, 13, 14, 11]
    # three tokens say more than two: 13 followed 10, 11, 12 and 20 followed 11, 12 alone
    assert written([10, 11, 12], [ANSWER]).propose(1) == [13]
    assert written([77, 11, 12], [ANSWER]).propose(1) == [20]
    assert written([11], [ANSWER]).propose(4) == []  # one token says too little


def test_drafts_are_unlikely_after_a_text_without_precedents() -> None:
    drafter = written([], [])
    assert drafter.draft_unlikely
    for token in (1, 2, 1, 2):
        drafter.append(token)
    assert drafter.propose(1) == [1] and not drafter.draft_unlikely
    for token in range(3, 18):
        drafter.append(token)
        assert drafter.propose(4) == [] and not drafter.draft_unlikely
    drafter.append(18)
    assert drafter.draft_unlikely
    # An answer like an earlier one may be drafted from its first token on.
    assert not written([], [ANSWER]).draft_unlikely
    assert written([], [ANSWER], most=0).draft_unlikely


def test_a_draft_ends_with_the_answer_it_is_taken_from() -> None:
    assert written([12, 20], [ANSWER, [5, 6]]).propose(8) == [21]


def test_a_period_goes_on() -> None:
    assert written([1, 2, 1, 2, 1, 2], []).propose(8) == [1, 2, 1, 2]
    assert written([7, 7, 7], []).propose(3) == [7, 7, 7]


def test_the_length_follows_what_was_right() -> None:
    drafter = written([10, 11], [ANSWER], most=4)
    drafter.judge(4, 0)
    assert drafter.propose(8) == [12]
    drafter.judge(1, 1)
    assert drafter.propose(8) == [12, 13]
    drafter.judge(2, 1)
    assert drafter.propose(8) == [12, 13]
    drafter.judge(2, 2)
    drafter.judge(4, 4)
    assert drafter.propose(8) == [12, 13, 14, 11]


def test_the_first_draft_is_short_where_longer_ones_are_allowed() -> None:
    drafter = written([], [list(range(40))], most=15)
    assert drafter.propose(99) == list(range(8))
    drafter.judge(8, 8)
    assert drafter.propose(99) == list(range(15))
    assert drafter.propose(9) == list(range(9))


def test_no_drafts_no_memory() -> None:
    drafter = written(ANSWER, [ANSWER], most=0)
    assert drafter.propose(8) == [] and drafter._tokens == []


@in_dtypes
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_save_passes_and_change_no_token(
    model: Any, tokenizer: Tokenizer, temperature: float
) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=temperature, seed=4, ignore_eos=True)
    prompt = encode(tokenizer, "tell me")
    plain_engine = make_engine(model, tokenizer, draft_tokens=0)
    plain = run(plain_engine, prompt, sampling=sampling)
    assert plain.reuse.tokens_drafted == 0
    engine = make_engine(model, tokenizer)
    # The answer is known: every draft is right, and the steps are few.
    drafted = run(engine, prompt, sampling=sampling, earlier_answers=[plain.token_ids])
    assert drafted.token_ids == plain.token_ids
    assert drafted.logprobs == plain.logprobs
    assert drafted.reuse.tokens_accepted == drafted.reuse.tokens_drafted > 12
    assert engine.stats()["scheduler"]["steps"] <= 5
    assert plain_engine.stats()["scheduler"]["steps"] == 24
    # Misleading answers cost nothing but rows.
    wrong = [[t + 1 for t in plain.token_ids], plain.token_ids[::-1], plain.token_ids[5:]]
    misled = run(engine, prompt, sampling=sampling, earlier_answers=wrong)
    assert (misled.token_ids, misled.logprobs) == (plain.token_ids, plain.logprobs)
    assert misled.reuse.tokens_accepted < misled.reuse.tokens_drafted
    engine.check_integrity()


def test_drafts_end_where_the_answer_does(model: Any, tokenizer: Tokenizer) -> None:
    """A stop token or text inside an accepted draft ends the answer right there."""
    prompt = encode(tokenizer, "tell me")
    long = SamplingParams(max_tokens=30, temperature=1.0, seed=7)
    plain = run(make_engine(model, tokenizer, draft_tokens=0), prompt, sampling=long)
    stop = plain.text[5:8]
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=7, stop=(stop,))
    alone = run(make_engine(model, tokenizer, draft_tokens=0), prompt, sampling=params)
    engine = make_engine(model, tokenizer)
    drafted = run(engine, prompt, sampling=params, earlier_answers=[plain.token_ids])
    assert (drafted.text, drafted.token_ids, drafted.finish_reason) == (
        alone.text,
        alone.token_ids,
        "stop",
    )
    engine.check_integrity()
