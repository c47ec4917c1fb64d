"""Constrained clues: a grammar for what stands between the tags of a clue of `r1.5`.

Free text is left alone. From the moment the model opens the tag to the closing tag only tokens are
allowed that spell time spans and boxes as the prompts ask for them, with finite numbers, at least
one and at most eight of each kind, so that the clue parses and the tag ends; for `official`, whose
rule reads nothing else, one Python list of spans. That a span ends after it starts is not in the
power of a grammar.

The automaton and the token masks are those of llguidance. It works on bytes, since a token may
straddle a tag and what stands beside it.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.dialect import TAGS
from vtts_rt.types import require

MAX_SPANS = 8
MAX_BOXES = 8

# Every length is bounded. Line breaks stand between groups only: after a number one would end
# the group (perception/glue.py).
_NUMBER = r"[0-9]{1,6}(\.[0-9]{1,6})?"
_SPAN = rf"[(\[] ?{_NUMBER}, ?{_NUMBER} ?[)\]]"
_BOX = rf"[(\[] ?{_NUMBER}(, ?{_NUMBER}){{3}} ?[)\]]"
_NEXT = r",?[ \n]?"


def _list(item: str, most: int) -> str:
    """One to `most` items, with or without brackets around all of them."""
    items = rf"{item}({_NEXT}{item}){{0,{most - 1}}}"
    return rf"({items}|\[{items}\])"


_SPANS, _BOXES = _list(_SPAN, MAX_SPANS), _list(_BOX, MAX_BOXES)
# What may stand in the tag: spans, then boxes, or the other way round, or one kind alone.
CONTENT = rf"[ \n]?({_SPANS}({_NEXT}{_BOXES})?|{_BOXES}({_NEXT}{_SPANS})?)[ \n]?"
# The same as a Python literal, which takes no leading zeros and no box.
_LITERAL_NUMBER = r"(0|[1-9][0-9]{0,5})(\.[0-9]{1,6})?"
_LITERAL_SPAN = rf"\({_LITERAL_NUMBER}, ?{_LITERAL_NUMBER}\)"
LITERAL = rf"\[{_LITERAL_SPAN}(, ?{_LITERAL_SPAN}){{0,{MAX_SPANS - 1}}}\]"

# An opening tag in every spelling that perception/clue.py reads; and its beginning, at the end of
# a text.
_NAME = TAGS["glue"][0][1:-1]
OPENING = re.compile(rf"<[ ]{{0,4}}{_NAME}[ ]{{0,4}}>".encode(), re.IGNORECASE)
_LETTERS = "".join(f"(?:{letter}" for letter in _NAME) + "[ ]{0,4}" + ")?" * len(_NAME)
_BEGUN = re.compile(rf"<[ ]{{0,4}}{_LETTERS}\Z".encode(), re.IGNORECASE)


class ClueGrammar:
    """The grammar over the vocabulary of one tokenizer; compiled once, for any number of texts.

    literal: clues are Python lists of spans, as `official` reads them (perception/published.py).
    RuntimeError with the remedy if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, *, literal: bool = False) -> None:
        try:
            library: Any = import_module("llguidance")
        except ImportError:
            raise RuntimeError(
                'constrained clues need llguidance: pip install "vtts_rt[grammar]"'
            ) from None
        self.tokenizer = tokenizer
        vocabulary = _Vocabulary(tokenizer)
        self.library = library.LLTokenizer(library.TokenizerWrapper(vocabulary))
        # The last token of a clue may hold free text behind the closing tag.
        pattern = f"{LITERAL if literal else CONTENT}{TAGS['glue'][1]}(?s:.)*"
        grammar = library.LLMatcher.grammar_from_regex(pattern)
        # Of what follows an opening tag; each clue has a copy.
        self.matcher = library.LLMatcher(self.library, grammar, log_level=0)
        assert not self.matcher.is_error(), self.matcher.get_error()
        # Only a token with a `>` can complete an opening tag.
        self._closing = [(i, text) for i, text in enumerate(vocabulary.tokens) if b">" in text]
        self._forbidden: dict[bytes, Tensor] = {}

    def start(self) -> GrammarState:
        """The state of a text that has not begun."""
        return GrammarState(self)

    def forbidden(self, begun: bytes) -> Tensor:
        """(N,) int64: tokens that complete an opening tag and go on with what is no clue.

        begun: the end of free text that may become an opening tag. There are few of these, and
        most forbid nothing, so each is computed once.
        """
        if begun not in self._forbidden:
            ids = [i for i, text in self._closing if not GrammarState(self, begun).feed(text)]
            self._forbidden[begun] = torch.tensor(ids, dtype=torch.int64)
        return self._forbidden[begun]


class GrammarState:
    """How far one text has come: in free text, in an opening tag, in a clue."""

    def __init__(self, grammar: ClueGrammar, begun: bytes = b"") -> None:
        self._grammar = grammar
        self._begun = begun  # the end of free text that may become an opening tag
        self._matcher: Any | None = None  # in a clue only

    @property
    def in_clue(self) -> bool:
        """Whether the tag is open."""
        return self._matcher is not None

    def mask(self, logits: Tensor) -> Tensor:
        """(V,) logits, any float dtype and device, with -inf for tokens that must not come next.

        V may exceed the tokenizer; ids beyond it have no text and are forbidden in a clue, as
        are all special tokens. The very tensor that was given where nothing is forbidden.
        """
        if self._matcher is None:
            forbidden = self._grammar.forbidden(self._begun)
            if len(forbidden) == 0:
                return logits
            return logits.index_fill(0, forbidden.to(logits.device), -torch.inf)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=len(logits)).view(bool)
        # Few are allowed: 0.04 ms for Qwen's 151,936 ids, where masked_fill alone takes 0.10.
        kept = torch.from_numpy(np.flatnonzero(allowed)).to(logits.device)
        return torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen. ValueError for one that the mask forbids."""
        text = self._grammar.tokenizer.token_bytes(token_id)
        allowed = self.feed(text) if text else self._matcher is None
        require("GrammarState", "token_id", token_id, allowed, "a token that the mask allows")

    def feed(self, text: bytes) -> bool:
        """Take the bytes of one token; False if they cannot come next."""
        while text:
            if self._matcher is None:
                text = self._begun + text
                opening = OPENING.search(text)
                if opening is None:
                    begun = _BEGUN.search(text)
                    self._begun = b"" if begun is None else begun[0].lower()
                    return True
                self._begun, self._matcher = b"", self._grammar.matcher.deep_copy()
                text = text[opening.end() :]
                continue
            # Nothing in a clue holds a `>`: the first one ends the closing tag.
            clue, end, text = text.partition(b">")
            clue += end
            if not clue.isascii():
                return False
            # Any tokens that spell it: a matcher takes tokens, and part of one is none.
            ids = self._grammar.library.greedy_tokenize(clue.decode("ascii"))
            if not self._matcher.consume_tokens(ids):
                return False
            if end:
                self._matcher = None
        return True


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.token_bytes(index) for index in range(len(tokenizer))]
        self.special_token_ids = [index for index, text in enumerate(self.tokens) if not text]
        # Allowed by a matcher where the text may end, which is outside the tag: any one will do.
        self.eos_token_id = self.special_token_ids[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
