"""Tokens without rounds: a prompt continued, token ids scored."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence

from vtts_rt import process
from vtts_rt.checks import UNICODE, Rule, check, is_whole
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.errors import BadRequest
from vtts_rt.models.tokenizer import EncodedPrompt, encode_prompt, least_tokens
from vtts_rt.rounds.ask import SAMPLING
from vtts_rt.rounds.driver import Driver
from vtts_rt.rounds.scheduler import Output, RequestFailed
from vtts_rt.types import Prompt, SamplingParams, TimeLabel, require


def _is_prompt(value: object) -> bool:
    parts = value.parts if isinstance(value, Prompt) else (value,)
    return all(isinstance(part, str | TimeLabel) for part in parts)


_TOKEN_RULES: dict[str, Rule] = {
    "prompt": (_is_prompt, "text only, or a Prompt of text, without vision segments (use ask)"),
    "sampling": SAMPLING,
    "token_ids": (
        lambda v: not isinstance(v, Mapping) and all(is_whole(i) and i >= 0 for i in v),
        "a list of token ids",
    ),
}


def generation(
    engine: Engine, prompt: str | Prompt, sampling: SamplingParams | None
) -> GenerationRequest:
    """The request of `Runtime.generate`; BadRequest for what it does not take."""
    check("generate", _TOKEN_RULES, {"prompt": prompt, "sampling": sampling})
    encoded = _encode_text(engine, "generate", prompt)
    return GenerationRequest(encoded, sampling=sampling or SamplingParams())


def scoring(engine: Engine, prompt: str | Prompt, token_ids: Sequence[int]) -> GenerationRequest:
    """The request of `Runtime.score`; BadRequest for what it does not take."""
    check("score", _TOKEN_RULES, {"prompt": prompt, "token_ids": token_ids})
    ids, size = [int(index) for index in token_ids], engine.model.config.language.vocab_size
    require("score", "token_ids", ids, max(ids, default=0) < size, f"ids below {size}")
    return GenerationRequest(_encode_text(engine, "score", prompt), forced_ids=ids)


@process.native_calls()
def _encode_text(engine: Engine, what: str, prompt: str | Prompt) -> EncodedPrompt:
    """The tokens of a text prompt; BadRequest where it has no chance to fit."""
    whole = Prompt((prompt,)) if isinstance(prompt, str) else prompt
    check(what, {"prompt": UNICODE}, {"prompt": engine.model.chat.text(whole)})
    budget = engine.token_budget
    num_tokens = least_tokens(engine.tokenizer, whole, budget)
    if num_tokens > budget:
        rule = f"prompt must be <= {budget} tokens"
        raise BadRequest(f"{what}: {rule}, got at least {num_tokens}")
    return encode_prompt(engine.tokenizer, whole)


def complete(driver: Driver, request: GenerationRequest) -> Completion:
    """The completion of a plain generation."""
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    with driver.admit() as ticket:
        driver.submit(ticket, request, outputs.put)
        output = outputs.get()
    if isinstance(output, RequestFailed):
        try:
            raise output.error
        finally:
            del output  # the error's traceback holds this frame
    assert isinstance(output, Completion)
    return output
