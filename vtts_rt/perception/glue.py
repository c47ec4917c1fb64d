"""Spans and boxes in free text, one character at a time.

A run of numbers between brackets is a group: two numbers are a span, four a box. So brackets may
be nested, mismatched or missing. Outside the grouping, `12-15` and `12 to 15` bind two numbers
to a span, `1:05` is minutes and seconds, words and units are passed over. A line break or `;`
after a number ends a group too.
"""

from __future__ import annotations

import math
import re

from vtts_rt.perception.region import RawRegion

_DIGITS = frozenset("0123456789")
_BRACKETS = frozenset("()[]{}")
_DASHES = frozenset("-\u2212\u2013\u2014~")  # hyphen, minus, en dash, em dash, tilde
_MINUS = frozenset("-\u2212")
_CJK_TO = frozenset("到至")
_TO_WORDS = frozenset(("to", "till", "until"))
_NOT_FINITE = frozenset(("nan", "inf", "infinity"))
_MAX_NUMBER_CHARS = 64  # a longer number is not a time or a coordinate
# What a number or a word may grow through: 1:02:03.5, .5, 1e-3.
_NUMBER = re.compile(
    r"(?:\d+:){0,2}(?:\d+(?:\.\d*)?)?|\.\d*|(?:\d+(?:\.\d+)?|\.\d+)[eE][+-]?\d*", re.ASCII
)
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class GlueScanner:
    """Finds spans and boxes while the text arrives.

    `feed` and `finish` return what was completed, in order, each with a span or a box; how the text
    was cut into pieces changes nothing. problems: takes a sentence per kind of thing that was left
    out.
    """

    inside = False

    def __init__(self, problems: dict[str, None]) -> None:
        self._group: list[float] = []  # the first five numbers of the running group
        self._token = ""  # a number or word that may still grow
        self._is_word = False
        self._minus = False  # a sign right before the next number
        self._binding = False  # a connector follows the last number of the group
        self._after_number = False  # nothing but spaces and words since the last number
        self._problems = problems

    def feed(self, text: str) -> list[RawRegion]:
        found: list[RawRegion] = []
        for char in text:
            if self._token and self._grow(char):
                continue
            if self._token:
                self._end_token(found)
            self._begin(char, found)
        return found

    def finish(self) -> list[RawRegion]:
        """The text ends here: what is still open counts as complete."""
        found: list[RawRegion] = []
        if self._token:
            self._end_token(found)
        self._end_group(found)
        return found

    def _begin(self, char: str, found: list[RawRegion]) -> None:
        """A character outside numbers and words."""
        if char in _DIGITS or char == ".":
            self._token, self._is_word = char, False
            return
        if _WORD.fullmatch(char):
            self._token, self._is_word = char, True
            return
        minus, self._minus = self._minus, False
        if char in _BRACKETS:
            self._end_group(found)
        elif char in _DASHES or char in _CJK_TO:
            if self._after_number and self._group:
                self._binding, self._after_number = True, False
            elif char in _MINUS:
                self._minus = not minus
        elif char in ",，、":
            self._after_number = self._binding = False
        elif char in "\n;" and self._after_number:
            self._end_group(found)

    def _grow(self, char: str) -> bool:
        """Whether `char` belongs to the running token."""
        pattern = _WORD if self._is_word else _NUMBER
        if pattern.fullmatch(self._token + char) is None:
            return False
        if len(self._token) <= _MAX_NUMBER_CHARS:
            self._token += char
        return True

    def _end_token(self, found: list[RawRegion]) -> None:
        token, self._token = self._token, ""
        if self._is_word:
            word = token.lower()
            if word in _TO_WORDS and self._after_number and self._group:
                self._binding, self._after_number = True, False
            elif word in _NOT_FINITE:
                self._number(math.nan, found)
            self._minus = False
            return
        if any(c in _DIGITS for c in token):
            value = clock_seconds(token)
            self._number(-value if self._minus else value, found)
        self._minus = False

    def _number(self, value: float, found: list[RawRegion]) -> None:
        if self._binding:
            self._binding = False
            self._keep([self._group.pop(), value], found)
            return
        if len(self._group) < 5:
            self._group.append(value)
        self._after_number = True

    def _end_group(self, found: list[RawRegion]) -> None:
        group, self._group = self._group, []
        self._binding = self._after_number = self._minus = False
        if len(group) in (2, 4):
            self._keep(group, found)
        elif len(group) > 2:
            self._problems["a group has neither two nor four numbers"] = None

    def _keep(self, item: list[float], found: list[RawRegion]) -> None:
        if not all(map(math.isfinite, item)):
            self._problems["a number is not finite or too long"] = None
        elif len(item) == 2:
            found.append(RawRegion(span=(item[0], item[1])))
        else:
            found.append(RawRegion(box=(item[0], item[1], item[2], item[3])))


def clock_seconds(token: str) -> float:
    """Seconds or a coordinate; NaN if it has more digits than a number may have."""
    if len(token) > _MAX_NUMBER_CHARS:
        return math.nan
    token = token.rstrip("+-").rstrip("eE").rstrip(":")
    seconds = 0.0
    for part in token.split(":"):
        seconds = seconds * 60.0 + float(part)
    return seconds
