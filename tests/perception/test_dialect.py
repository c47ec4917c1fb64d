"""Dialects: samples of each, whole and cut anywhere; hostile and random text; where tags stand."""

from __future__ import annotations

import ast
import json
import math
import random
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vtts_rt import config
from vtts_rt.perception import calls
from vtts_rt.perception.calls import MAX_CALL_CHARS, MAX_DEPTH, MAX_TEXT_CHARS
from vtts_rt.perception.clue import Clue, ClueStream, parse_clue
from vtts_rt.perception.dialect import DIALECTS, TAGS, Dialect, tagged
from vtts_rt.perception.region import RawRegion
from vtts_rt.perception.strategy import find_strategy

ROOT = Path(__file__).resolve().parents[2]
# Composed for this test to the published formats.
LINES = (Path(__file__).parent / "dialects.jsonl").read_text().splitlines()
SAMPLES = [json.loads(line) for line in LINES]
LONGVT, PARAVT = DIALECTS["longvt"], DIALECTS["paravt"]


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def read(text: str, dialect: Dialect, cuts: list[int]) -> tuple[Clue, list[RawRegion]]:
    """The clue of a text that arrives in pieces, and the requests that were found on the way."""
    stream = ClueStream(dialect)
    edges = [0, *sorted(cuts), len(text)]
    found = [r for a, b in zip(edges, edges[1:], strict=False) for r in stream.feed(text[a:b])]
    listed = dialect.request.holds == "numbers"
    return stream.finish(), [] if listed else found


def call(arguments: str, tool: str = "crop_video") -> str:
    return f'<tool_call>{{"name": "{tool}", "arguments": {arguments}}}</tool_call>'


def test_every_dialect_has_a_sample() -> None:
    assert {sample["dialect"] for sample in SAMPLES} == set(DIALECTS)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s['dialect']}:{s['text'][:24]}")
def test_samples_whole_and_cut_anywhere(sample: dict[str, Any]) -> None:
    text, dialect = sample["text"], DIALECTS[sample["dialect"]]
    whole = parse_clue(text, dialect)
    regions = tuple(RawRegion(**{k: tuples(v) for k, v in r.items()}) for r in sample["regions"])
    assert whole.regions == regions
    spans = tuple(region.span for region in regions if region.span)
    boxes = tuple(region.box for region in regions if region.box)
    assert whole.spans == (tuples(sample.get("spans")) or spans)
    assert whole.boxes == (tuples(sample.get("boxes")) or boxes)
    assert whole.answer == sample.get("answer")
    assert whole.usable == bool(whole.spans or whole.boxes or regions)
    for cuts in (*([i] for i in range(len(text))), list(range(len(text)))):
        cut, told = read(text, dialect, cuts)
        assert cut == whole
        assert tuple(told) == regions[: len(told)]


def test_what_was_read_so_far_holds_times_and_boxes() -> None:
    text = "the <obj>man</obj><box>[35, 20, 120, 200]</box>at<t>12.4</t>s and the <obj>dog</obj>"
    stream = ClueStream(DIALECTS["open-o3-video"])
    (region,) = stream.feed(text)
    so_far = stream.so_far()
    assert so_far.regions == (region,)
    assert (so_far.spans, so_far.boxes) == (((12.4, 12.4),), ((35, 20, 120, 200),))
    stream = ClueStream()
    stream.feed("<glue>[(1, 2)]</glue><glue>[(3, 4), [1, 2, 3, 4")
    assert (stream.so_far().spans, stream.so_far().boxes) == (((3, 4),), ())


def test_a_call_is_known_when_its_brace_closes() -> None:
    text = call('{"start_time": 1, "end_time": 2}')
    end = text.index("}}") + 2
    for cut, known in ((end - 1, 0), (end, 1)):
        assert len(ClueStream(LONGVT).feed(text[:cut])) == known


def test_a_cut_call_is_no_request() -> None:
    text = call('{"start_time": 1, "end_time": 2}')
    for cut in range(text.index("}}") + 2):
        clue = parse_clue(text[:cut], LONGVT)
        assert not clue.usable and clue.problems


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_path_that_a_model_writes_is_never_read(dialect: Dialect) -> None:
    for tool in dialect.calls:
        names = ("video_path", "path", "file", "url", "image_path", "video")
        given = {name: "/etc/passwd" for name in names}
        given |= {"start_time": 1, "end_time": 2, "segment": [1, 2], "bbox_2d": [0, 0, 1, 1]}  # type: ignore[dict-item]
        item = {"name": tool.name, "arguments": given} if tool.name else given
        tag = dialect.request
        clue = parse_clue(f"{tag.opening}{json.dumps(item)}{tag.closing}", dialect)
        assert "passwd" not in repr(clue.regions)
        assert not set(names) & set(tool.arguments)
    assert not any("path" in f.name or "url" in f.name for f in fields(RawRegion))


def test_requests_of_a_turn_are_bounded() -> None:
    text = "".join(call(f'{{"start_time": {i}, "end_time": {i + 1}}}') for i in range(9))
    for dialect in (LONGVT, PARAVT):
        clue = parse_clue(text, dialect)
        assert clue.spans == tuple((i, i + 1) for i in range(dialect.max_calls))
        assert any("only the first" in problem for problem in clue.problems)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{}", "names no time"),
        ('{"start_time": 1}', "stand together"),
        ('{"start_time": "soon", "end_time": 2}', "start is no finite number"),
        ('{"start_time": true, "end_time": 2}', "start is no finite number"),
        ('{"start_time": NaN, "end_time": 2}', "start is no finite number"),
        ('{"start_time": 1, "end_time": 1e999}', "end is no finite number"),
        (f'{{"start_time": 1, "end_time": {"9" * 400}}}', "end is no finite number"),
        ('{"start_time": [1], "end_time": 2}', "start is no finite number"),
        ("[1, 2]", "has no arguments"),
        ("null", "has no arguments"),
        ('{"start_time": 1 "end_time": 2}', "no JSON"),
        ("[" * 20 + "]" * 20, f"{MAX_DEPTH} levels"),
        ('{"x": "' + "y" * MAX_CALL_CHARS + '"}', f"{MAX_CALL_CHARS} characters"),
    ],
)
def test_bad_calls(arguments: str, problem: str) -> None:
    clue = parse_clue(call(arguments), LONGVT)
    assert not clue.usable
    assert any(problem in said for said in clue.problems), clue.problems


def test_a_bad_density_or_query_leaves_the_time() -> None:
    clue = parse_clue(call('{"start": 1, "end": 2, "task": 5}'), PARAVT)
    assert clue.regions == (RawRegion(span=(1, 2)),) and "query is no text" in clue.problems
    long = parse_clue(call(f'{{"start": 1, "end": 2, "task": "{"q" * 2000}"}}'), PARAVT)
    assert long.regions[0].query == "q" * MAX_TEXT_CHARS


def test_an_unknown_tool() -> None:
    clue = parse_clue(call('{"start_time": 1, "end_time": 2}', "rm"), LONGVT)
    assert not clue.usable and any("no tool" in problem for problem in clue.problems)


def test_a_broken_call_does_not_hide_what_follows() -> None:
    broken = '<tool_call>{"name": "crop_video", "arguments": {"start_time": "</tool_call>'
    text = broken + call('{"start_time": 3, "end_time": 4}') + "<answer>A</answer>"
    clue = parse_clue(text, LONGVT)
    assert (clue.spans, clue.answer) == (((3, 4),), "A")
    # After its last brace an unclosed call ends at the next tag of any kind.
    open_call = call('{"start_time": 3, "end_time": 4}').removesuffix("</tool_call>")
    clue = parse_clue(open_call + "<answer>A</answer>", LONGVT)
    assert (clue.spans, clue.answer) == (((3, 4),), "A")


def test_a_request_in_other_words_is_none_of_a_dialect() -> None:
    for sample in SAMPLES:
        if sample["regions"] and sample["dialect"] not in ("open-o3-video", "dynframe"):
            assert not parse_clue(sample["text"]).usable


# -- random text --------------------------------------------------------------------------------

PIECES = [
    *(t for d in DIALECTS.values() for tag in d.tags for t in (tag.opening, tag.closing)),
    *(s["text"] for s in SAMPLES),
    *(f'"{name}": ' for d in DIALECTS.values() for c in d.calls for name in c.arguments),
    *(f'{{"name": "{c.name}", "arguments": {{' for d in DIALECTS.values() for c in d.calls),
    "{", "}", "}}", "[", "]", '"', "\\", ", ", ": ", "1", "2.5", "-3", "1e999", "NaN", "true",
    "null", "crop_video(", "start_time=1", "'", ")",
    "choose frames between 1 and 2", "output answer:",
    "9" * 400, "0:01:02", "DAY1_1-DAY1_2", "<", ">", "</", "\ud800", "é", "\u0663", "\n", " ",
]  # fmt: skip


def check(seed: int) -> bool:
    """One random text in one dialect, whole and in pieces; whether it asks for a look."""
    dice = random.Random(seed)
    dialect = dice.choice(list(DIALECTS.values()))
    text = "".join(dice.choice(PIECES) for _ in range(dice.randint(1, 12)))
    if dice.random() < 0.5:  # a sample with an error in it
        own = [s["text"] for s in SAMPLES if s["dialect"] == dialect.name]
        at = dice.randrange(len(text := dice.choice(own)) + 1)
        text = text[:at] + dice.choice([*PIECES, ""]) + text[at + dice.randint(0, 3) :]
    whole = parse_clue(text, dialect)
    cuts = sorted(dice.randrange(len(text) + 1) for _ in range(4))
    cut, told = read(text, dialect, cuts)
    assert cut == whole, (dialect.name, text)
    assert tuple(told) == whole.regions[: len(told)], (dialect.name, text)
    assert len(whole.regions) <= dialect.max_calls
    for region in whole.regions:
        numbers = (*(region.span or ()), *(region.box or ()), *(region.frames or ()))
        assert all(map(math.isfinite, numbers))
    assert (whole.text, parse_clue(text).text) == (text, text)
    return whole.usable


def test_random_texts() -> None:
    usable = sum(check(seed) for seed in range(2000))
    assert 300 < usable < 1700  # both outcomes are common


@pytest.mark.slow
def test_many_more_random_texts() -> None:
    for seed in range(2000, 100_000):
        check(seed)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize(
    "hostile", ["{", '{"', "[", '{"a":', "\\", "(", "x(", "1", "<", "OPEN", "OPENCLOSE", "\ud800"]
)
def test_hostile_text_is_read_in_linear_time(dialect: Dialect, hostile: str) -> None:
    tag = dialect.request
    hostile = hostile.replace("OPEN", tag.opening).replace("CLOSE", tag.closing)
    text = tag.opening + hostile * (20_000 // len(hostile))
    assert parse_clue(text, dialect).text == text
    assert parse_clue(text[:MAX_CALL_CHARS] + tag.closing, dialect).text


# -- the table ----------------------------------------------------------------------------------


def test_the_table_says_what_it_needs() -> None:
    for name, dialect in DIALECTS.items():
        assert name == dialect.name and dialect.models
        known = {*calls.ARGUMENTS, "answer"}
        assert {v for c in dialect.calls for v in c.arguments.values()} <= known
        assert {tag.field for tag in dialect.tags if tag.holds == "field"} <= known
        groups = {g for p in dialect.phrases for g in re.compile(p).groupindex}
        assert groups <= known
    assert {*DIALECTS} == {name for names in config.DIALECTS.values() for name in names}
    for name in config.RUNNING_DIALECTS:
        dialect, strategies = DIALECTS[name], config.strategies_of(name)
        goes_on = all(find_strategy(s).continues for s in strategies)
        assert goes_on == (dialect.reply is not None) == bool(dialect.examples)
        for example in dialect.examples:  # a model is shown requests that can be read
            assert parse_clue(dialect.request.around(example), dialect).usable


def test_tags_and_tools_are_spelt_in_the_table_only() -> None:
    """Whole ones anywhere, halves of them in texts, which might be put together."""
    names = {tag.name for dialect in DIALECTS.values() for tag in dialect.tags} | {"tool_response"}
    tools = {tool.name for dialect in DIALECTS.values() for tool in dialect.calls} - {""}
    name = rf"({'|'.join(names)})"
    whole = re.compile(rf"<\s*/?\s*{name}\s*>|\b({'|'.join(tools)})\b", re.IGNORECASE)
    half = re.compile(rf"<\s*/?\s*{name}$|^{name}\s*>", re.IGNORECASE)
    table = ROOT / "vtts_rt" / "perception" / "dialect.py"
    found = []
    for folder in ("vtts_rt", "kernels", "bench"):
        for path in sorted({*(ROOT / folder).rglob("*.py")} - {table}):
            source = path.read_text()
            found += [f"{path}: {match[0]}" for match in whole.finditer(source)]
            texts = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)]
            strings = [text for text in texts if isinstance(text, str)]
            found += [f"{path}: {text!r}" for text in strings if half.search(text)]
    assert not found, found


def test_every_dialect_has_a_row_in_the_docs() -> None:
    page, _, _ = (ROOT / "docs/dialects.md").read_text().partition("\n## ")
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (.*) \|$", page, re.M)
    assert [name for name, _ in rows] == list(DIALECTS)
    runs = [name for name, how in rows if not how.startswith(("no", "never"))]
    assert tuple(runs) == config.RUNNING_DIALECTS


def test_tagged() -> None:
    assert tagged("answer", "A") == "<answer>A</answer>"
    assert TAGS["glue"] == ("<glue>", "</glue>")
