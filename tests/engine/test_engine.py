from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_tools import (
    GREEDY,
    Frames,
    encode,
    in_dtypes,
    look,
    make_engine,
    pair,
    run,
    score,
    stream,
)

from vtts_rt.engine.sequence import FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from vtts_rt.models.base import ForwardBatch, VisionRows
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PairRef, PixelBox, SamplingParams, TimeLabel


def reference_logits(model: Any, prompt: EncodedPrompt) -> torch.Tensor:
    """Logits of one full forward pass without any cache."""
    ids = torch.tensor(prompt.token_ids)
    rows, features = [], []
    for span in prompt.spans:
        segment = span.segment
        jobs = [
            PatchifyJob(Frames.frame(p.frame_a), Frames.frame(p.frame_b), segment.box, (56, 84))
            for p in segment.pairs
        ]
        rows.append(torch.arange(span.start, span.start + span.length))
        features.append(model.encode(jobs, patchify(jobs, GEOMETRY)))
    vision = VisionRows(torch.cat(rows), torch.cat(features)) if rows else None
    positions = build_position_ids(prompt, MropePositions("release", 2.0))
    with torch.inference_mode():
        hidden = model(ForwardBatch(ids, vision, positions, [0, len(ids)]))
        return model.logits(hidden)


def greedy_reference(model: Any, prompt: EncodedPrompt, num_tokens: int) -> list[int]:
    out: list[int] = []
    for _ in range(num_tokens):
        out.append(int(reference_logits(model, prompt.extended(out))[-1].argmax()))
    return out


@pytest.mark.parametrize("chunk", [2048, 5])
@torch.inference_mode()
def test_tokens_equal_full_forward_passes(model: Any, tokenizer: Tokenizer, chunk: int) -> None:
    engine = make_engine(model, tokenizer, max_batch_tokens=chunk, max_sequences=4)
    prompt = encode(tokenizer, "look ", TimeLabel("<1.0s>"), look(pair(1, 2), pair(3)), " say")
    completion = run(engine, prompt, Frames())
    assert completion.token_ids == greedy_reference(model, prompt, 6)
    assert completion.finish_reason == "length"
    engine.check_integrity()


@torch.inference_mode()
def test_an_appended_round_prefills_only_what_is_new(model: Any, tokenizer: Tokenizer) -> None:
    engine, frames = make_engine(model, tokenizer), Frames()
    first = encode(tokenizer, "look ", TimeLabel("<1.0s>"), look(pair(1, 2)), " say")
    one = run(engine, first, frames)
    added = encode(tokenizer, "\nmore ", TimeLabel("<3.0s>"), look(pair(3)), " say")
    both = first.extended(one.token_ids) + added
    frames.asked.clear()
    two = run(engine, both, frames)
    assert two.token_ids == greedy_reference(model, both, 6)
    assert set(frames.asked) == {3}
    assert (two.reuse.pairs_encoded, two.reuse.pairs_reused) == (1, 1)
    # all but the new part and the last generated token, whose KV was never needed
    assert two.reuse.tokens_reused == len(first) + len(one.token_ids) - 1
    assert two.reuse.tokens_prefilled == len(added) + 1
    assert two.reuse.text_tokens_prefilled == added.num_text_tokens(0, len(added)) + 1
    engine.check_integrity()


@torch.inference_mode()
def test_features_serve_another_prompt_and_the_same_question_costs_one_token(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine, frames = make_engine(model, tokenizer), Frames()
    prompt = encode(tokenizer, "one ", look(pair(1, 2), pair(5)), " say")
    run(engine, prompt, frames)
    frames.asked.clear()
    other = encode(tokenizer, "two ", look(pair(5), pair(1, 2)), " say")
    completion = run(engine, other, frames)
    assert completion.token_ids == greedy_reference(model, other, 6)
    assert completion.reuse.pairs_reused == 2 and frames.asked == []
    again = run(engine, prompt)
    assert again.reuse.tokens_prefilled == 1 and again.reuse.pairs_reused == 2


def test_box_and_video_are_part_of_what_is_cached(model: Any, tokenizer: Tokenizer) -> None:
    engine, frames = make_engine(model, tokenizer), Frames()
    for segment in (
        look(pair(1)),
        look(pair(1), box=PixelBox(0, 0, 84, 56)),
        look(PairRef(0, "w", 1, 1, 1.0)),
    ):
        completion = run(engine, encode(tokenizer, "a", segment, "b"), frames)
        assert completion.reuse.pairs_encoded == 1
        assert completion.reuse.tokens_reused <= 2  # the text and the start marker before it


@pytest.mark.parametrize("pages", [12, 40])
@torch.inference_mode()
def test_a_small_pool_evicts_and_stays_exact(model: Any, tokenizer: Tokenizer, pages: int) -> None:
    page_bytes = 2 * 2 * 4 * 2 * 8 * 8
    engine = make_engine(model, tokenizer, kv_bytes=pages * page_bytes)
    for index in range(8):
        prompt = encode(tokenizer, f"number {index % 3} ", look(pair(index % 2)), " say")
        assert run(engine, prompt, Frames()).token_ids == greedy_reference(model, prompt, 6)
        engine.check_integrity()


def test_a_request_that_can_never_fit_says_what_is_needed(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, kv_bytes=8192)
    with pytest.raises(ValueError, match="must fit the KV budget: .* tokens need .* bytes"):
        run(engine, encode(tokenizer, "a" * 400))
    with pytest.raises(ValueError, match="prompt must be non-empty"):
        run(engine, encode(tokenizer, ""))
    positions = model.config.language.max_position_embeddings
    large = make_engine(model, tokenizer, kv_bytes=(positions + 64) * engine.pool.page_bytes)
    sampling = SamplingParams(max_tokens=positions)
    with pytest.raises(ValueError, match=f"must be <= {positions} tokens, the model's positions"):
        run(large, encode(tokenizer, "a"), sampling=sampling)


def test_a_failing_provider_ends_its_request_and_no_other(model: Any, tokenizer: Tokenizer) -> None:
    engine, frames = make_engine(model, tokenizer), Frames()
    frames.error = RuntimeError("disk gone")
    bad = engine.add(GenerationRequest(encode(tokenizer, "a", look(pair(1))), provider=frames))
    good = engine.add(GenerationRequest(encode(tokenizer, "b"), sampling=GREEDY))
    events = []
    while engine.has_work:
        events += engine.step()
    failed = [e for e in events if isinstance(e, FailedEvent)]
    assert [(e.request_id, str(e.error)) for e in failed] == [(bad, "disk gone")]
    assert [e.request_id for e in events if isinstance(e, FinishedEvent)] == [good]
    engine.check_integrity()
    with pytest.raises(RuntimeError, match="disk gone"):
        run(engine, encode(tokenizer, "a", look(pair(1))), frames)


def test_vision_without_a_provider_is_an_error(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="videos must be given"):
        run(make_engine(model, tokenizer), encode(tokenizer, "a", look(pair(1))))


def test_abort_deadline_and_closing_keep_what_was_generated(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer)
    prompt = encode(tokenizer, "hello there")
    request_id = engine.add(GenerationRequest(prompt, sampling=GREEDY))
    engine.step()
    engine.step()
    completion = engine.abort(request_id)
    assert completion is not None and completion.finish_reason == "aborted"
    assert completion.token_ids == run(engine, prompt).token_ids[:2]
    assert engine.abort(request_id) is None and not engine.has_work
    late = run(engine, prompt, deadline_seconds=time.monotonic() - 1)
    assert (late.finish_reason, late.token_ids) == ("timeout", [])
    engine.check_integrity()


def test_stop_texts_end_the_answer_and_are_kept_out(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer)
    prompt = encode(tokenizer, "tell me")
    long = SamplingParams(max_tokens=30, temperature=1.0, seed=7)
    text = run(engine, prompt, sampling=long).text
    assert len(text) > 8
    stop = text[5:8]
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=7, stop=(stop,))
    request = GenerationRequest(prompt, sampling=params)
    events = list(stream(engine, request))
    completion = events[-1].completion
    assert completion.finish_reason == "stop"
    assert completion.text == text[: text.index(stop)]
    assert "".join(e.text for e in events[:-1]) == completion.text


def test_nothing_ends_before_min_tokens(model: Any, tokenizer: Tokenizer) -> None:
    """Not an end token, not a stop id, not a stop text: one that ends with the next token does."""
    engine = make_engine(model, tokenizer)
    prompt = encode(tokenizer, "tell me")
    long = SamplingParams(max_tokens=30, temperature=1.0, seed=7, ignore_eos=True)
    text = run(engine, prompt, sampling=long).text
    letters = sorted(set(text))
    early = run(engine, prompt, sampling=replace(long, ignore_eos=False, stop=letters))
    assert (early.text, early.finish_reason) == ("", "stop")
    late = run(engine, prompt, sampling=replace(long, ignore_eos=False, stop=letters, min_tokens=9))
    assert 10 <= len(late.token_ids) < 30 and late.finish_reason == "stop"
    assert text.startswith(late.text) and len(late.text) > 4
    ids = range(0, 400, 3)
    stopped = run(
        engine,
        prompt,
        sampling=replace(long, ignore_eos=False, stop_token_ids=ids, min_tokens=9),
    )
    assert [token % 3 == 0 for token in stopped.token_ids[:9]] == [False] * 9
    assert stopped.token_ids[-1] % 3 == 0 and stopped.finish_reason == "stop"
    assert stopped.text == tokenizer.decode(stopped.token_ids[:-1])


def test_a_request_without_a_token_to_choose_fails_alone(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer)
    prompt = encode(tokenizer, "tell me")
    kept = range(100)  # all others are suppressed, and none may come twice
    sampling = SamplingParams(
        suppress_tokens=range(100, 400), no_repeat_ngram_size=1, max_tokens=200, ignore_eos=True
    )
    bad = engine.add(GenerationRequest(prompt, sampling=sampling))
    good = engine.add(GenerationRequest(prompt, sampling=GREEDY))
    events = []
    while engine.has_work:
        events += engine.step()
    (failed,) = [event for event in events if isinstance(event, FailedEvent)]
    assert failed.request_id == bad and "must leave a token to choose" in str(failed.error)
    said = [e.token_id for e in events if isinstance(e, TokenEvent) and e.request_id == bad]
    assert set(said) == set(kept) - set(prompt.token_ids) and len(said) == len(set(said))
    assert [e.request_id for e in events if isinstance(e, FinishedEvent)] == [good]
    engine.check_integrity()


@in_dtypes
def test_a_seed_gives_the_same_tokens_whatever_ran_before(model: Any, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    prompt = encode(tokenizer, "tell me")
    cold = run(make_engine(model, tokenizer), prompt, sampling=params)
    engine = make_engine(model, tokenizer)
    run(engine, encode(tokenizer, "tell"), sampling=params)
    warm = run(engine, prompt, sampling=params)
    assert warm.token_ids == cold.token_ids
    assert warm.logprobs == cold.logprobs
    other = run(engine, prompt, sampling=params, member=1)
    assert other.token_ids != cold.token_ids


def test_scores_are_the_log_probabilities_of_a_full_forward(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer)
    prompt = encode(tokenizer, "tell me")
    tokens = [5, 9, 300]
    scores = score(engine, prompt, tokens)
    logits = reference_logits(model, prompt.extended(tokens))[-4:-1].float().log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(logits, tokens, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    engine.check_integrity()
