"""The rewards of VideoChat-R1.5's released training code, on texts, to the letter.

Restated from `Videochat-R1.5/src/open_r1/reward_funcs.py`; what each task sums up is
`rewards.PUBLISHED`. Four differences, all about texts that no model is meant to write:
- the check of igqa's box there runs `eval` on the model's text. Here it is read as a literal: a
  list of four literals is valid as there (numbers of any kind, and whatever else a literal can be);
  expressions such as `[1+1, 2, 3, 4]`, names, calls and comprehensions are not.
- literals are bounded (`perception.published.bounded_literal`).
- a value that is not finite, of numbers such as `1e999`, is 0 instead of NaN.
- integers too large for a float are 0 where that code raises OverflowError.
All functions are pure, never raise on a str, and take time linear in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from vtts_rt.data.row import NUM_TRACKED
from vtts_rt.perception.clue import published_letter
from vtts_rt.perception.dialect import TAGS
from vtts_rt.perception.published import bounded_literal
from vtts_rt.perception.region import span_iou
from vtts_rt.types import TimeSpan

MAX_SPANS = 3  # of a list
# Numbers that its pattern and Python's literals both take; white space likewise.
_NUMBER = r"(?:\d+\.\d+|[1-9]\d*|0+)"
_SPAN = rf"\(({_NUMBER}),[ \t\n\r\f]*({_NUMBER})\)"
_SPANS = re.compile(
    rf"\[(?:{_SPAN}(?:,[ \t\n\r\f]*{_SPAN}){{0,{MAX_SPANS - 1}}},?)?\]\n?", re.ASCII
)
_ONE_SPAN = re.compile(_SPAN, re.ASCII)
_TURN = re.compile(rf"{TAGS['answer'][1]}\s*{TAGS['glue'][0]}")


def first_section(text: str, tag: str) -> str | None:
    """What stands between the first opening `tag` and the next closing one."""
    opening, closing = TAGS[tag]
    _, _, rest = text.partition(opening)
    inner, closed, _ = rest.partition(closing)
    return inner if closed else None


def read_spans(text: str) -> list[tuple[float, float]] | None:
    """The spans of `[(a, b), ...]`, at most three, ends in order; None for any other text.

    Unsigned decimals such as 5 and 5.2, white space only after the comma in a span and between
    spans, one comma behind the last, one line feed at the end.
    """
    if not _SPANS.fullmatch(text):
        return None
    spans = []
    for pair in _ONE_SPAN.findall(text):
        try:  # integers are compared exactly, and have a most number of digits
            start, end = (float(n) if "." in n else int(n) for n in pair)
        except ValueError:
            return None
        if start > end:
            return None
        spans.append((start, end))
    return spans


def span_reward(text: str, tag: str, truth: Sequence[TimeSpan]) -> float:
    """IoU of the spans in the first `tag` with the true ones; 0 where it is no list of spans. Two
    unions of length 0 are equal: 1."""
    said = read_spans(first_section(text, tag) or "")
    if said is None:
        return 0.0
    return _value(lambda: span_iou([TimeSpan(float(a), float(b)) for a, b in said], truth))


def letter_reward(text: str, answer: str) -> float:
    """Whether the first answer tag names the letter of `answer`; a text without a letter equals
    another without one. 0 without the tag."""
    said = first_section(text, "answer")
    return float(said is not None and published_letter(said) == published_letter(answer))


def answer_format(text: str) -> float:
    """Whether the text begins with an answer tag and ends with a closing one."""
    (opening, closing), text = TAGS["answer"], text.strip()
    long_enough = len(text) >= len(opening) + len(closing)
    return float(long_enough and text.startswith(opening) and text.endswith(closing))


def clue_format(text: str) -> float:
    """Answer tag, white space, clue tag, and nothing else around them; a valid list of spans in the
    first clue tag."""
    return float(
        _answer_and_clue(text) and read_spans(first_section(text, "glue") or "") is not None
    )


def box_format(text: str) -> float:
    """As clue_format, with a list of four in the first clue tag."""
    if not _answer_and_clue(text):
        return 0.0
    said = _literal(first_section(text, "glue") or "")
    return float(isinstance(said, list) and len(said) == 4)


def box_reward(text: str, tag: str, truth: Sequence[float]) -> float:
    """IoU of the box in the first `tag` that is closed in its line with the true one, or of the
    whole text without such a tag. Numbers as they stand, (x0, y0, x1, y1): neither clipped nor
    ordered, so reversed boxes have negative areas, and the result may lie outside [0, 1]."""
    opening, closing = TAGS[tag]
    said = text
    for line in text.split("\n"):
        _, _, rest = line.partition(opening)
        inner, closed, _ = rest.partition(closing)
        if closed:
            said = inner
            break
    return _value(lambda: _raw_iou(bounded_literal(said.strip()), truth))


def tracking_reward(text: str, truth: Sequence[Sequence[float]]) -> float:
    """Mean IoU of the eight boxes in the first answer tag with as many true ones, line feeds left
    out; 0 for another number on either side."""
    said = _tracked(first_section(text.replace("\n", ""), "answer"))
    if said is None or len(said) != len(truth):
        return 0.0
    return _value(lambda: math.fsum(map(_raw_iou, said, truth)) / len(said))


def tracking_format(text: str) -> float:
    """As answer_format, with eight lists of four in the first answer tag."""
    return float(answer_format(text) and _tracked(first_section(text, "answer")) is not None)


def _answer_and_clue(text: str) -> bool:
    text = text.strip()
    start, end = TAGS["answer"][0], TAGS["glue"][1]
    if not (text.startswith(start) and text.endswith(end)):
        return False
    return _TURN.search(text, len(start), len(text) - len(end)) is not None


def _tracked(text: str | None) -> list[list[Any]] | None:
    said = _literal("" if text is None else text.replace("\n", ""))
    if not isinstance(said, list) or len(said) != NUM_TRACKED:
        return None
    return said if all(isinstance(box, list) and len(box) == 4 for box in said) else None


def _literal(text: str) -> object:
    try:
        return bounded_literal(text)
    except Exception:  # to the letter: any of them
        return None


def _raw_iou(a: Any, b: Any) -> float:
    ax0, ay0, ax1, ay1 = a
    bx0, by0, bx1, by1 = b
    width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
    both = max(0, width) * max(0, height)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - both
    return float(both / union) if union != 0 else 0.0


def _value(compute: Callable[[], float]) -> float:
    """0 for whatever cannot be computed, or is not finite."""
    try:
        value = compute()
    except Exception:  # to the letter: any of them
        return 0.0
    return value if math.isfinite(value) else 0.0
