"""Who gets which tokens of a pass: fairness, chunks, sharing, fetching, faults."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_tools import GREEDY, Frames, encode, in_dtypes, look, make_engine, pair, run

from vtts_rt.engine.engine import Engine, Event
from vtts_rt.engine.sequence import FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.types import SamplingParams

LONG = SamplingParams(max_tokens=100, ignore_eos=True)


def add(engine: Engine, tokenizer: Tokenizer, *parts: Any, **more: Any) -> int:
    settings = {"sampling": GREEDY, "provider": Frames()} | more
    return engine.add(GenerationRequest(encode(tokenizer, *parts), **settings))


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    return events


def completions(events: list[Event]) -> dict[int, Any]:
    return {e.request_id: e.completion for e in events if isinstance(e, FinishedEvent)}


def test_requests_share_passes(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer)
    texts = ["one", "a second one", "and the third of them"]
    ids = [add(engine, tokenizer, text) for text in texts]
    done = completions(drain(engine))
    assert engine.stats()["scheduler"]["steps"] == GREEDY.max_tokens
    for request_id, text in zip(ids, texts, strict=True):
        expected = run(make_engine(model, tokenizer), encode(tokenizer, text))
        assert done[request_id].token_ids == expected.token_ids


def test_a_long_prompt_does_not_keep_others_from_decoding(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, max_batch_tokens=12, max_sequences=4)
    first = add(engine, tokenizer, "hello", sampling=LONG)
    engine.step()
    add(engine, tokenizer, "long " * 60)
    for _ in range(5):
        told = [e.request_id for e in engine.step() if isinstance(e, TokenEvent)]
        assert told == [first]
    drain(engine)


@pytest.mark.parametrize("max_sequences", [1, 2])
def test_no_request_waits_for_ever(model: Any, tokenizer: Tokenizer, max_sequences: int) -> None:
    limit = 5
    engine = make_engine(
        model, tokenizer, max_sequences=max_sequences, max_wait_steps=limit, kv_bytes=1 << 18
    )
    hogs = [add(engine, tokenizer, f"hog {i}", sampling=LONG) for i in range(max_sequences)]
    engine.step()
    late = [add(engine, tokenizer, f"late {i}", sampling=LONG) for i in range(3)]
    first_token: dict[int, int] = {}
    events: list[Event] = []
    for step in range(1, 10_000):
        new = engine.step()
        engine.check_integrity()
        events += new
        for event in new:
            first_token.setdefault(event.request_id, step)
        if not engine.has_work:
            break
    for place, request_id in enumerate(late):
        assert first_token[request_id] <= (place + max_sequences + 1) * (limit + 1)
    done = completions(events)
    assert set(done) == {*hogs, *late}  # a preempted one goes on where it was
    for request_id, text in zip(late, ("late 0", "late 1", "late 2"), strict=True):
        alone = run(make_engine(model, tokenizer), encode(tokenizer, text), sampling=LONG)
        assert done[request_id].token_ids == alone.token_ids


@in_dtypes
def test_too_few_pages_preempt_the_newest_and_lose_nothing(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer, num_pages=36)
    texts = [f"number {i} of some" for i in range(4)]
    ids = [add(engine, tokenizer, text, sampling=LONG) for text in texts]
    done = completions(drain(engine))
    stats = engine.stats()["scheduler"]
    assert stats["preemptions"] > 0
    for request_id, text in zip(ids, texts, strict=True):
        alone = run(make_engine(model, tokenizer), encode(tokenizer, text), sampling=LONG)
        assert done[request_id].token_ids == alone.token_ids
        assert done[request_id].logprobs == alone.logprobs


def test_a_group_prefills_and_encodes_once(model: Any, tokenizer: Tokenizer) -> None:
    engine, frames = make_engine(model, tokenizer, max_batch_tokens=24, max_sequences=8), Frames()
    parts = ("what is this? ", look(pair(1, 2)), look(pair(3, 4)), " say")
    sampling = SamplingParams(max_tokens=6, temperature=1.0, ignore_eos=True)
    for member in range(6):
        add(engine, tokenizer, *parts, provider=frames, sampling=sampling, member=member)
    done = list(completions(drain(engine)).values())
    prompt = len(encode(tokenizer, *parts))
    first, *others = sorted(done, key=lambda c: -c.reuse.tokens_prefilled)
    assert first.reuse.tokens_prefilled == prompt and first.reuse.pairs_encoded == 2
    assert all(c.reuse.tokens_prefilled == 1 and c.reuse.pairs_encoded == 0 for c in others)
    assert sorted(frames.asked) == [1, 2, 3, 4]
    assert len({tuple(c.token_ids) for c in done}) > 1  # members differ by their noise


def test_pairs_of_different_questions_are_encoded_once_in_one_pass(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine, frames = make_engine(model, tokenizer, vision_cache_bytes=0), Frames()
    for text in ("one", "two"):
        add(engine, tokenizer, text, look(pair(1), pair(5)), " say", provider=frames)
    done = completions(drain(engine)).values()
    assert sorted(frames.asked) == [1, 1, 5, 5]  # a still pair shows one frame twice
    assert sorted(c.reuse.pairs_encoded for c in done) == [0, 2]


def test_a_pair_split_by_chunks_is_encoded_once_without_a_cache(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(
        model, tokenizer, vision_cache_bytes=0, max_batch_tokens=4, max_sequences=2
    )
    request = add(engine, tokenizer, "a ", look(pair(1, 2), pair(3, 4)), " say")
    assert completions(drain(engine))[request].reuse.pairs_encoded == 2


class Late(Frames):
    """Frames that are on their way until `arrived`."""

    arrived = False

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[int] = []

    def prefetch(self, video: int, frame_indices: Sequence[int]) -> None:
        self.wanted += frame_indices

    def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
        return self.arrived


def test_one_fetches_while_others_decode(model: Any, tokenizer: Tokenizer) -> None:
    engine, late = make_engine(model, tokenizer), Late()
    talker = add(engine, tokenizer, "hello", sampling=LONG)
    looker = add(engine, tokenizer, "look ", look(pair(1, 2)), " say", provider=late)
    for _ in range(10):
        events = engine.step()
        assert {e.request_id for e in events} == {talker}
    assert late.wanted == [1, 2] and late.asked == []
    late.arrived = True
    assert looker in {e.request_id for e in engine.step()}
    drain(engine)


def test_alone_a_request_waits_for_its_frames(model: Any, tokenizer: Tokenizer) -> None:
    engine, late = make_engine(model, tokenizer), Late()
    request = add(engine, tokenizer, "look ", look(pair(1, 2)), " say", provider=late)
    assert [e.request_id for e in engine.step()] == [request]
    drain(engine)


def test_deadlines_hold_in_the_queue_too(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, max_sequences=1)
    add(engine, tokenizer, "hello", sampling=LONG)
    late = add(engine, tokenizer, "late", deadline_seconds=time.monotonic() + 0.02)
    engine.step()
    time.sleep(0.03)
    (event,) = (e for e in engine.step() if e.request_id == late)
    assert isinstance(event, FinishedEvent) and event.completion.finish_reason == "timeout"
    drain(engine)


# -- faults -----------------------------------------------------------------------------------


def failures(events: list[Event]) -> dict[int, str]:
    return {e.request_id: str(e.error) for e in events if isinstance(e, FailedEvent)}


def test_a_failed_decoder_fails_its_request_alone(model: Any, tokenizer: Tokenizer) -> None:
    engine, dying = make_engine(model, tokenizer), Frames()
    dying.error = RuntimeError("disk gone")
    bad = add(engine, tokenizer, "one ", look(pair(1)), " say", provider=dying)
    # The same pair is wanted from a source that works.
    good = add(engine, tokenizer, "two ", look(pair(1), pair(2)), " say")
    events = drain(engine)
    assert failures(events) == {bad: "disk gone"}
    expected = run(
        make_engine(model, tokenizer),
        encode(tokenizer, "two ", look(pair(1), pair(2)), " say"),
        Frames(),
    )
    assert completions(events)[good].token_ids == expected.token_ids


@pytest.mark.parametrize("both", [False, True])
def test_a_failed_decoder_spares_requests_for_the_same_pairs(
    model: Any, tokenizer: Tokenizer, both: bool
) -> None:
    engine, dying = make_engine(model, tokenizer), Frames()
    dying.error = RuntimeError("disk gone")
    bad = add(engine, tokenizer, "one ", look(pair(1)), " say", provider=dying)
    other = dying if both else Frames()
    good = add(engine, tokenizer, "two ", look(pair(1)), " say", provider=other)
    events = drain(engine)
    assert failures(events) == {bad: "disk gone"} | ({good: "disk gone"} if both else {})
    assert set(completions(events)) == (set() if both else {good})


def test_a_provider_that_cannot_look_ahead_is_asked_for_frames_all_the_same(
    model: Any, tokenizer: Tokenizer
) -> None:
    class NoThreads(Frames):
        def prefetch(self, video: int, frame_indices: Sequence[int]) -> None:
            raise RuntimeError("can't start new thread")

        def ready(self, video: int, frame_indices: Sequence[int]) -> bool:
            raise RuntimeError("no idea")

    engine = make_engine(model, tokenizer)
    talker = add(engine, tokenizer, "hello")
    looker = add(engine, tokenizer, "look ", look(pair(1, 2)), " say", provider=NoThreads())
    assert set(completions(drain(engine))) == {talker, looker}


def test_logits_that_do_not_fit_together_are_made_one_by_one(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, tokenizer)
    choices, refused = engine._passes._runner._choices, []

    def small(group: list[Any]) -> Any:
        if len(group) > 1 or (refused and len(refused) < 3):
            refused.append(len(group))
            raise MemoryError("no room for logits")
        return choices(group)

    monkeypatch.setattr(engine._passes._runner, "_choices", small)
    ids = [add(engine, tokenizer, text) for text in ("one", "two", "three", "four")]
    events = drain(engine)
    # The first pass fails for all, then for the first two alone.
    assert failures(events) == dict.fromkeys(ids[:2], "no room for logits")
    for request_id, text in ((ids[2], "three"), (ids[3], "four")):
        alone = run(make_engine(model, tokenizer), encode(tokenizer, text))
        assert completions(events)[request_id].token_ids == alone.token_ids


def test_an_allocation_that_fails_while_encoding(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, tokenizer)
    visual = model.visual.forward

    def small(rows: torch.Tensor, grids: Any) -> torch.Tensor:
        if len(grids) > 2:
            raise MemoryError("no room for so many pairs")
        return visual(rows, grids)  # type: ignore[no-any-return]

    monkeypatch.setattr(model.visual, "forward", small)
    bad = add(engine, tokenizer, "one ", look(pair(1), pair(2), pair(3)), " say")
    good = add(engine, tokenizer, "two ", look(pair(4)), " say")
    events = drain(engine)
    assert failures(events) == {bad: "no room for so many pairs"}
    assert set(completions(events)) == {good}


def test_a_pass_that_fails_is_repeated_for_each_alone(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, tokenizer)
    forward = engine._passes._runner.forward

    def picky(chunks: Any, features: Any) -> Any:
        if any(chunk.sequence.request_id == 2 for chunk in chunks):
            raise RuntimeError("not this one")
        return forward(chunks, features)

    monkeypatch.setattr(engine._passes._runner, "forward", picky)
    for text in ("one", "two", "three"):
        add(engine, tokenizer, text)
    events = drain(engine)
    assert failures(events) == {2: "not this one"}
    for request_id, text in ((1, "one"), (3, "three")):
        alone = run(make_engine(model, tokenizer), encode(tokenizer, text))
        assert completions(events)[request_id].token_ids == alone.token_ids


def test_a_constraint_that_raises_fails_its_request_alone(model: Any, tokenizer: Tokenizer) -> None:
    class Broken:
        def mask(self, logits: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such state")

        def advance(self, token_id: int) -> None: ...

    engine = make_engine(model, tokenizer)
    bad = add(engine, tokenizer, "one", constraint=Broken())
    good = add(engine, tokenizer, "two")
    events = drain(engine)
    assert failures(events) == {bad: "no such state"} and set(completions(events)) == {good}


def test_pins_that_leave_no_room_are_named(model: Any, tokenizer: Tokenizer) -> None:
    engine = make_engine(model, tokenizer, num_pages=30)
    prompt = encode(tokenizer, "a" * 60)
    run(engine, prompt)
    pin = engine.pin(prompt)
    add(engine, tokenizer, "b" * 80)
    (error,) = failures(drain(engine)).values()
    assert "are free beside pinned ones" in error
    assert run(engine, prompt).reuse.tokens_prefilled == 1  # what is pinned is still there
    pin.release()
    add(engine, tokenizer, "b" * 80)
    assert completions(drain(engine))


def test_pages_that_run_out_while_decoding_alone_are_named(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer, num_pages=30)
    prompt = encode(tokenizer, "a" * 60)
    run(engine, prompt)
    pin = engine.pin(prompt)
    other = add(engine, tokenizer, "b" * 8, sampling=LONG)
    events = drain(engine)
    assert "are free beside pinned ones" in failures(events)[other]
    assert len([e for e in events if e.request_id == other]) > 8  # it got as far as pages reach
    pin.release()
    again = add(engine, tokenizer, "b" * 8, sampling=LONG)
    assert len(completions(drain(engine))[again].token_ids) == LONG.max_tokens


def test_pages_computed_twice_are_given_back_by_preempting_oneself(
    model: Any, tokenizer: Tokenizer
) -> None:
    """Two that share too little to wait for each other hold its pages twice, and the second's
    later pages hang under the first's: nothing can be evicted when it needs the last page."""
    num_pages = 40
    common = encode(tokenizer, "c").extended(range(10, 17))  # 2 pages of 4
    short, long = common.extended(range(20, 44)), common.extended(range(50, 138))
    sampling = SamplingParams(max_tokens=4 * (num_pages - 1) - len(long), ignore_eos=True)
    engine = make_engine(model, tokenizer, num_pages=num_pages)
    engine.add(GenerationRequest(short, sampling=GREEDY))
    request = engine.add(GenerationRequest(long, sampling=sampling))
    done = completions(drain(engine))
    alone = run(make_engine(model, tokenizer), long, sampling=sampling)
    assert done[request].token_ids == alone.token_ids
    assert engine.stats()["scheduler"]["preemptions"] > 0


def test_drafts_leave_room_in_a_pass(
    model: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = run(make_engine(model, tokenizer), encode(tokenizer, "hello"), sampling=LONG)
    engine = make_engine(model, tokenizer, max_sequences=6, max_batch_tokens=8)
    forward, rows = engine._passes._runner.forward, []

    def counted(chunks: Any, features: Any) -> Any:
        rows.append(sum(chunk.num_rows for chunk in chunks))
        return forward(chunks, features)

    monkeypatch.setattr(engine._passes._runner, "forward", counted)
    for member in range(6):
        earlier = [answer.token_ids]
        add(engine, tokenizer, "hello", sampling=LONG, member=member, earlier_answers=earlier)
    assert len(completions(drain(engine))) == 6 and max(rows) <= 8


def test_constraints_follow_every_accepted_token(model: Any, tokenizer: Tokenizer) -> None:
    class Even:
        """Only even ids, and a memory of what was generated."""

        def __init__(self) -> None:
            self.seen: list[int] = []

        def mask(self, logits: torch.Tensor) -> torch.Tensor:
            logits = logits.clone()
            logits[1::2] = -torch.inf
            return logits

        def advance(self, token_id: int) -> None:
            self.seen.append(token_id)

    prompt, constraint = encode(tokenizer, "hello"), Even()
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    first = run(
        make_engine(model, tokenizer, draft_tokens=0),
        prompt,
        sampling=sampling,
        constraint=constraint,
    )
    assert first.token_ids == constraint.seen and all(t % 2 == 0 for t in first.token_ids)
    again = run(
        make_engine(model, tokenizer),
        prompt,
        sampling=sampling,
        constraint=Even(),
        earlier_answers=[first.token_ids],
    )
    assert again.token_ids == first.token_ids and again.reuse.tokens_accepted > 4
