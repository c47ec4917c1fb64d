"""Clue parser: all forms of the notation, hostile text, and streaming equal to whole."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.perception.clue import (
    MAX_SPANS,
    Clue,
    ClueStream,
    clue_from_json,
    clue_to_json,
    option_letter,
    parse_clue,
)
from vtts_rt.types import FULL_BOX, Box, Region, TimeSpan

SPANS = [
    ("[(12.0, 15.5), (20, 25)]", ((12.0, 15.5), (20.0, 25.0))),
    ("[[12, 15], [20.25, 25]]", ((12.0, 15.0), (20.25, 25.0))),
    ("(12, 15)", ((12.0, 15.0),)),
    ("[12, 15]", ((12.0, 15.0),)),
    ("12-15", ((12.0, 15.0),)),
    ("12.5 - 15.5s and 20–25", ((12.5, 15.5), (20.0, 25.0))),
    ("12 to 15", ((12.0, 15.0),)),
    ("from 12.0 seconds to 15.0 seconds.", ((12.0, 15.0),)),
    ("12秒到15秒", ((12.0, 15.0),)),
    ("12.0s, 15.0s", ((12.0, 15.0),)),
    ("1:05 - 1:10.5, 1:00:00-1:00:01", ((65.0, 70.5), (3600.0, 3601.0))),
    ("(1:., 2) (3:.5)", ((1.0, 2.0), (3.0, 0.5))),
    ("[(1, 2), (3, 4", ((1.0, 2.0), (3.0, 4.0))),
    ("[(1, 2, (3, 4)]", ((1.0, 2.0), (3.0, 4.0))),
    ("1, 2), (3, 4)", ((1.0, 2.0), (3.0, 4.0))),
    ("[\n  12,\n  15\n]", ((12.0, 15.0),)),
    ("1, 2\n3, 4", ((1.0, 2.0), (3.0, 4.0))),
    ("[12-15, 20-25]", ((12.0, 15.0), (20.0, 25.0))),
    ("[(-5, 3), (9, 2), (-1, -2)]", ((-5.0, 3.0), (9.0, 2.0), (-1.0, -2.0))),
    ("[(nan, 5), (1, inf), (1e999, 2), (3, 4)]", ((3.0, 4.0),)),
    ("[(1e1, 2E+1)]", ((10.0, 20.0),)),
    ('{"spans": [[1, 2]]}', ((1.0, 2.0),)),
    ("frame3 at (1, 2)", ((1.0, 2.0),)),
    (".5, 1.", ((0.5, 1.0),)),
    ("(5, 5)", ((5.0, 5.0),)),
    ("[]", ()),
    ("(1, 2, 3)", ()),
    ("none", ()),
]


@pytest.mark.parametrize(("glue", "spans"), SPANS)
def test_spans_in_all_forms(glue: str, spans: tuple[tuple[float, float], ...]) -> None:
    clue = parse_clue(f"<glue>{glue}</glue>")
    assert clue.spans == spans
    assert clue.boxes == ()
    assert clue.usable == bool(spans)
    assert spans or clue.problems


@pytest.mark.parametrize(
    ("glue", "spans", "boxes"),
    [
        ("[10, 20, 30.5, 40]", (), ((10.0, 20.0, 30.5, 40.0),)),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", (), ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))),
        ("[(1, 2)] [0.1, 0.2, 0.3, 0.4]", ((1.0, 2.0),), ((0.1, 0.2, 0.3, 0.4),)),
        ("box [40, 30, 20, 10] at 3-4", ((3.0, 4.0),), ((40.0, 30.0, 20.0, 10.0),)),
        ("[10, 20,\n 30, 40]", (), ((10.0, 20.0, 30.0, 40.0),)),
        ("[1, 2, nan, 4]", (), ()),
    ],
)
def test_boxes(glue: str, spans: tuple[object, ...], boxes: tuple[object, ...]) -> None:
    clue = parse_clue(f"<glue>{glue}</glue>")
    assert (clue.spans, clue.boxes) == (spans, boxes)


def test_all_tags() -> None:
    text = "<think> a card </think>\n<answer> B </answer><glue>[(1, 2)]</glue>"
    clue = parse_clue(text)
    assert (clue.text, clue.think, clue.answer, clue.glue) == (text, "a card", "B", "[(1, 2)]")
    assert clue.problems == ()


@pytest.mark.parametrize(
    ("text", "answer", "spans"),
    [
        ("<GLUE>[(1, 2)]</Glue><ANSWER>B</ANSWER>", "B", ((1.0, 2.0),)),
        ("< glue >[(1, 2)]< / glue ><answer>B", "B", ((1.0, 2.0),)),
        ("<answer>A</answer><answer>B</answer>", "B", ()),
        ("<answer>A</answer><answer>B", "A", ()),
        ("<answer>A<answer>B", "B", ()),
        ("<glue>[(1, 2)]</glue><glue>[(3, 4)]</glue>", None, ((3.0, 4.0),)),
        ("<glue>[(1, 2)]</glue><glue>[(3, 4)]", None, ((1.0, 2.0),)),
        ("<answer>B<glue>[(1, 2)", "B", ((1.0, 2.0),)),
        ("<think>the <glue> tag</think><answer>B</answer><glue>(1, 2)</glue>", "B", ((1.0, 2.0),)),
        ("[(1, 2)]", None, ()),
        ("[(1, 2)]</glue>", None, ()),
    ],
)
def test_tags_in_any_state(text: str, answer: str | None, spans: tuple[object, ...]) -> None:
    clue = parse_clue(text)
    assert (clue.answer, clue.spans) == (answer, spans)


def test_a_thought_opened_in_the_prompt() -> None:
    clue = parse_clue("it is red</think><answer>A</answer>")
    assert (clue.think, clue.answer) == ("it is red", "A")


def test_problems_say_what_is_wrong() -> None:
    assert parse_clue("no tags").problems == ("the text holds no <glue>",)
    assert "<glue> is never closed" in parse_clue("<glue>(1, 2)").problems
    assert "a group has neither two nor four numbers" in parse_clue("<glue>(1,2,3)</glue>").problems
    assert "not finite" in parse_clue("<glue>(1, inf)</glue>").problems[0]


def test_long_lists_are_bounded() -> None:
    clue = parse_clue("<glue>[" + "(1, 2)," * 30_000 + "]</glue>")
    assert len(clue.spans) == MAX_SPANS
    assert any("only the first" in problem for problem in clue.problems)


@pytest.mark.parametrize(
    "hostile",
    [
        "<glue>" + "[" * 50_000,
        "<glue>" + "1" * 50_000,
        "<glue>" + "1:" * 30_000,
        "<glue>" + "a" * 50_000,
        "<" * 50_000,
        "<glue>" * 8_000,
        "<glue>" + "-" * 50_000 + "5,",
        "<glue>" + "1e" * 30_000,
        "<glue>" + "1," * 30_000,
    ],
)
def test_hostile_text_is_read_to_the_end(hostile: str) -> None:
    clue = parse_clue(hostile)
    assert clue.text == hostile
    assert all(math.isfinite(v) for span in clue.spans for v in span)


ALPHABET = st.sampled_from(
    [
        "<glue>", "</glue>", "<answer>", "</answer>", "<think>", "</think>", "<", ">", "</",
        "glue>", "(", ")", "[", "]", ",", ", ", "-", " to ", "1", "2", "12.5", "0.3",
        ".", ":", "e", "nan",
        "inf", "s", "\n", ";", " ", "B", "−", "١", "²", "é", "1e999", "+", "İ", "\u212a",
    ]
)  # fmt: skip
TEXTS = st.one_of(st.lists(ALPHABET, max_size=40).map("".join), st.text(max_size=60))


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=12))
def test_any_chunking_gives_the_same_clue(text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    stream = ClueStream()
    events = []
    for a, b in zip(edges, edges[1:], strict=False):
        events += stream.feed(text[a:b])
    clue = stream.finish()
    assert clue == parse_clue(text)
    if text.lower().count("<glue>") <= 1 and "<glue" not in text.lower().replace("<glue>", ""):
        spans = tuple(e.span for e in events if e.span)
        boxes = tuple(e.box for e in events if e.box)
        assert spans == clue.spans[: len(spans)]
        assert boxes == clue.boxes[: len(boxes)]


def test_a_span_is_known_when_its_bracket_closes() -> None:
    stream = ClueStream()
    seen = []
    for i, char in enumerate("<glue>[(1, 2), (3, 4)] [1, 2, 3, 4]"):
        seen += [(i, found.span or found.box) for found in stream.feed(char)]
    assert seen == [
        (12, (1.0, 2.0)),
        (20, (3.0, 4.0)),
        (34, (1.0, 2.0, 3.0, 4.0)),
    ]


OPTIONS = ["red", "a blue car", "green", "B"]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("The answer is B.", 1),
        ("(B)", 1),
        ("b)", 1),
        ("B. a blue car", 1),
        ("**C**", 2),
        ("Answer: C", 2),
        ("The correct option is: (A) red", 0),
        ("So my final answer would be D", 3),
        ("red", 0),
        ("  Green.", 2),
        ("A blue car", 1),
        ("I think it is the green one", 2),
        ("<think>maybe A</think><answer>C</answer>", 2),
        ("<think>maybe A</think> C", 2),
        ("E", None),
        ("", None),
        ("a cat", None),
        ("red or green", None),
        ("x" * 30_000, None),
    ],
)
def test_option_letter(text: str, index: int | None) -> None:
    assert option_letter(text, OPTIONS) == index


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("A. Smith", 1),  # as data.rows reads an answer that is an option's own text
        ("The answer is a.  smith.", 1),
        ("A. Jones", 0),
        ("A. Smith, I think", 0),
        ("C", 2),
        ("(c)", 2),
        ("B. C", 1),  # the letter, then the words of another: the letter counts
    ],
)
def test_the_exact_text_of_an_option_counts_before_a_letter(text: str, index: int) -> None:
    assert option_letter(text, ["B. Jones", "A. Smith", "D", "C"]) == index


def test_equal_options_are_told_apart_by_letters_only() -> None:
    assert option_letter("B. x", ["B. x", "B. x", "y"]) == 1
    assert option_letter("A. Smith", ["x", "A. Smith"], letter="published") == 0


def test_option_letter_of_a_clue_and_without_options() -> None:
    assert option_letter(parse_clue("A <answer>B</answer>"), OPTIONS) == 1
    assert option_letter("A", []) is None


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("(C) text", 2),
        ("The answer is C", 2),
        ("The correct answer is D.", 3),
        ("Based on it, C", 1),
        ("Definitely B", 3),
        ("b", None),
        ("E", None),  # no such option, and the first letter counts
        ("E or A", None),
        ("H, then A", 0),
        ("The best option is: A", 0),
        ("<think>B</think><answer>C</answer><answer>A</answer>", 2),
        ("<think>Because</think><answer>c</answer> B", None),
        ("<think>Because</think> A", 1),
        ("<answer>A", 0),
        ("one two three four five six seven eight nine ten eleven", None),
        ("one two three four five six seven eight nine ten eleven A", 0),
        ("", None),
    ],
)
def test_published_option_letter(text: str, index: int | None) -> None:
    assert option_letter(text, OPTIONS, letter="published") == index
    assert option_letter(Clue(text=text), OPTIONS, letter="published") == index


def test_unknown_letter_rule() -> None:
    with pytest.raises(ValueError, match="letter must be one of .*, got 'strict'"):
        option_letter("A", OPTIONS, letter="strict")  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_option_letter_is_an_option(text: str) -> None:
    assert option_letter(text, OPTIONS) in (None, 0, 1, 2, 3)


def test_clue_json_round_trip() -> None:
    clue = clue_from_json({"spans": [[1, 2.5]], "boxes": [[0.1, 0.2, 0.3, 0.4]]})
    assert (clue.spans, clue.boxes) == (((1.0, 2.5),), ((0.1, 0.2, 0.3, 0.4),))
    region = Region(TimeSpan(1.0, 2.5), Box(0.1, 0.2, 0.3, 0.4))
    twice = [
        region,
        region,
        Region(TimeSpan(1, 2), FULL_BOX),
        Region(TimeSpan(1, 2), Box(0, 0, 1, 0.5), 1),
    ]
    written = clue_to_json(clue, twice)
    assert written == {"spans": [[1.0, 2.5]], "boxes": [[0.1, 0.2, 0.3, 0.4]]}
    assert clue_from_json(json.loads(json.dumps(written))) == clue
    assert clue_from_json([[20, 30]]).spans == ((20.0, 30.0),)
    assert not clue_from_json(None).usable and not clue_from_json([]).usable
    assert clue_to_json(Clue()) == {"spans": [], "boxes": []}


@pytest.mark.parametrize(
    "item",
    [
        5, "x", [1, 2], [[1]], [[1, 2, 3]], [["a", 2]], [[True, 2]], [[float("nan"), 1]],
        [[1, 10**400]], {"span": []}, {"boxes": [[0, 0, 2, 1]]}, {"boxes": [[0, 0, 1]]},
        {"spans": 3}, [[1, 2]] * 65,
    ],
)  # fmt: skip
def test_bad_forced_clues(item: object) -> None:
    with pytest.raises(ValueError, match=r"^assume_clues: .* must be .*, got "):
        clue_from_json(item)
