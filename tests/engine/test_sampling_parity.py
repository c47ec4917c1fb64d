"""Sampling settings in the engine, against transformers' `generate` and against themselves in
batches, drafts, preemption and CUDA graphs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import (
    Frames,
    encode,
    finish,
    look,
    make_engine,
    pair,
    run,
    run_all,
    score,
    stream,
)
from graph_tools import give_graphs, with_stand_ins
from utils import VOCAB_SIZE, tiny_checkpoint

from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import load_model
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.sampling import generation_defaults
from vtts_rt.types import SamplingParams

NUM_TOKENS = 16
ENDS = list(range(5, VOCAB_SIZE, 20))  # so many that greedy answers hold some


@dataclass
class Case:
    """A request and what transformers makes of it."""

    prompt: EncodedPrompt
    config: dict[str, Any]
    tokens: list[int]
    logprobs: list[float]

    def request(self, **more: Any) -> GenerationRequest:
        params = replace(generation_defaults(self.config), max_tokens=NUM_TOKENS)
        return GenerationRequest(
            self.prompt, provider=Frames(), sampling=params, parity="transformers", **more
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration as Net

    return Net.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder).double()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(Tokenizer.from_pretrained(folder, CHAT)._backend, CHAT, ENDS)


def drawn(rng: random.Random) -> dict[str, Any]:
    """A random generation_config.json that generates greedily."""
    ids = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    settings = {
        "temperature": 0.5,
        "repetition_penalty": rng.choice((1.05, 1.5, 0.9)),
        "no_repeat_ngram_size": rng.choice((1, 2, 3)),
        "min_new_tokens": rng.choice((3, 9)),
        "suppress_tokens": ids,
        "begin_suppress_tokens": ids[:9],
        "bad_words_ids": [ids[:1], ids[1:3], ids[3:5]],
    }
    names = rng.sample(list(settings), rng.randint(1, 3))
    return {name: settings[name] for name in names}


def prompt_of(rng: random.Random, tokenizer: Tokenizer) -> EncodedPrompt:
    texts = ("look ", "look at this card ", "what is on the red card? say ")
    looks = [look(*map(pair, rng.sample(range(6), 2))) for _ in range(rng.randrange(3))]
    return encode(tokenizer, rng.choice(texts), *looks, rng.choice(texts), " answer: ")


def generated(theirs: Any, prompt: EncodedPrompt, config: dict[str, Any]) -> Case:
    ids = torch.tensor([prompt.token_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    segments = [span.segment for span in prompt.spans]
    if segments:
        jobs = [
            PatchifyJob(Frames.frame(p.frame_a), Frames.frame(p.frame_b), s.box, s.resized_hw)
            for s in segments
            for p in s.pairs
        ]
        inputs |= {
            "mm_token_type_ids": (ids == theirs.config.video_token_id).int() * 2,
            "pixel_values_videos": patchify(jobs, GEOMETRY).double(),
            "video_grid_thw": torch.tensor([s.grid_thw for s in segments]),
            "second_per_grid_ts": torch.tensor([s.seconds_per_grid for s in segments]),
        }
    with torch.inference_mode():
        out = theirs.generate(
            **inputs,
            **config,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=ENDS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    tokens = out.sequences[0, ids.shape[1] :].tolist()
    pairs = zip(out.scores, tokens, strict=True)
    return Case(prompt, config, tokens, [float(s[0].log_softmax(0)[t]) for s, t in pairs])


def cases_of(theirs: Any, tokenizer: Tokenizer, seeds: range) -> list[Case]:
    rngs = [random.Random(seed) for seed in seeds]
    return [generated(theirs, prompt_of(rng, tokenizer), drawn(rng)) for rng in rngs]


@pytest.fixture(scope="module")
def cases(theirs: Any, tokenizer: Tokenizer) -> list[Case]:
    return cases_of(theirs, tokenizer, range(14))


def misleading(case: Case, rng: random.Random) -> list[list[int]]:
    """Drafts of which many are right."""
    return [[rng.choice((t, t, t, t + 1)) % VOCAB_SIZE for t in case.tokens]]


def check(cases: list[Case], found: list[Completion]) -> None:
    for case, completion in zip(cases, found, strict=True):
        assert completion.token_ids == case.tokens, case.config
        assert completion.logprobs == pytest.approx(case.logprobs, abs=1e-5), case.config
        ended = completion.token_ids[-1] in ENDS
        assert completion.finish_reason == ("stop" if ended else "length")


def test_tokens_of_transformers_generate(
    cases: list[Case], model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer, draft_tokens=0)
    check(cases, [finish(stream(engine, case.request())) for case in cases])
    assert len({name for case in cases for name in case.config}) == 7
    assert {len(case.tokens) == NUM_TOKENS for case in cases} == {True, False}
    assert any(case.prompt.spans for case in cases)


def test_batches_drafts_and_preemption_change_no_token(
    cases: list[Case], model: Any, tokenizer: Tokenizer
) -> None:
    rng = random.Random(1)
    engine = make_engine(model, tokenizer, num_pages=18, max_sequences=6)
    requests = [case.request(earlier_answers=misleading(case, rng)) for case in cases]
    check(cases, run_all(engine, requests))
    counts = engine.stats()["scheduler"]
    assert counts["preemptions"] > 1
    assert counts["tokens_drafted"] > counts["tokens_accepted"] > 20


@pytest.mark.parametrize("draft_tokens", [0, 5])
def test_graphs_carry_penalties(
    cases: list[Case],
    model: Any,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    draft_tokens: int,
) -> None:
    """Penalties, biases and min_tokens run in graphs, and ahead; runs of tokens do not."""
    with_stand_ins(monkeypatch)
    monkeypatch.setattr("vtts_rt.engine.decode_step._LEAST_HISTORY", 4)  # so that it has to grow
    rng = random.Random(2)
    engine = make_engine(model, tokenizer, draft_tokens=draft_tokens)
    give_graphs(engine)
    early = [misleading(case, rng) if draft_tokens else [] for case in cases]
    in_graphs = [{"no_repeat_ngram_size", "bad_words_ids"}.isdisjoint(c.config) for c in cases]
    for kept in (True, False):
        some = [case for case, it in zip(cases, in_graphs, strict=True) if it == kept]
        drafts = [draft for draft, it in zip(early, in_graphs, strict=True) if it == kept]
        requests = [c.request(earlier_answers=d) for c, d in zip(some, drafts, strict=True)]
        check(some, run_all(engine, requests))
        stats = engine.stats()["passes"]
        if kept and not draft_tokens:
            assert stats["graph_replays"] > 10 and stats["steps_ahead"] > 5
            assert set(stats["eager_steps"]) == {"prefill"}
    reasons = engine.stats()["passes"]["eager_steps"]
    assert ("drafts" if draft_tokens else "masked or forced tokens") in reasons


def sampled() -> list[SamplingParams]:
    base = SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [
        base,
        replace(base, frequency_penalty=1.5, logit_bias={9: 4.0}),
        replace(base, presence_penalty=2.0, top_p=0.9, logprobs="raw"),
        replace(base, repetition_penalty=1.4, top_k=20, temperature=0.7),
        replace(base, stop_token_ids=range(0, 400, 7), min_tokens=6, ignore_eos=False),
        replace(base, temperature=1e-6, repetition_penalty=1.05, logprobs="raw"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_seed_gives_the_same_tokens_in_any_batch(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = load_model(folder).to(dtype)
    prompt = encode(tokenizer, "look ", look(pair(1)), " say")
    requests = [
        GenerationRequest(prompt, provider=Frames(), sampling=params, member=member)
        for member, params in enumerate(sampled())
    ]
    alone = []
    for request in requests:
        engine = make_engine(model, tokenizer, draft_tokens=0, prefix_cache=False)
        alone += run_all(engine, [request])
    drafted = [
        replace(r, earlier_answers=[a.token_ids]) for r, a in zip(requests, alone, strict=True)
    ]
    small = {"num_pages": 16, "max_sequences": 4}
    crowds = [run_all(make_engine(model, tokenizer, **small), drafted)]
    with_stand_ins(monkeypatch)
    in_graphs = ((0, requests), (15, drafted)) if dtype is torch.float64 else ()
    for draft_tokens, asked in in_graphs:
        engine = make_engine(model, tokenizer, draft_tokens=draft_tokens)
        give_graphs(engine)
        crowds.append(run_all(engine, asked))
    for crowd in crowds:
        for one, other in zip(alone, crowd, strict=True):
            assert (one.token_ids, one.text) == (other.token_ids, other.text)
            most = 1e-5 if dtype is torch.float64 else 0.0  # cascades of graphs sum in parts
            assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=most)
    assert len({tuple(one.token_ids) for one in alone}) == len(alone)
    ended = alone[4]
    assert 7 <= len(ended.token_ids) < NUM_TOKENS and ended.finish_reason == "stop"
    assert ended.token_ids[-1] % 7 == 0 and all(t % 7 for t in ended.token_ids[:-1])


def test_logprobs_are_of_the_processed_or_of_the_models_own_distribution(
    model: Any, tokenizer: Tokenizer
) -> None:
    engine = make_engine(model, tokenizer)
    prompt = encode(tokenizer, "tell me")
    params = SamplingParams(temperature=0.5, top_p=0.8, presence_penalty=1.0, max_tokens=8)
    processed, raw = (
        run(engine, prompt, sampling=replace(params, logprobs=kind))
        for kind in ("processed", "raw")
    )
    assert processed.token_ids == raw.token_ids
    own = score(engine, prompt, raw.token_ids)
    assert raw.logprobs == pytest.approx(own, abs=1e-5)
    scored = score(engine, prompt, raw.token_ids, sampling=params)
    assert scored == pytest.approx(processed.logprobs, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(own, processed.logprobs, strict=True)) > 0.1


def test_the_checkpoint_fills_what_a_request_leaves_unset(
    theirs: Any, model: Any, tokenizer: Tokenizer
) -> None:
    """In generate as in ask; scores stay the model's own."""
    config = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 9}
    prompt = encode(tokenizer, "look at this card")
    case, plain = (generated(theirs, prompt, settings) for settings in (config, {}))
    engine = make_engine(model, tokenizer)
    own = score(engine, prompt, case.tokens)
    with pytest.MonkeyPatch.context() as patch:
        settings = replace(model.config, sampling=generation_defaults(config))
        patch.setattr(model, "config", settings)
        for explicit, expected in (
            ({}, case),
            ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_tokens": 0}, plain),
        ):
            params = SamplingParams(max_tokens=NUM_TOKENS, **explicit)
            found = run(engine, prompt, sampling=params)
            assert found.token_ids == expected.tokens
        again = score(engine, prompt, case.tokens)
    assert again == own and plain.tokens != case.tokens


@pytest.mark.slow
def test_tokens_of_transformers_generate_over_many_settings(
    theirs: Any, model: Any, tokenizer: Tokenizer
) -> None:
    cases = cases_of(theirs, tokenizer, range(100, 220))
    rng = random.Random(3)
    engine = make_engine(model, tokenizer, num_pages=60, max_sequences=8)
    requests = [case.request(earlier_answers=misleading(case, rng)) for case in cases]
    check(cases, run_all(engine, requests))
