"""Python and libvtts.so against one file of golden vectors, to the bit."""

from __future__ import annotations

import json
import math
from typing import Any

import abi_cases
import numpy as np
import pytest
import vtts_abi

from vtts_rt.perception.clue import parse_clue

GOLDEN: dict[str, list[Any]] = json.loads(abi_cases.GOLDEN.read_text())


def same_bits(a: Any, b: Any) -> bool:
    """Equality that tells 0.0 from -0.0."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b and math.copysign(1.0, a) == math.copysign(1.0, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def texts_of(raw: bytes, found: dict[str, Any]) -> dict[str, Any]:
    """A clue of the library with the text of each tag instead of its range."""
    for tag in vtts_abi.TAGS:
        begin, end = found[tag]
        found[tag] = None if begin < 0 else raw[begin:end].decode(errors="replace")
    return found


def test_the_file_is_what_python_says_today() -> None:
    """`python tests/abi_cases.py` writes it anew; look at the difference before committing it."""
    assert abi_cases.GOLDEN.read_text() == abi_cases.golden_text()


def test_the_file_covers_every_strategy_and_kind() -> None:
    assert {case["strategy"] for case in GOLDEN["plans"]} == set(vtts_abi.STRATEGIES)
    notes = {note for case in GOLDEN["plans"] for r in case["rounds"] for note in r["notes"]}
    assert len(notes) >= 8
    assert {p for case in GOLDEN["clues"] for p in case["problems"]} >= {
        "a group has neither two nor four numbers",
        "a number is not finite or too long",
        "only the first 64 spans and 64 boxes are kept",
    }


@pytest.mark.parametrize("case", GOLDEN["clues"], ids=lambda case: case["hex"][:24])
def test_clues(case: dict[str, Any]) -> None:
    raw = bytes.fromhex(case.pop("hex"))
    found = texts_of(raw, vtts_abi.clue_dict(vtts_abi.parse_clue(raw)))
    assert same_bits(found, case), (found, case)


@pytest.mark.parametrize(
    "case", GOLDEN["plans"], ids=[f"{c['strategy']}-{i}" for i, c in enumerate(GOLDEN["plans"])]
)
def test_plans(case: dict[str, Any]) -> None:
    planner = vtts_abi.Planner(case["strategy"], case["config"], case["videos"])
    clues = [None, *(vtts_abi.parse_clue(text.encode()) for text in case["texts"])]
    for expected, clue in zip(case["rounds"], clues, strict=True):
        found = planner.next(clue, forced=case["forced"])
        assert same_bits(found, expected), (found, expected)


def test_clues_of_the_plans_are_read_alike() -> None:
    for case in GOLDEN["plans"]:
        for text in case["texts"]:
            found = vtts_abi.clue_dict(vtts_abi.parse_clue(text.encode()))
            assert [tuple(span) for span in found["spans"]] == list(parse_clue(text).spans)


def test_page_hashes_and_content_ids() -> None:
    keys = np.array(GOLDEN["keys"], dtype=np.int64)
    for case in GOLDEN["hashes"]:
        found = vtts_abi.page_hashes(
            keys[: case["num_tokens"]], case["page_size"], case["space"].encode()
        )
        assert found == case["hashes"]
    for case in GOLDEN["content_ids"]:
        found_id = vtts_abi.pair_content_id(*case["pair"])
        assert found_id == case["id"] and found_id < 0 and -1 - found_id & 0xFFFFF == 0


def test_smart_resize() -> None:
    for case in GOLDEN["smart_resize"]:
        assert vtts_abi.smart_resize(*case["arguments"]) == case["hw"]
