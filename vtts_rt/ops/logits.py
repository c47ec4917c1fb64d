"""Changes of the logits of a sequence before a token is chosen.

In this order:

1.  logit_bias                                  added
2.  end tokens and stop ids before min_tokens   -inf
3.  suppress_tokens; begin_suppress_tokens, single bad words   -inf
4.  repetition_penalty                          tokens of prompt and answer
5.  frequency_penalty, presence_penalty         tokens of the answer
6.  no_repeat_ngram_size, longer bad words      -inf
7.  a grammar (rounds/grammar.py)               -inf
8.  temperature, top_k, top_p                   ops/sampling.py

That is the order of transformers' `_get_logits_processor` (5.24; what is -inf stays so, wherever it
became so) and of vLLM (logit_bias, repetition, frequency, presence, temperature, top-k and top-p).

Legend: N rows, V vocabulary, H tokens remembered, B tokens biased.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtts_rt.sampling import ResolvedSampling
from vtts_rt.types import require

_ALWAYS = 2**62  # tokens; no answer is as long


class Penalties(NamedTuple):
    """Steps 1 to 5 for the rows of a batch.

    repetition, presence, frequency: (N,) float32. history: (N, H) int64 token ids, of which the
    first `num_history` (N,) int64 count, and the first `num_seen` of these as tokens of the prompt
    alone. biased, until: (N, B) int64, bias: (N, B) float32: what is added to the logits of which
    token for as long as fewer than `until` tokens are generated. H or B may be 0.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    num_seen: Tensor
    num_history: Tensor
    history: Tensor
    biased: Tensor
    bias: Tensor
    until: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[tuple[LogitsRules | None, Sequence[int]]], device: torch.device
    ) -> Penalties | None:
        """Of rows with their rules, after some more tokens of the answer (drafts); None where no
        row has any. Moved there without waiting for the device."""
        if all(rules is None for rules, _ in rows):
            return None
        num = len(rows)
        most = max(rules.num_history + len(more) for rules, more in rows if rules is not None)
        wide = max(rules.num_biased for rules, _ in rows if rules is not None)
        floats, bias = np.zeros((3, num), np.float32), np.zeros((num, wide), np.float32)
        floats[0] = 1.0
        counts = np.zeros((2, num), np.int64)
        history = np.zeros((num, most), np.int64)
        biased, until = np.zeros((2, num, wide), np.int64)
        for row, (rules, more) in enumerate(rows):
            if rules is not None:
                floats[:, row] = rules.factors
                counts[:, row] = rules.fill(history[row], more)
                rules.fill_bias(biased[row], bias[row], until[row])
        whole = (*floats, *counts, history, biased, bias, until)
        return cls(*(torch.from_numpy(part).to(device, non_blocking=True) for part in whole))


def penalised(logits: Tensor, penalties: Penalties, positions: Tensor) -> Tensor:
    """Logits after steps 1 to 5.

    logits: (N, V) any float dtype. positions: (N,) int64, tokens generated before this one.
    Returns (N, V) float32. Asks the host nothing.
    """
    scores = logits.float()
    if penalties.biased.shape[1] > 0:
        is_active = positions[:, None] < penalties.until
        bias = torch.where(is_active, penalties.bias, 0.0)
        scores = scores.scatter_add(1, penalties.biased, bias)
    if penalties.history.shape[1] == 0:
        return scores
    size = scores.shape[1]
    column = torch.arange(penalties.history.shape[1], device=scores.device)
    is_known = column < penalties.num_history[:, None]
    is_generated = is_known & (column >= penalties.num_seen[:, None])
    ids = torch.where(is_known, penalties.history, size)  # a spare column takes the others
    counts = scores.new_zeros(len(scores), size + 1)
    counts = counts.scatter_add_(1, ids, is_generated.float()).gather(1, ids)
    scores = torch.nn.functional.pad(scores, (0, 1))
    found = scores.gather(1, ids)
    # Tokens that come twice are written twice, with equal values.
    repetition = penalties.repetition[:, None]
    found = torch.where(found < 0, found * repetition, found / repetition)
    found = found - penalties.frequency[:, None] * counts
    found = found - penalties.presence[:, None] * (counts > 0)
    return scores.scatter_(1, ids, found)[:, :size]


class LogitsRules:
    """Steps 1 to 6 of one sequence, and what they remember of it.

    factors: repetition, presence and frequency penalty. num_history, num_biased: as H and B of
    `Penalties`. needs_host: whether step 6 applies, which `Penalties` do not know.
    """

    @classmethod
    def of(
        cls,
        sampling: ResolvedSampling,
        prompt_ids: Sequence[int],
        *,
        end_ids: Collection[int],
        vocab_size: int,
        num_new: int,
    ) -> LogitsRules | None:
        """None where nothing changes logits. end_ids: what min_tokens forbids. num_new: most tokens
        that follow the prompt. ValueError for a biased token that the vocabulary does not have, or
        if no token is left."""
        rules = cls(sampling, prompt_ids, end_ids, vocab_size, num_new)
        return rules if rules.num_biased or rules.has_penalties or rules.needs_host else None

    def __init__(
        self,
        sampling: ResolvedSampling,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        vocab_size: int,
        num_new: int,
    ) -> None:
        # An end token alone is no bad word (transformers).
        ends = {(token,) for token in end_ids}
        words = [w for w in sampling.bad_words_ids if w not in ends and w[-1] < vocab_size]
        forbidden = {token: _ALWAYS for token in sampling.suppress_tokens}
        forbidden |= {run[0]: _ALWAYS for run in words if len(run) == 1}
        for token in sampling.begin_suppress_tokens:
            forbidden.setdefault(token, 1)
        for token in end_ids if sampling.min_tokens else ():
            forbidden[token] = max(forbidden.get(token, 0), sampling.min_tokens)
        forbidden = {token: until for token, until in forbidden.items() if token < vocab_size}
        outside = [token for token in sampling.logit_bias if token >= vocab_size]
        what, rule = "SamplingParams", f"token ids below {vocab_size}"
        require(what, "logit_bias", outside, not outside, rule)
        left = vocab_size - len(forbidden)
        require(what, "suppressed tokens", len(forbidden), left > 0, f"fewer than {vocab_size}")
        bias, num_added = sampling.logit_bias, len(sampling.logit_bias)
        self._bias = (
            np.array([*bias, *forbidden], np.int64),
            np.array([*bias.values(), *[-np.inf] * len(forbidden)]),
            np.array([*[_ALWAYS] * num_added, *forbidden.values()], np.int64),
        )
        self.factors = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        self.has_penalties = self.factors != (1.0, 0.0, 0.0)
        seen = np.unique(np.asarray(prompt_ids if self.has_penalties else (), np.int64))
        self._num_seen = self.num_history = len(seen)
        self._history = np.zeros(self._num_seen + num_new * self.has_penalties, np.int64)
        self._history[: self._num_seen] = seen
        self._words = [run for run in words if len(run) > 1]
        self._ngram = sampling.no_repeat_ngram_size
        self._num_tokens = len(prompt_ids) if self.needs_host else 0
        self._tokens = np.zeros(self._num_tokens + num_new * self.needs_host, np.int64)
        self._tokens[: self._num_tokens] = prompt_ids if self.needs_host else []

    @property
    def num_biased(self) -> int:
        return len(self._bias[0])

    @property
    def needs_host(self) -> bool:
        return bool(self._ngram or self._words)

    def append(self, token_id: int) -> None:
        """The answer goes on with `token_id`."""
        if self.has_penalties:
            self._history[self.num_history] = token_id
            self.num_history += 1
        if self.needs_host:
            self._tokens[self._num_tokens] = token_id
            self._num_tokens += 1

    def fill(self, history: np.ndarray, more: Sequence[int] = ()) -> tuple[int, int]:
        """Write what is remembered, and `more` tokens of the answer, to the beginning of a row of
        `Penalties.history`; returns its num_seen and num_history."""
        if not self.has_penalties:
            return 0, 0
        num, end = self.num_history, self.num_history + len(more)
        history[:num], history[num:end] = self._history[:num], more
        return self._num_seen, end

    def fill_bias(self, *rows: np.ndarray) -> None:
        """Write the beginnings of rows of `Penalties.biased`, `.bias` and `.until`."""
        for row, column in zip(rows, self._bias, strict=True):
            row[: len(column)] = column

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        """(V,) float32 logits after steps 1 to 6; position: tokens generated so far."""
        row = logits[None]
        penalties = Penalties.of([(self, ())], logits.device)
        assert penalties is not None
        if self.num_biased or self.has_penalties:
            row = penalised(row, penalties, torch.tensor([position], device=logits.device))
        banned = self._banned()
        if not len(banned):
            return row[0].float()
        return row[0].float().index_fill(0, torch.from_numpy(banned).to(logits.device), -torch.inf)

    def _banned(self) -> np.ndarray:
        """(n,) int64: tokens that would complete a run that is forbidden now."""
        tokens, size = self._tokens[: self._num_tokens], self._ngram
        found = [
            run[-1]
            for run in self._words
            if len(run) <= len(tokens) + 1
            and tuple(tokens[len(tokens) + 1 - len(run) :]) == run[:-1]
        ]
        if not size or len(tokens) < size:
            return np.array(found, np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
        again = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(axis=1)
        return np.concatenate((np.array(found, np.int64), windows[again, -1]))
