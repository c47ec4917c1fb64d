"""Tokens without rounds: a prompt continued, token ids scored, the features of a transcript."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from torch import Tensor

from vtts_rt import process
from vtts_rt.checks import UNICODE, Rule, check, is_whole
from vtts_rt.engine.engine import Engine
from vtts_rt.engine.sequence import Completion, GenerationRequest
from vtts_rt.models.tokenizer import EncodedPrompt
from vtts_rt.rounds.ask import SAMPLING, Ask, Videos
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.prepare import Resources, encode_fitting, fewest_new, too_long
from vtts_rt.rounds.scheduler import Output
from vtts_rt.rounds.streams import seconds_left, told
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
        lambda v: isinstance(v, Sequence | np.ndarray) and all(is_whole(i) and i >= 0 for i in v),
        "a list of token ids",
    ),
    "transcript": (lambda v: isinstance(v, Transcript), "a Transcript"),
}


def generate(
    driver: Driver, engine: Engine, prompt: str | Prompt, sampling: SamplingParams | None
) -> Completion:
    """See `Runtime.generate`."""
    check("generate", _TOKEN_RULES, {"prompt": prompt, "sampling": sampling})
    sampling = sampling or SamplingParams()
    encoded = encode(engine, "generate", prompt, fewest_new(sampling))
    return complete(driver, [GenerationRequest(encoded, sampling=sampling)])[0]


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
            ids = [int(i) for i in token_ids]
            before = encode(resources.engine, "score", prompt, len(ids), "token_ids")
            turns = [(before, ids)] if ids else []
            provider, parity = None, "release"  # text has the same positions under both
        for _, ids in turns:
            require("score", "token_ids", ids, max(ids) < vocab, f"ids below {vocab}")
        requests = [GenerationRequest(t, provider, parity=parity, forced_ids=i) for t, i in turns]
        return [logprob for one in complete(driver, requests) for logprob in one.logprobs]


def features(
    driver: Driver,
    resources: Resources,
    transcript: Transcript,
    videos: Videos,
) -> Tensor:
    """See `Runtime.features`."""
    check("features", _TOKEN_RULES, {"transcript": transcript})
    # To its last vision segment: all of it may be as long as the engine allows.
    prompt = transcript.before(max([1, *(s.start + s.length for s in transcript.spans)]))
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
    if videos is None or not transcript.spans:
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
def encode(
    engine: Engine, what: str, prompt: str | Prompt, num_new: int, new: str = "max_tokens"
) -> EncodedPrompt:
    """The tokens of a prompt; BadRequest where it does not fit with `num_new` more (`too_long`)."""
    whole = Prompt((prompt,)) if isinstance(prompt, str) else prompt
    check(what, {"prompt": UNICODE}, {"prompt": engine.model.chat.text(whole)})
    encoded, num_tokens = encode_fitting(engine, whole, num_new)
    if encoded is None:
        raise too_long(what, engine, num_tokens, num_new, new)
    require(what, "prompt", prompt, num_tokens > 0, "non-empty")
    return encoded


def complete(
    driver: Driver, requests: Sequence[GenerationRequest], ticket: Ticket | None = None
) -> list[Completion]:
    """The completions of plain generations, one after another and by the same weights; TimeoutError
    where the time of the first passes before it begins.

    ticket: a place that they have already.
    """
    if not requests:
        return []
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    with ticket or driver.admit() as ticket:
        driver.submit(ticket, requests, outputs.put)
        try:
            seconds = seconds_left(requests[0].deadline_seconds, ticket)
            completions: list[Completion] = told(outputs.get(timeout=seconds))
            return completions
        except queue.Empty:
            raise TimeoutError("Runtime: timeout_seconds passed before the request began") from None
