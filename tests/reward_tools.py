"""Texts as a model that is being trained might write them, well formed, damaged and hostile."""

from __future__ import annotations

import random

_NUMBERS = ("0", "5", "5.2", "05", "00", "5.", ".5", "-1", "+3", "1e2", "1e999", "9" * 400, "1_0")
_NUMBERS += ("0x1f", "True", "None", "1j", "nan", "'a'", "b'ab'", "٥", "1+1", "[1]", "12", "30.25")
_JUNK = ("\n", " ", "\t", "\r", "\f", "\v", "\x00", "\xa0", ",", "\\", "#", "'", '"', "{", "}", "é")
_JUNK += ("A", "b", "C.", "Definitely B", "Based on it, C", "The answer is D", "so", "<", ">", "</")
_JUNK += ("Best answer:Best option: C", "a", "word " * 12, "[", "]", "(", ")", "...", "-", "\ud800")
TAGS = ("think", "answer", "glue")


def _number(rng: random.Random) -> str:
    if rng.random() < 0.97:
        return rng.choice((str(rng.randrange(60)), f"{rng.uniform(0, 60):.1f}"))
    return rng.choice(_NUMBERS)


def _items(rng: random.Random, count: int) -> str:
    return rng.choice((", ", ", ", ",", " , ", ",\n")).join(_number(rng) for _ in range(count))


def spans(rng: random.Random) -> str:
    opening, closing = rng.choice(("()", "()", "()", "[]"))
    pairs = (
        opening + _items(rng, rng.choice((2, 2, 2, 2, 3))) + closing
        for _ in range(rng.randrange(5))
    )
    tail = rng.choice(("", "", "", ",", ", ", " "))
    return (
        "[" + rng.choice((", ", ",", ",  ")).join(pairs) + tail + "]" + rng.choice(("", "", "\n"))
    )


def box(rng: random.Random) -> str:
    opening, closing = rng.choice(("[]", "[]", "()", "{}", ("", "")))
    return opening + _items(rng, rng.choice((4, 4, 4, 4, 3, 5))) + closing


def boxes(rng: random.Random) -> str:
    lists = ("[" + _items(rng, 4) + "]" for _ in range(rng.choice((8, 8, 8, 7, 1))))
    return "[" + rng.choice((", ", ",\n")).join(lists) + "]"


def content(rng: random.Random) -> str:
    kind = rng.choice((spans, box, boxes, None))
    return "".join(rng.choices(_JUNK, k=rng.randrange(4))) if kind is None else kind(rng)


def section(rng: random.Random, tag: str) -> str:
    closing = f"</{tag}>" if rng.random() < 0.95 else rng.choice(("", f"</ {tag}>", f"<{tag}>"))
    return (f"<{tag}>" if rng.random() < 0.97 else "") + content(rng) + closing


def text(rng: random.Random) -> str:
    """One answer; more than half of them in the published order of tags."""
    space = rng.choice(("", "", "\n", " ", "\t\xa0", "x"))
    if rng.random() < 0.6:
        tags = rng.choice((("answer",), ("answer", "glue"), ("answer", "glue"), TAGS))
        said = space.join(section(rng, tag) for tag in tags)
    else:
        parts = [section(rng, rng.choice(TAGS)) for _ in range(rng.randrange(4))]
        said = "".join(x for part in parts for x in (part, rng.choice(("", *_JUNK))))
    if rng.random() < 0.1 and said:  # something is cut out
        at = rng.randrange(len(said))
        said = said[:at] + said[at + rng.randrange(1, 9) :]
    return said
