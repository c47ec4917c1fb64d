"""NgramDrafter: guesses at the next tokens, from earlier answers to the same question.

Answers of successive rounds repeat their form (tags, reasoning, option). What stood after the
last few tokens the last time they were written is drafted and verified in one forward pass; a
wrong guess costs some rows of that pass, a right one saves a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

_START = -1  # stands before every answer, so that an answer's beginning can be drafted too
_FIRST = 8
_SIZES = (3, 2)  # tokens that must agree, longest first; one token says too little
_UNLIKELY_AFTER = 16  # tokens without a precedent; none is expected for the next


class NgramDrafter:
    """Prompt-lookup drafting (Saxena 2023) over earlier answers and the answer so far.

    earlier: token ids of each answer, oldest first. max_tokens: most tokens drafted at once.
    At first _FIRST are; the number doubles while all are right, and falls to what was right plus
    one.
    """

    def __init__(self, earlier: Sequence[Sequence[int]], max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = min(max_tokens, _FIRST)
        self._tokens: list[int] = []
        self._since_draft = 0
        self._follows: dict[tuple[int, ...], int] = {}
        if max_tokens:
            for answer in (*earlier, ()):
                self._tokens += [_START] * max(_SIZES)
                for token in answer:
                    self.append(token)
        self._since_draft = 0 if earlier else _UNLIKELY_AFTER  # tokens since one was drafted

    def append(self, token_id: int) -> None:
        """The answer goes on with `token_id`."""
        if not self._max_tokens:
            return
        end = len(self._tokens)
        self._since_draft += 1
        for size in _SIZES:
            self._follows[tuple(self._tokens[end - size :])] = end
        self._tokens.append(token_id)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next; [] without a precedent."""
        for size in _SIZES if self._max_tokens else ():
            start = self._follows.get(tuple(self._tokens[-size:]))
            if start is not None:
                self._since_draft = 0
                return self._copy(start, min(limit, self._length))
        return []

    @property
    def draft_unlikely(self) -> bool:
        """Whether the next token will hardly be drafted, as the last ones were not."""
        return self._since_draft >= _UNLIKELY_AFTER or not self._max_tokens

    def _copy(self, start: int, count: int) -> list[int]:
        """Tokens from `start` on; past the end a period repeats. An answer's end ends it."""
        tokens, known = list(self._tokens), len(self._tokens)
        for at in range(start, start + count):
            if tokens[at] == _START:
                break
            tokens.append(tokens[at])
        return tokens[known:]

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from a verified draft."""
        self._length = 2 * self._length if num_accepted == num_drafted else num_accepted + 1
        self._length = min(self._length, self._max_tokens)
