"""The published clue rule of `official`, against a transcription of it, over random texts."""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from utils import resolved

from vtts_rt.perception.clue import Clue, clue_from_json, clue_to_json
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.policy_official import official_indices
from vtts_rt.perception.published import MAX_CHARS, MAX_DEPTH, PublishedClueStream, clue_stream
from vtts_rt.perception.strategy import find_strategy, plan_round
from vtts_rt.types import VideoMetadata

NUM_FRAMES, SOURCE_FPS = 90, 7.5
CONFIG = resolved(max_frames=16)
VIDEO = VideoMetadata("v", NUM_FRAMES, SOURCE_FPS, NUM_FRAMES / SOURCE_FPS, 360, 640, "test")


# -- the rule, transcribed: independent of the package ------------------------------------------


def oracle_sampler(key_times: Any) -> list[int]:
    """Frames of a round of 16 frames at most, from whatever the literal was; None: uniform."""
    num = 16
    uniform: list[int] = torch.linspace(0, NUM_FRAMES - 1, num).round().long().tolist()
    if key_times is None:
        return uniform
    try:
        total = NUM_FRAMES - 1
        ranges = []
        for begin, end in key_times:
            first, last = int(begin * SOURCE_FPS), min(int(end * SOURCE_FPS), total - 1)
            if first <= last:
                if last - first > 10**6:  # would exhaust the memory
                    return uniform
                ranges.append((first, last))
        key = sum(last - first + 1 for first, last in ranges)
        inside = round(num * (key * 1.5) / (key * 1.5 + (total - key) * 1.0))
        picked = []
        for first, last in ranges:
            count = max(1, round(inside * (last - first + 1) / key))
            picked += np.linspace(first, last, num=count, dtype=int).tolist()
        covered = {frame for first, last in ranges for frame in range(first, last + 1)}
        rest = [frame for frame in range(total) if frame not in covered]
        if num - inside > 0 and rest:
            picked += [rest[i] for i in np.linspace(0, len(rest) - 1, num - inside, dtype=int)]
        frames = sorted(set(picked))
    except Exception:
        return uniform
    if frames and frames[0] < -NUM_FRAMES:  # there is no such frame
        return uniform
    return [frame % NUM_FRAMES for frame in frames]  # decord counts negative ones from the end


def oracle_rounds(answers: list[str], sticky: bool) -> list[list[int]]:
    """Frames of the rounds after each answer."""
    frames, key_times = [], None
    for answer in answers:
        match = re.search(r"<glue>(.*?)</glue>", answer, re.DOTALL)
        if not sticky:
            key_times = None
        try:
            if match:
                key_times = ast.literal_eval(match.group(1))
        except Exception:
            key_times = None
        frames.append(oracle_sampler(key_times))
    return frames


# -- random texts -------------------------------------------------------------------------------


class Texts:
    """Answers of every kind that a model may write, and of some that it would not."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def answer(self) -> str:
        dice, glue = self.dice, self.glue()
        shape = dice.choice(SHAPES)
        return shape.replace("GLUE", glue).replace("OTHER", self.glue())

    def glue(self) -> str:
        kinds: list[Callable[[], str]] = [
            *[self.spans] * 8, self.nested, self.odd_pairs, self.container, self.flat,
            self.empty, self.broken, self.noise, self.spaced,
        ]  # fmt: skip
        return self.dice.choice(kinds)()

    def number(self) -> str:
        dice = self.dice
        if dice.random() < 0.9:
            return dice.choice([str(dice.randint(0, 14)), f"{dice.uniform(0, 13):.1f}"])
        return dice.choice(NUMBERS)

    def pair(self) -> str:
        return self.dice.choice(
            ["({}, {})", "({},{})", "[{}, {}]", "( {} ,{} )", "({}, {},)"]
        ).format(self.number(), self.number())

    def items(self, most: int = 4) -> str:
        return ", ".join(self.pair() for _ in range(self.dice.randint(1, most)))

    def spans(self) -> str:
        return self.dice.choice(["[{}]", "[{}]", "({},)", "{}", "[{},]"]).format(self.items())

    def nested(self) -> str:
        return self.dice.choice(["[[{}]]", "[({}), 1]", "[[{}], [{}]]", "[{0}, [{0}]]"]).format(
            self.items(2), self.items(2)
        )

    def odd_pairs(self) -> str:
        a, b, c = self.number(), self.number(), self.number()
        forms = ["[({a}, {b}, {c})]", "[({a},)]", "[()]", "[{{{a}, {b}}}]", "[{{{a}: 1, {b}: 2}}]",
                 "['ab']", "[b'ab']", "[({a}, 'x')]", "[({a}, None)]", "[({a}, ({b},))]",
                 "['', '']", "[({a}, {b}), ({a}, {b}, {c})]", "[({a}, {b}), None]",
                 "[({a}, ...)]"]  # fmt: skip
        return self.dice.choice(forms).format(a=a, b=b, c=c)

    def container(self) -> str:
        forms = ["{{{}}}", "{{({}, {}): 1}}", "{{1: {}}}", "'{}'", "b'ab'", "None", "True", "..."]
        return self.dice.choice(forms).format(self.items(2), self.number())

    def flat(self) -> str:
        a, b = self.number(), self.number()
        forms = ["[{a}, {b}]", "({a}, {b})", "{a}-{b}", "{a}, {b}", "{a} to {b}", "{a}s", "{a}",
                 "[{a}, {b}, {a}, {b}]", "[({a}-{b})]", "[({a} {b})]", "[({a}:{b})]"]  # fmt: skip
        return self.dice.choice(forms).format(a=a, b=b)

    def empty(self) -> str:
        forms = ["[]", "[ ]", "()", "{}", "''", '""', "b''", "set()", "", " ", "[[]]", "\n[]", "#"]
        return self.dice.choice(forms)

    def spaced(self) -> str:
        ways = ["\n{}", "\n{}\n", "\n  {}", " {}", "\t{}", "{}  \n", "{} # note", "{};", "{}\n{}",
                "```python\n{}\n```", "```\n{}```", "\\\n{}", "\ufeff{}", "\u00a0{}", "\r\n{}",
                "\f{}"]  # fmt: skip
        way = self.dice.choice(ways)
        return way.format(self.spans(), self.spans())

    def broken(self) -> str:
        text = list(self.spans())
        for _ in range(self.dice.randint(1, 3)):
            at = self.dice.randrange(len(text) + 1)
            if self.dice.random() < 0.5 and text:
                del text[min(at, len(text) - 1)]
            else:
                text.insert(at, self.dice.choice("()[]{},.-+ ='\"\\\n0\x00é５−_#:jx\ud800"))
        return "".join(text)

    def noise(self) -> str:
        return "".join(
            self.dice.choices("0123456789.,()[] -+e<>/glu\n'", k=self.dice.randint(0, 24))
        )


SHAPES = 4 * ["<think>x</think><answer>A</answer><glue>GLUE</glue>", "<glue>GLUE</glue>"] + [
    "<think>maybe <glue>OTHER</glue></think><answer>A</answer><glue>GLUE</glue>",
    "<glue>GLUE</glue> or <glue>OTHER</glue>",
    "<glue>OTHER<glue>GLUE</glue></glue>",
    "<glue>GLUE",
    "<glue>OTHER <answer>A</answer></glue>",
    "</glue><glue>GLUE</glue>",
    "GLUE</glue>",
    "<GLUE_>GLUE</glue>".replace("GLUE_", "Glue"),
    "<glue >GLUE</glue>",
    "<glue>GLUE</ glue>",
    "< glue>OTHER</glue><glue>GLUE</glue>",
    "no tag at all, GLUE",
    "",
]
NUMBERS = [
    "+5", "-3", "--3", "-0.5", "1e1", "1E-1", "0x10", "0b11", "0o17", "1_0", "1__0", "True",
    "False", "None", "05", "00", "0", "1.", ".5", "1e999", "-1e999", "1e308", "-1e308", "2j",
    "1+2j", "1+2", "9" * 30, "-" + "9" * 30, "9" * 400, "0" * 50, "5.2s", "1:05",
    "12.0000000000000001", "nan", "inf", "'5'", "(5)", "[5]", "~5", "not 1", "1 if 1 else 2", "x",
    "5,0", "٥", "1e", "0x", "1.2.3", "3 000",
]  # fmt: skip


def read(text: str, cuts: list[int] | None = None) -> tuple[Clue, list[tuple[float, ...]]]:
    """The clue of a text that arrives in pieces, and what was told on the way."""
    stream = PublishedClueStream()
    bounds = [0, *sorted(cuts or []), len(text)]
    events = [e for a, b in zip(bounds, bounds[1:], strict=False) for e in stream.feed(text[a:b])]
    return stream.finish(), [event.span for event in events]


def our_frames(clue: Clue) -> list[int]:
    key_spans = clue.spans if clue.spans or clue.empty_list else None
    return official_indices(VIDEO, CONFIG, key_spans)[0]


def our_rounds(answers: list[str], sticky: bool) -> list[list[int]]:
    config = resolved(max_frames=16, sticky_clues=sticky)
    history: list[RoundHistory] = []
    frames = []
    for answer in [*answers, ""]:
        plan = plan_round("official", config, [VIDEO], history, len(history))
        history.append(RoundHistory(plan, read(answer)[0]))
        frames.append(list(plan.frame_indices))
    return frames[1:]


def check(seed: int) -> list[int]:
    """One random text, whole and in pieces; returns the frames that it leads to."""
    texts = Texts(seed)
    answer = texts.answer()
    (expected,) = oracle_rounds([answer], sticky=False)
    whole, events = read(answer)
    assert our_frames(whole) == expected, answer
    assert list(whole.spans) == events
    json.dumps(clue_to_json(whole), allow_nan=False)
    if seed % 5:
        return expected
    cuts = [texts.dice.randrange(len(answer) + 1) for _ in range(texts.dice.randint(1, 6))]
    assert read(answer, cuts) == (whole, events)
    return expected


WARNINGS = pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")


@WARNINGS
def test_random_texts_lead_where_the_published_rule_leads() -> None:
    frames = [check(seed) for seed in range(5000)]
    uniform, empty = oracle_sampler(None), oracle_sampler([])
    assert 100 < frames.count(empty) < frames.count(uniform) < 4000  # every outcome is common


@WARNINGS
def test_random_conversations() -> None:
    """Four texts each: what a round without a clue looks at."""
    for seed in range(150):
        texts = Texts(seed)
        answers = [texts.answer() for _ in range(4)]
        for sticky in (False, True):
            assert our_rounds(answers, sticky) == oracle_rounds(answers, sticky), answers


@WARNINGS
@pytest.mark.slow
def test_many_more_random_texts() -> None:
    for seed in range(5000, 100_000):
        check(seed)


# -- by hand ------------------------------------------------------------------------------------


def spans_of(literal: str) -> tuple[tuple[float, float], ...] | str:
    """What the rule takes from a literal; "uniform" where it takes nothing."""
    clue, _ = read(f"<glue>{literal}</glue>")
    assert clue.boxes == () and clue.glue == literal
    if clue.spans or clue.empty_list:
        assert clue.problems == ()
        return clue.spans
    assert clue.problems
    return "uniform"


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("[(1, 2)]", ((1, 2),)),
        ("[[1, 2], (3.5, 4)]", ((1, 2), (3.5, 4))),
        ("{(1, 2)}", ((1, 2),)),
        ("{(1, 2): 'x'}", ((1, 2),)),
        ("[(+5, 1e1), (0x10, 1_0), (True, 2)]", ((5, 10), (16, 10), (1, 2))),
        ("[b'ab']", ((97, 98),)),
        ("\n[(1, 2)]", ((1, 2),)),
        ("  [(1, 2)]", ((1, 2),)),
        ("[(9, 3)]", ((9, 3),)),
        *[(empty, ()) for empty in ("[]", "[ ]", "()", "{}", "''", "set()", "b''")],
        *[
            (bad, "uniform")
            for bad in (
                "[5, 6]", "(5, 6)", "5-6", "5.2s", "```\n[(1, 2)]\n```", "\n  [(1, 2)]",
                "[(05, 6)]", "[(1, 2, 3)]", "[(1, 2), (1, 2, 3)]", "[(1,)]", "", "None", "7",
                "[('a', 1)]", "[(1j, 2)]", "[(1e999, 2)]", f"[({'9' * 400}, 1)]", "[(nan, 1)]",
                "[(1, 2)", "x", "[(1, 2)]\x00", "'\ud800'",
            )
        ],
    ],
)  # fmt: skip
def test_literals(literal: str, expected: object) -> None:
    assert spans_of(literal) == expected


def test_all_spans_count() -> None:
    spans = [(i, i + 1) for i in range(500)]
    assert spans_of(str(spans)) == tuple(spans)


def test_the_bounds_on_length_and_depth() -> None:
    longest = "[(1, 2)" + " " * (MAX_CHARS - 8) + "]"
    assert len(longest) == MAX_CHARS and spans_of(longest) == ((1, 2),)
    assert spans_of(longest + " ") == "uniform"
    # A dictionary's values do not count, only that they can be read.
    deep, deeper = ("{(1, 2): " + "[" * n + "]" * n + "}" for n in (MAX_DEPTH - 1, MAX_DEPTH))
    assert spans_of(deep) == ((1, 2),) and spans_of(deeper) == "uniform"


@pytest.mark.parametrize(
    "hostile",
    [
        "1+" * 32_000 + "1", "-" * 65_000 + "1", "x" + ".x" * 32_000, "not " * 16_000 + "1",
        "f" + "()" * 32_000, "lambda x,y:" * 5_900 + "1", "[" * 65_000,
        "1 if 1 else " * 5_400 + "1", "9" * 65_000, "0x" + "f" * 65_000, "1" + "[0]" * 21_000,
        ("(" + "-" * 600) * 100 + "1" + ")" * 100,
    ],
    ids=lambda text: text[:6],
)  # fmt: skip
def test_texts_made_to_exhaust_a_parser_are_uniform(hostile: str) -> None:
    """In a thread, as the rounds run, with the least stack that some systems give one: MemoryError
    and RecursionError are answers like others."""
    found: list[object] = []
    before = threading.stack_size(512 * 1024)
    thread = threading.Thread(target=lambda: found.append(spans_of(hostile)))
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert found == ["uniform"]


def test_what_this_python_takes_counts() -> None:
    """Integers of more digits than the interpreter allows fail where it has a limit (3.11, later
    releases of 3.10); as a number of seconds they are too large anyway."""
    zeros = "0" * 5_000
    limited = hasattr(sys, "get_int_max_str_digits")
    huge = "9" * 5_000
    assert spans_of(f"{{(1, 2): {huge}}}") == ("uniform" if limited else ((1, 2),))
    assert spans_of(f"{{(1, 2): {huge[:4_000]}}}") == ((1, 2),)
    assert spans_of(f"[({huge}, 2)]") == "uniform"
    assert spans_of(f"[(0.{zeros}, 2)]") == ((0, 2),)
    assert spans_of(f"[(0x{zeros}5, 6)]") == ((5, 6),)


def test_a_long_text_is_read_in_linear_time() -> None:
    """One character at a time: nothing is searched or copied again."""
    clue, events = read("<glue>" + "(1, 2), " * 20_000, list(range(0, 160_000, 4)))
    assert events == [] and clue.glue is None


@pytest.mark.parametrize("sticky", [False, True])
def test_a_round_without_a_clue_forgets_or_keeps_the_last(sticky: bool) -> None:
    plans = our_rounds(["<glue>[(1, 2)]</glue>", "none", "<glue>x</glue>", "none"], sticky)
    uniform, led = oracle_sampler(None), oracle_sampler([(1, 2)])
    assert plans == [led, led if sticky else uniform, uniform, uniform]


def test_a_forced_clue_is_never_stuck_to_an_older_one() -> None:
    config = resolved(max_frames=16, sticky_clues=True)
    first = plan_round("official", config, [VIDEO], [], 0)
    history = [RoundHistory(first, read("<glue>[(1, 2)]</glue>")[0])]
    for forced, expected in ((None, None), ([], []), ([[3, 4]], [(3, 4)])):
        look = RoundHistory(first, clue_from_json(forced), forced=True)
        plan = plan_round("official", config, [VIDEO], [*history, look], 2)
        assert list(plan.frame_indices) == oracle_sampler(expected)


def test_only_official_reads_by_the_published_rule() -> None:
    text = "<think>x</think><answer>B</answer><glue>12-15 [0, 0, 1, 1]"
    for strategy, spans in (("official", ()), ("grid", ((12, 15),)), ("append", ((12, 15),))):
        stream = clue_stream(find_strategy(strategy).literal_clues)
        stream.feed(text)
        clue = stream.finish()
        assert (clue.think, clue.answer, clue.spans) == ("x", "B", spans)
