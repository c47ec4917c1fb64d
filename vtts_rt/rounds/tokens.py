"""Tokens without rounds: a prompt continued, token ids scored, the features of a transcript."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from vtts_rt import process
from vtts_rt.checks import UNICODE, Rule, check, is_whole
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.errors import BadRequest
from vtts_rt.models.tokenizer import EncodedPrompt, encode_prompt, least_tokens
from vtts_rt.rounds.ask import SAMPLING, Ask, Videos
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.prepare import Resources
from vtts_rt.rounds.scheduler import Output, RequestFailed
from vtts_rt.rounds.streams import seconds_left
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.types import Prompt, SamplingParams, TimeLabel, require
from vtts_rt.video.store import StoreProvider


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
    "transcript": (lambda v: isinstance(v, Transcript), "a Transcript"),
}


def generation(
    engine: Engine, prompt: str | Prompt, sampling: SamplingParams | None
) -> GenerationRequest:
    """The request of `Runtime.generate`; BadRequest for what it does not take."""
    check("generate", _TOKEN_RULES, {"prompt": prompt, "sampling": sampling})
    encoded = encode(engine, "generate", prompt)
    return GenerationRequest(encoded, sampling=sampling or SamplingParams())


def score(
    driver: Driver,
    resources: Resources,
    prompt: str | Prompt | Transcript,
    token_ids: Sequence[int] | None,
    videos: Videos,
) -> list[float]:
    """See `Runtime.score`."""
    vocab = resources.engine.model.config.language.vocab_size
    with ExitStack() as stack:
        if isinstance(prompt, Transcript):
            rule = "left out with a Transcript, which has its own"
            require("score", "token_ids", token_ids, token_ids is None, rule)
            provider = _frames(resources, stack, "score", prompt, videos)
            turns, parity = list(prompt.turns()), prompt.parity
        else:
            check("score", _TOKEN_RULES, {"prompt": prompt, "token_ids": token_ids})
            require("score", "videos", videos, videos is None, "left out without a Transcript")
            assert token_ids is not None  # checked
            turns = [(encode(resources.engine, "score", prompt), [int(i) for i in token_ids])]
            provider, parity = None, "release"  # text has the same positions under both
        scores: list[float] = []
        for before, ids in turns:
            require("score", "token_ids", ids, max(ids, default=0) < vocab, f"ids below {vocab}")
            request = GenerationRequest(before, provider, parity=parity, forced_ids=ids)
            scores += complete(driver, request).logprobs if ids else []
    return scores


def features(
    driver: Driver,
    resources: Resources,
    transcript: Transcript,
    videos: Videos,
) -> Tensor:
    """See `Runtime.features`."""
    check("features", _TOKEN_RULES, {"transcript": transcript})
    prompt = transcript.before(len(transcript.token_ids))
    with ExitStack() as stack:
        provider = _frames(resources, stack, "features", transcript, videos)
        return driver.call(lambda: resources.engine.features(prompt, provider))


def _frames(
    resources: Resources,
    stack: ExitStack,
    what: str,
    transcript: Transcript,
    videos: Videos,
) -> StoreProvider | None:
    """The frames of a transcript's videos; None where only what is cached is to be used."""
    if videos is None:
        return None
    sources = resources.open(stack, Ask(videos, what, what=what))
    for pair in (pair for span in transcript.spans for pair in span.segment.pairs):
        ids = [source.metadata.video_id for source in sources]
        same = pair.video < len(ids) and ids[pair.video] == pair.video_id
        require(what, "videos", ids, same, "those of the transcript in their order, opened alike")
    provider = resources.store.provider(sources)
    stack.callback(provider.cancel)
    return provider


@process.native_calls()
def encode(engine: Engine, what: str, prompt: str | Prompt) -> EncodedPrompt:
    """The tokens of a prompt; BadRequest where it has no chance to fit."""
    whole = Prompt((prompt,)) if isinstance(prompt, str) else prompt
    check(what, {"prompt": UNICODE}, {"prompt": engine.model.chat.text(whole)})
    budget = engine.token_budget
    num_tokens = least_tokens(engine.tokenizer, whole, budget)
    if num_tokens > budget:
        rule = f"prompt must be <= {budget} tokens"
        raise BadRequest(f"{what}: {rule}, got at least {num_tokens}")
    return encode_prompt(engine.tokenizer, whole)


def complete(
    driver: Driver, request: GenerationRequest, ticket: Ticket | None = None
) -> Completion:
    """The completion of a plain generation; TimeoutError where its time passes before it begins.

    ticket: a place that it has already.
    """
    if ticket is None:
        with driver.admit() as ticket:
            return complete(driver, request, ticket)
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    driver.submit(ticket, request, outputs.put)
    try:
        output = outputs.get(timeout=seconds_left(request, ticket))
    except queue.Empty:
        raise TimeoutError("Runtime: timeout_seconds passed before the request began") from None
    if isinstance(output, RequestFailed):
        try:
            raise output.error
        finally:
            del output  # the error's traceback holds this frame
    assert isinstance(output, Completion)
    return output
