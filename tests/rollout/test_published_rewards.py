"""The published rewards: their rules as a table, and against a transcription of them with patterns
and `ast.literal_eval`, over random texts."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import reward_tools

from vtts_rt.rollout import published_rewards as published
from vtts_rt.types import TimeSpan

SPANS = [TimeSpan(5.0, 15.0), TimeSpan(20.0, 30.0)]
BOX = (10.0, 20.0, 30.0, 60.0)
EIGHT = [BOX] * 8

# -- transcribed, independent of the package ----------------------------------------------------

_SPAN = r"\(\d+(\.\d+)?,\s*\d+(\.\d+)?\)"


def oracle_spans(text: str) -> Any:
    if not re.match(rf"^\[({_SPAN}(,\s*{_SPAN})*(,)?|)\]$", text):
        return None
    try:
        spans = ast.literal_eval(text)
    except Exception:
        return None
    return spans if len(spans) <= 3 and all(a <= b for a, b in spans) else None


def oracle_length(spans: Any) -> tuple[Any, list[list[Any]]]:
    merged: list[list[Any]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return sum(end - start for start, end in merged), merged


def oracle_span_iou(text: str, tag: str) -> float:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    said = oracle_spans(found[1]) if found else None
    if said is None:
        return 0.0
    a, merged_a = oracle_length(said)
    b, merged_b = oracle_length([(s.start_seconds, s.end_seconds) for s in SPANS])
    both = sum(
        max(0, min(x[1], y[1]) - max(x[0], y[0])) for x in merged_a for y in merged_b
    )  # fmt: skip
    return both / (a + b - both) if a + b - both else 1.0


def oracle_letter(text: str) -> str:
    text = text.strip()
    for lead in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
        text = text.replace(lead, "")
    for lead in ("The best option is", "The correct option is", "Best answer:Best option:"):
        text = text.replace(lead, "")
    found = re.search("[ABCDEFG]", text)
    return found[0] if found else ""


def oracle_letter_reward(text: str, answer: str) -> float:
    found = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return float(found is not None and oracle_letter(found[1]) == oracle_letter(answer))


def oracle_format(text: str, pattern: str) -> bool:
    return re.fullmatch(pattern, text.strip(), re.DOTALL) is not None


_BOTH = r"<answer>.*?</answer>\s*<glue>.*?</glue>"


def oracle_clue_format(text: str) -> float:
    found = re.search("<glue>(.*?)</glue>", text, re.DOTALL)
    return float(oracle_format(text, _BOTH) and oracle_spans(found[1]) is not None)  # type: ignore[index]


def oracle_box_format(text: str) -> float:
    found = re.search("<glue>(.*?)</glue>", text, re.DOTALL)
    if not oracle_format(text, _BOTH) or found is None:
        return 0.0
    try:
        said = ast.literal_eval(found[1])
    except Exception:
        return 0.0
    return float(isinstance(said, list) and len(said) == 4)


def oracle_iou(a: Any, b: Any) -> Any:
    a0, a1, a2, a3 = a
    b0, b1, b2, b3 = b
    both = max(0, min(a2, b2) - max(a0, b0)) * max(0, min(a3, b3) - max(a1, b1))
    union = (a2 - a0) * (a3 - a1) + (b2 - b0) * (b3 - b1) - both
    return both / union if union != 0 else 0.0


def oracle_box(text: str, tag: str) -> float:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text)
    try:
        return float(oracle_iou(ast.literal_eval((found[1] if found else text).strip()), BOX))
    except Exception:
        return 0.0


def oracle_eight(text: str) -> Any:
    try:
        said = ast.literal_eval(text.replace("\n", ""))
    except Exception:
        return None
    ok = isinstance(said, list) and len(said) == 8
    return said if ok and all(isinstance(b, list) and len(b) == 4 for b in said) else None


def oracle_tracking(text: str) -> float:
    found = re.search("<answer>(.*?)</answer>", text.replace("\n", ""), re.DOTALL)
    said = oracle_eight(found[1]) if found else None
    try:
        return 0.0 if said is None else sum(map(oracle_iou, said, EIGHT)) / 8
    except Exception:
        return 0.0


def oracle_tracking_format(text: str) -> float:
    found = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    whole = oracle_format(text, "<answer>.*?</answer>")
    return float(whole and found is not None and oracle_eight(found[1]) is not None)


# Name -> (ours, the transcription).
PAIRS: dict[str, tuple[Callable[[str], float], Callable[[str], float]]] = {
    "iou_glue": (
        lambda t: published.span_reward(t, "glue", SPANS),
        lambda t: oracle_span_iou(t, "glue"),
    ),
    "iou_answer": (
        lambda t: published.span_reward(t, "answer", SPANS),
        lambda t: oracle_span_iou(t, "answer"),
    ),
    "letter": (
        lambda t: published.letter_reward(t, "(C) a cat"),
        lambda t: oracle_letter_reward(t, "(C) a cat"),
    ),
    "no letter": (
        lambda t: published.letter_reward(t, "red"),
        lambda t: oracle_letter_reward(t, "red"),
    ),
    "format_answer": (
        published.answer_format,
        lambda t: float(oracle_format(t, "<answer>.*?</answer>")),
    ),
    "format_gqa": (published.clue_format, oracle_clue_format),
    "format_igqa": (published.box_format, oracle_box_format),
    "box_answer": (
        lambda t: published.box_reward(t, "answer", BOX),
        lambda t: oracle_box(t, "answer"),
    ),
    "box_glue": (lambda t: published.box_reward(t, "glue", BOX), lambda t: oracle_box(t, "glue")),
    "tracking_iou": (lambda t: published.tracking_reward(t, EIGHT), oracle_tracking),
    "tracking_format": (published.tracking_format, oracle_tracking_format),
}


@pytest.mark.parametrize(
    ("first", "count"), [(0, 5_000), pytest.param(5_000, 1_000_000, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_random_texts_against_the_transcription(first: int, count: int) -> None:
    counted = dict.fromkeys(PAIRS, 0)
    for seed in range(first, first + count):
        text = reward_tools.text(random.Random(seed))
        for name, (ours, oracle) in PAIRS.items():
            value = ours(text)
            try:
                expected = oracle(text)
            except OverflowError:
                expected = math.inf
            if not math.isfinite(expected):
                expected = 0.0  # the difference that the module tells of
            assert math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12), (name, text, seed)
            counted[name] += value != 0.0
    assert min(counted.values()) > count / 500, counted


# -- published, worked by hand ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "iou"),
    [
        ("[(5, 15), (20, 30)]", 1.0),
        ("[(5, 15)]", 0.5),
        ("[(5, 10), (10, 15)]", 0.5),  # touching spans merge
        ("[(5,15),(7, 9)]", 0.5),  # so do overlapping ones
        ("[(0, 40)]", 0.5),
        ("[(5.0, 15.5)]", 10.0 / 20.5),
        ("[(5, 15),]", 0.5),
        ("[(5, 15)]\n", 0.5),
        ("[(5,\n15)]", 0.5),
        ("[(40, 50)]", 0.0),
        ("[]", 0.0),
        # Not a list of spans:
        *[
            (text, 0.0)
            for text in (
                *("", "[(15, 5)]", " [(5, 15)]", "[(5, 15)] ", "[(5, 15)]\n\n", "[ (5, 15)]"),
                *("[(5 , 15)]", "[( 5, 15)]", "[(5, 15 )]", "[(5, 15) ]", "[(5, 15) , (20, 30)]"),
                *("[(5., 15)]", "[(.5, 15)]", "[(-5, 15)]", "[(+5, 15)]", "[(5, 1e1)]", "[,]"),
                *("[(05, 15)]", "[[5, 15]]", "((5, 15))", "(5, 15)", "[(5, 15, 1)]", "[(5,)]"),
                *("[(5, 15)], ", "[(5, 15),,]", "[(٥, 15)]", "[(5,\xa015)]", "[(5, 15)]x"),
                "[(5, 6), (6, 7), (7, 8), (8, 15)]",  # more than three
                f"[(5, {'9' * 400})]",
                f"[(5, {'9' * 400}.0)]",
            )
        ],
    ],
)
def test_spans_of_a_clue(said: str, iou: float) -> None:
    assert published.span_reward(f"x<glue>{said}</glue>y", "glue", SPANS) == pytest.approx(iou)
    assert published.span_reward(f"<answer>{said}</answer>", "answer", SPANS) == pytest.approx(iou)


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        ("<glue>[(5, 15)]</glue><glue>[(5, 15), (20, 30)]</glue>", 0.5),
        ("<glue>x</glue><glue>[(5, 15)]</glue>", 0.0),
        ("<glue>[(5, 15)]", 0.0),
        ("</glue><glue>[(5, 15)]</glue>", 0.5),
        ("<Glue>[(5, 15)]</Glue>", 0.0),
        ("<glue>\n[(5, 15)]</glue>", 0.0),
        ("", 0.0),
    ],
)
def test_the_first_clue_counts(text: str, iou: float) -> None:
    assert published.span_reward(text, "glue", SPANS) == iou


def test_two_empty_unions_are_equal() -> None:
    assert published.span_reward("<glue>[]</glue>", "glue", []) == 1.0
    assert published.span_reward("<glue>[(3, 3)]</glue>", "glue", []) == 1.0
    assert published.span_reward("<glue></glue>", "glue", []) == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("<answer>B</answer>", "B", 1.0),
        ("<answer>(B) green</answer>", "B. green", 1.0),
        ("<answer>Based on it, C</answer>", "B", 1.0),
        ("<answer>Definitely B</answer>", "D", 1.0),
        ("<answer>The answer is B</answer>", "B", 1.0),
        ("<answer>Best answer:Best option: C</answer>", "C", 1.0),
        ("<answer>Best answer: C</answer>", "C", 0.0),  # the capital of Best
        ("<answer>b</answer>", "B", 0.0),
        ("<answer>b</answer>", "green", 1.0),  # no letter on either side
        ("<answer></answer>", "H", 1.0),
        ("<answer>one two three four five six seven eight nine ten eleven</answer>", "H", 1.0),
        ("B", "B", 0.0),
        ("<answer>B", "B", 0.0),
        ("<answer>A</answer><answer>B</answer>", "B", 0.0),
        ("<answer>\nB\n</answer>", "B", 1.0),
    ],
)
def test_the_letter(text: str, answer: str, value: float) -> None:
    assert published.letter_reward(text, answer) == value


@pytest.mark.parametrize(
    ("text", "answer", "clue", "box"),
    [
        ("<answer>B</answer>", 1, 0, 0),
        (" \n<answer></answer>\t", 1, 0, 0),
        ("<answer>A</answer> junk <answer>B</answer>", 1, 0, 0),
        ("x<answer>B</answer>", 0, 0, 0),
        ("<answer>B</answer>.", 0, 0, 0),
        ("<answer>", 0, 0, 0),
        ("<answer></answer", 0, 0, 0),
        ("<think>t</think><answer>B</answer>", 0, 0, 0),
        ("<answer>B</answer><glue>[(1, 2)]</glue>", 0, 1, 0),
        ("<answer>B</answer> \n\t<glue>[]</glue>\n", 0, 1, 0),
        ("<answer>B</answer>x<glue>[]</glue>", 0, 0, 0),
        ("<answer>B</answer><glue>(1, 2)</glue>", 0, 0, 0),
        ("<answer>B</answer><glue>x</glue><glue>[]</glue>", 0, 0, 0),  # the first is not valid
        ("<answer>B</answer><glue>[]</glue><glue>x</glue>", 0, 1, 0),
        ("<answer>B</answer><glue>[1, 2, 3, 4]</glue>", 0, 0, 1),
        ("<answer>B</answer><glue> [1, 'a', None, -4.5e3]</glue>", 0, 0, 1),
        ("<answer>B</answer><glue>(1, 2, 3, 4)</glue>", 0, 0, 0),
        ("<answer>B</answer><glue>[1, 2, 3]</glue>", 0, 0, 0),
        # Only `eval` would take these:
        ("<answer>B</answer><glue>[1+1, 2, 3, 4]</glue>", 0, 0, 0),
        ("<answer>B</answer><glue>list(range(4))</glue>", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_formats(text: str, answer: float, clue: float, box: float) -> None:
    assert published.answer_format(text) == answer
    assert published.clue_format(text) == clue
    assert published.box_format(text) == box


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        ("<answer>[10, 20, 30, 60]</answer>", 1.0),
        ("<answer> (10, 20, 30, 60) </answer>", 1.0),
        ("[10, 20, 30, 60]", 1.0),  # without a tag the whole text
        ("10, 20, 30, 60", 1.0),
        ("<answer>[10, 20, 20, 60]</answer>", 0.5),
        ("<answer>[40, 20, 50, 60]</answer>", 0.0),
        ("<answer>\n[10, 20, 30, 60]</answer>", 0.0),  # a line feed in the tag: the whole text
        ("<answer>\n<answer>[10, 20, 30, 60]</answer>", 1.0),
        ("<answer>x</answer><answer>[10, 20, 30, 60]</answer>", 0.0),
        # Reversed: the area is 800, as of two negative sides, nothing is common.
        ("<answer>[30, 60, 10, 20]</answer>", 0.0),
        # One side reversed and far apart: 0 / (-100 + 800).
        ("<answer>[60, 0, 50, 10]</answer>", 0.0),
        ("<answer>[30, 20, 10, 60]</answer>", 0.0),  # union -800 + 800
        ("<answer>[10, 20, 30]</answer>", 0.0),
        ("<answer>[10, 20, 30, '60']</answer>", 0.0),
        ("<answer>[10, 20, 1e999, 60]</answer>", 0.0),
        ("<answer>b'\\n\\x14\\x1e<'</answer>", 1.0),  # bytes are four numbers
        ("", 0.0),
    ],
)
def test_boxes(text: str, iou: float) -> None:
    assert published.box_reward(text, "answer", BOX) == pytest.approx(iou)


def test_tracking() -> None:
    def text(*boxes: list[float], around: str = "{}") -> str:
        return f"<answer>{around.format(list(boxes))}</answer>"

    box = list(BOX)
    half = [10.0, 20.0, 20.0, 60.0]
    good = text(*[box] * 4, *[half] * 4)
    assert published.tracking_reward(good, [BOX] * 8) == 0.75
    assert published.tracking_format(good) == 1.0
    broken = good.replace(", ", ",\n").replace("<answer>", "<ans\nwer>")
    assert published.tracking_reward(broken, [BOX] * 8) == 0.75
    assert published.tracking_reward(good, [BOX] * 7) == 0.0
    for wrong in (text(*[box] * 7), text(*[box] * 7, box[:3]), text(*[box] * 8, around="({})x")):
        assert published.tracking_reward(wrong, [BOX] * 8) == published.tracking_format(wrong) == 0
    named = text(*[box] * 7, [1, 2, 3, "a"])  # type: ignore[list-item]
    assert published.tracking_format(named) == 1.0
    assert published.tracking_reward(named, [BOX] * 8) == 0.0
