"""The clue rule of VideoChat-R1.5's released code, which `official` follows to the letter.

The clue is what Python's `ast.literal_eval` makes of the text from the first opening tag of a clue
to the next closing one (those of `r1.5`, lower case, no spaces, wherever they stand), unpacked into
pairs of numbers. Whatever fails on the way means uniform sampling; an empty list does not. Restated
from the evaluation code (`Videochat-R1.5/src_eval/eval_videomme.py`, `my_vision_process.py`). All
other strategies read clues leniently (clue.py).

Bounds are ours, against texts that are written to exhaust a parser (`bounded_literal`): a clue
beyond them means uniform sampling too.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace
from itertools import accumulate
from typing import Any

from vtts_rt.perception.clue import Clue, ClueStream
from vtts_rt.perception.dialect import R1_5, TAGS, Dialect
from vtts_rt.perception.region import RawRegion, RawSpan

MAX_CHARS = 64 * 1024
MAX_DEPTH = 100
# Operators of one number: two signs and two of exponents, or two points.
MAX_OPERATORS = 8
# A text, with the letters before it, or a comment. One that is never closed ends with its line, or
# with everything: Python gives up there.
_ESCAPE = r"\\(?:\r\n|[\s\S])"
_TEXT_OR_COMMENT = re.compile(
    rf"""
    \#[^\n\r]* | (?P<letters>[A-Za-z]{{0,2}}) (?:
        '''(?:{_ESCAPE}|[^\\])*?(?:'''|\Z) | \"\"\"(?:{_ESCAPE}|[^\\])*?(?:\"\"\"|\Z)
        | '(?:{_ESCAPE}|[^'\\\n\r])*'? | "(?:{_ESCAPE}|[^"\\\n\r])*"?
    )""",
    re.VERBOSE,
)
# What nests expressions without brackets, and stands in no literal outside of texts.
_NESTING = re.compile(r"[~*/%@&|^<>=\\]|not|if|else|lambda|and|or|in|is|await|[\])}]\s*[\[({]")
_BRACKETS = re.compile(r"[\[\](){}]")
_PIECES = re.compile(r"[,:\[\](){}]")

_OPENING, _CLOSING = TAGS["glue"]


def bounded_literal(text: str) -> object:
    """What `ast.literal_eval` makes of a text, in little time, memory and stack.

    Its exceptions, and ValueError for texts of more than MAX_CHARS characters, with brackets nested
    more than MAX_DEPTH deep, or with chains of operators that no number has: deep expressions end
    the process in threads of a small stack. What texts and comments hold is no part of that;
    f-strings, which hold expressions, are no literals.
    """
    if len(text) > MAX_CHARS:
        raise ValueError("too long for a literal")
    plain = _TEXT_OR_COMMENT.sub(_stand_in, text)
    nested = _depth(plain) > MAX_DEPTH or sum(1 for _ in _NESTING.finditer(plain)) > MAX_DEPTH
    pieces = _PIECES.split(plain)
    if nested or any(sum(map(piece.count, "+-.")) > MAX_OPERATORS for piece in pieces):
        raise ValueError("too deep for a literal")
    return ast.literal_eval(text)


def published_spans(literal: str) -> tuple[RawSpan, ...]:
    """The (start, end) seconds of a clue's text, unordered and unclipped; () for an empty literal.

    Numbers as the released sampler takes them: integers, floats, booleans, bytes; pairs in
    anything that can be unpacked. ValueError, TypeError, SyntaxError, OverflowError, MemoryError or
    RecursionError where it would sample uniformly; what Python's parser takes depends on its
    version.
    """
    pairs: Any = bounded_literal(literal)
    return tuple((_seconds(start), _seconds(end)) for start, end in pairs)


def _seconds(value: object) -> float:
    """A number that the sampler can multiply by a frame rate and turn into an integer."""
    if not isinstance(value, int | float):
        raise TypeError(f"{type(value).__name__} is no number of seconds")
    seconds = float(value)
    if not math.isfinite(seconds):
        raise OverflowError("infinite seconds")
    return seconds


def _stand_in(found: re.Match[str]) -> str:
    """What takes the place of a text, or of a comment, where depth is counted."""
    letters = found["letters"]
    if letters is not None and not set(letters.lower()) <= set("bru"):
        raise ValueError("no literal: letters before a text")
    return "" if letters is None else "0"


def _depth(text: str) -> int:
    """How deep brackets are nested, of whatever kind."""
    steps = (1 if bracket in "([{" else -1 for bracket in _BRACKETS.findall(text))
    return max(accumulate(steps), default=0)


class PublishedClueStream(ClueStream):
    """Reads an answer while it is written: spans are known once the tag closes. All but the clue is
    read leniently; `glue` is None where no tag was closed."""

    def __init__(self) -> None:
        super().__init__()
        self._literal: str | None = None
        self._spans: tuple[RawSpan, ...] = ()
        self._problem = f"the text holds no closed {_OPENING}"

    def feed(self, piece: str) -> list[RawRegion]:
        """Take the next piece of text; all spans where it closes the clue."""
        super().feed(piece)
        if self._literal is not None or ">" not in piece:
            return []
        _, _, rest = self.text.partition(_OPENING)
        literal, closing, _ = rest.partition(_CLOSING)
        if not closing:
            return []
        self._literal, self._problem = literal, ""
        try:
            self._spans = published_spans(literal)
        except Exception as error:  # to the letter: any of them
            self._problem = f"{_OPENING} is no list of (start, end): {type(error).__name__}"
        return [RawRegion(span=span) for span in self._spans]

    def so_far(self) -> Clue:
        """As ClueStream."""
        return replace(
            super().so_far(),
            spans=self._spans,
            boxes=(),
            problems=(self._problem,) if self._problem else (),
            glue=self._literal,
            empty_list=not self._problem and not self._spans,
        )


def clue_stream(literal: bool, dialect: Dialect = R1_5) -> ClueStream:
    """What reads clues: by the published rule (`Strategy.literal_clues`), or leniently."""
    return PublishedClueStream() if literal else ClueStream(dialect)
