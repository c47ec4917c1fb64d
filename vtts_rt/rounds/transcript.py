"""Transcript: one sequence as it was shown and said, what a trainer reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vtts_rt.engine.sequence import Completion
from vtts_rt.models.tokenizer import EncodedPrompt, VisionSpan
from vtts_rt.types import Parity


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """The N tokens of a round's prompt and answer; of `append`, of the conversation so far.

    token_ids: (N,) int64, the pads of a vision segment as many as its tokens. generated: (N,) bool,
    what the model said, end token included. logprobs: (N,) float64, natural log, of the generated
    tokens when they were drawn (SamplingParams.logprobs says of which distribution), NaN elsewhere.
    spans: the vision segments and where their pads stand. position_ids: (3, N) int64, M-RoPE, as
    the engine computed them, of `parity`. weights_version: of the weights that generated the last
    answer.
    """

    token_ids: np.ndarray
    generated: np.ndarray
    logprobs: np.ndarray
    spans: tuple[VisionSpan, ...]
    position_ids: np.ndarray
    weights_version: int
    parity: Parity

    @classmethod
    def of_round(
        cls,
        prompt: EncodedPrompt,
        completion: Completion,
        parity: Parity,
        before: Transcript | None,
    ) -> Transcript:
        """before: of the round whose conversation the prompt goes on with, if any."""
        token_ids = np.array([*prompt.token_ids, *completion.token_ids], np.int64)
        generated = np.arange(len(token_ids)) >= len(prompt)
        logprobs = np.full(len(token_ids), np.nan)
        logprobs[len(prompt) :] = completion.logprobs
        if before is not None:
            # The end of its last turn may be another token than the model said.
            num = min(len(before.token_ids), len(prompt))
            num -= int(before.token_ids[num - 1] != token_ids[num - 1])
            generated[:num], logprobs[:num] = before.generated[:num], before.logprobs[:num]
        position_ids, version = completion.position_ids, completion.weights_version
        return cls(token_ids, generated, logprobs, prompt.spans, position_ids, version, parity)

    def before(self, end: int) -> EncodedPrompt:
        """Its first `end` tokens, which end outside a vision segment, as a prompt."""
        spans = tuple(span for span in self.spans if span.start < end)
        return EncodedPrompt(self.token_ids[:end].tolist(), spans, np.zeros(end, np.uint8))

    def turns(self) -> Iterator[tuple[EncodedPrompt, list[int]]]:
        """What the model said, turn by turn, each with all that stands before it."""
        edges = np.flatnonzero(np.diff(self.generated, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2).tolist():
            yield self.before(start), self.token_ids[start:end].tolist()
