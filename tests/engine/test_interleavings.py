"""Random interleavings of everything an engine can be asked for.

After every action the books balance, and whatever finished says exactly what the same request
says alone, without any cache, batch or draft: tokens and the bits of log-probabilities.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engine_tools import Frames, in_dtypes, make_engine, run
from interleaving_tools import Interleaving, flip
from utils import seeds

from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.models.tokenizer import Tokenizer

ALONE: dict[Any, Completion] = {}
SEEN: Counter[str] = Counter()  # what all interleavings together have exercised


def alone(engine: Engine, request: GenerationRequest, weights: int) -> Completion:
    key = (
        engine.model.dtype,
        weights,
        tuple(request.prompt.token_ids),
        tuple(p for span in request.prompt.spans for p in span.segment.pairs),
        request.sampling,
        request.member,
    )
    if key not in ALONE:
        flip(engine.model, weights)
        ALONE[key] = run(
            engine,
            request.prompt,
            Frames(),
            sampling=request.sampling,
            member=request.member,
        )
    return ALONE[key]


@pytest.fixture(scope="module")
def caching_nothing(model: Any, tokenizer: Tokenizer) -> Engine:
    with torch.no_grad():
        model.language.layers[0].mlp.down_proj.weight.view(-1)[0].abs_()
    return make_engine(
        model, tokenizer, prefix_cache=False, vision_cache_bytes=0, draft_tokens=0, max_sequences=1
    )


@in_dtypes
@pytest.mark.parametrize("seed", seeds(10, 200))
def test_whatever_happens_every_output_is_that_of_the_request_alone(
    model: Any, tokenizer: Tokenizer, caching_nothing: Engine, seed: int
) -> None:
    flip(model, 0)
    interleaving = Interleaving(seed, model, tokenizer)
    interleaving.run()
    assert interleaving.done
    stats = interleaving.engine.stats()
    SEEN["interleavings"] += 1
    SEEN.update(stats["scheduler"])
    for cache in ("prefix_tree", "vision_cache"):
        SEEN.update({f"{cache} {name}": stats[cache][name] for name in ("hits", "evictions")})
    for weights, request, completion in interleaving.done:
        expected = alone(caching_nothing, request, weights)
        count = len(completion.token_ids)
        if completion.finish_reason == "aborted":
            assert completion.token_ids == expected.token_ids[:count]
        else:
            assert completion.token_ids == expected.token_ids
            assert completion.text == expected.text
        assert completion.logprobs == expected.logprobs[:count]
        reuse = completion.reuse
        if completion.finish_reason != "aborted":
            assert reuse.tokens_prefilled + reuse.tokens_reused == completion.num_prompt_tokens


def test_the_interleavings_met_what_they_are_for() -> None:
    for what in (
        "preemptions",
        "tokens_recomputed",
        "prefix_tree hits",
        "prefix_tree evictions",
        "vision_cache hits",
        "vision_cache evictions",
    ):
        assert SEEN[what] > SEEN["interleavings"], what
    assert SEEN["tokens_drafted"] > SEEN["tokens_accepted"] > 0
