"""Logits before a token is chosen, against the processors of transformers and the formulas that
OpenAI and vLLM document."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process as hf

from vtts_rt.ops.logits import LogitsRules, Penalties, penalised
from vtts_rt.ops.sampling import processed_logits
from vtts_rt.sampling import ResolvedSampling, generation_defaults, resolve
from vtts_rt.types import SamplingParams

VOCAB, ENDS = 60, (58, 59)
NUM_SETTINGS = 150


def drawn(rng: random.Random) -> dict[str, Any]:
    """A random generation_config.json of all that is honoured."""
    ids = lambda n: [rng.randrange(VOCAB) for _ in range(rng.randint(1, n))]  # noqa: E731
    settings = {
        "do_sample": rng.random() < 0.7,
        "temperature": rng.choice((1.0, 0.7, 1e-6, 3.0)),
        "top_k": rng.choice((0, 1, 5, 50, 1000)),
        "top_p": rng.choice((1.0, 0.9, 0.5, 0.001)),
        "repetition_penalty": rng.choice((1.0, 1.05, 1.5, 0.8)),
        "no_repeat_ngram_size": rng.choice((0, 0, 1, 2, 3)),
        "min_new_tokens": rng.choice((0, 2, 6)),
        "suppress_tokens": ids(6),
        "begin_suppress_tokens": ids(6),
        "bad_words_ids": [ids(3) for _ in range(rng.randint(1, 4))],
    }
    names = rng.sample(list(settings), rng.randint(1, len(settings)))
    return {name: settings[name] for name in names}


def theirs(
    config: dict[str, Any], prompt: list[int], answer: list[int], logits: torch.Tensor
) -> torch.Tensor:
    """Scores after what transformers' `generate` would build for a config."""
    made = GenerationConfig(**config)
    made.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    made._eos_token_tensor = torch.tensor(ENDS)
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda processors, more: processors,
    )
    processors = GenerationMixin._get_logits_processor(
        model, made, input_ids_seq_length=len(prompt), device="cpu"
    )
    return processors(torch.tensor([prompt + answer]), logits[None].clone())[0]


def rules_of(sampling: ResolvedSampling, prompt: list[int], answer: list[int]) -> Any:
    rules = LogitsRules.of(sampling, prompt, end_ids=ENDS, vocab_size=VOCAB, num_new=20)
    for token in answer if rules is not None else ():
        rules.append(token)
    return rules


@pytest.mark.parametrize("seed", range(NUM_SETTINGS))
def test_scores_are_those_of_transformers_to_the_bit(seed: int) -> None:
    rng = random.Random(seed)
    config = drawn(rng)
    sampling = resolve(SamplingParams(), generation_defaults(config))
    prompt = [rng.randrange(12) for _ in range(rng.randint(1, 12))]
    answer = [rng.randrange(12) for _ in range(rng.randint(0, 8))]
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        logits = logits.bfloat16().float()  # ties
    rules = rules_of(sampling, prompt, answer)
    found = logits if rules is None else rules(logits, len(answer))
    found = processed_logits(found, sampling)
    assert torch.equal(found, theirs(config, prompt, answer, logits)), config


def test_order_of_bias_and_penalties() -> None:
    """OpenAI's formula, after bias and repetition penalty, as vLLM computes it."""
    sampling = ResolvedSampling(
        logit_bias={3: 5.0, 7: -100.0},
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=-1.5,
    )
    prompt, answer = [1, 2, 2], [2, 3, 3, 3, 4]
    logits = torch.linspace(-3, 3, VOCAB)
    biased = logits.clone()
    biased[3] += 5.0
    biased[7] -= 100.0
    expected = biased.clone()
    for token in (1, 2, 3, 4):
        expected[token] = biased[token] * 2 if biased[token] < 0 else biased[token] / 2
    for token in (2, 3, 4):
        expected[token] -= 0.5 * answer.count(token) - 1.5
    found = rules_of(sampling, prompt, answer)(logits, len(answer))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    bias = hf.SequenceBiasLogitsProcessor([[[3], 5.0], [[7], -100.0]])
    penalty = hf.RepetitionPenaltyLogitsProcessor(2.0)
    ids = torch.tensor([prompt + answer])
    alone = ResolvedSampling(logit_bias=sampling.logit_bias, repetition_penalty=2.0)
    found = rules_of(alone, prompt, answer)(logits, len(answer))
    assert torch.equal(found, penalty(ids, bias(ids, logits[None]))[0])


def test_min_tokens_forbids_ends_until_then() -> None:
    rules = rules_of(ResolvedSampling(min_tokens=3), [1], [])
    for position in range(5):
        kept = rules(torch.zeros(VOCAB), position).isfinite()
        assert kept[list(ENDS)].tolist() == [position >= 3] * 2 and kept[:58].all()


def test_rows_of_a_batch_and_drafts_are_those_of_single_rows() -> None:
    """A row after some drafts is that of a sequence that has taken them; rows without penalties
    keep their bits beside others."""
    settings = [
        ResolvedSampling(repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=4),
        ResolvedSampling(),
        ResolvedSampling(suppress_tokens=(4, 5)),
        ResolvedSampling(presence_penalty=1.0, logit_bias={0: 2.0}),
    ]
    prompts, answer, drafts = ([1, 2], [3], [4, 4], [0, 5]), [7, 1], [1, 9]
    logits = torch.randn(4, VOCAB)
    rows = [(rules_of(s, p, answer), drafts) for s, p in zip(settings, prompts, strict=True)]
    penalties = Penalties.of(rows, torch.device("cpu"))
    assert penalties is not None
    found = penalised(logits, penalties, torch.full((4,), 4))
    for row, (sampling, prompt) in enumerate(zip(settings, prompts, strict=True)):
        rules = rules_of(sampling, prompt, answer + drafts)
        alone = logits[row] if rules is None else rules(logits[row], 4)
        assert torch.equal(found[row], alone), row
    assert Penalties.of([(None, ()), (None, ())], torch.device("cpu")) is None


def test_tokens_outside_the_vocabulary() -> None:
    """Those that must not come do not come; one to be raised is a mistake."""
    sampling = ResolvedSampling(suppress_tokens=(VOCAB, 10**9), bad_words_ids=((1, VOCAB),))
    assert rules_of(sampling, [1], []) is None
    with pytest.raises(ValueError, match=r"logit_bias must be token ids below 60, got \[60\]"):
        rules_of(ResolvedSampling(logit_bias={60: 1.0}), [1], [])
    with pytest.raises(ValueError, match="suppressed tokens must be fewer than 60, got 60"):
        rules_of(ResolvedSampling(suppress_tokens=tuple(range(60))), [1], [])
