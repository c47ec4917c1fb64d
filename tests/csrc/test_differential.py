"""Python and libvtts.so on random input: the same clues, plans and hashes, to the bit."""

from __future__ import annotations

import hashlib
from typing import Any

import abi_cases
import numpy as np
import vtts_abi
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.engine.page_hash import content_id, page_hashes, pair_name
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.sizing import smart_resize
from vtts_rt.types import PixelBox

# Pieces of the notation, so that random texts are clues more often than not.
PIECES = [
    *("<glue>", "</glue>", "<think>", "</think>", "<answer>", "< / Answer >", "<    glue    >"),
    *("<glue", "[", "]", "(", ")", "{", ", ", ",", "-", "\u2212", "\u2013", "~", " to ", "until"),
    *("\u5230", "\u81f3", "\uff0c", "\u3001", ";", "\n", " ", "\u3000", "\x85", "\xa0", "\ufffd"),
    *("1", "12.5", "0.25", ".", "..", ":", "1:05", "1:00:00.5", "e", "E", "+", "e+", "e-3", "0.1"),
    *("1e999", "1e-999", "5e-324", "nan", "inf", "Infinity", "99999999999999999999", "\x00"),
    *("s", "seconds", "frame3", "_", "[]", "()", "<", ">", "/", "(1, 2)", "[0.1, 0.2, 0.3, 0.4]"),
]
BYTES = [b"\xff", b"\xc2", b"\xe2\x88", b"\x92", b"\xe3\x80", b"\xed\xa0\x80", b"\xf0\x9f\x98"]
texts = st.lists(
    st.one_of(
        st.sampled_from([piece.encode() for piece in PIECES] + BYTES),
        st.floats().map(lambda v: repr(v).encode()),
        st.binary(max_size=3),
    ),
    max_size=40,
).map(b"".join)


def found_clue(raw: bytes) -> dict[str, Any]:
    found = vtts_abi.clue_dict(vtts_abi.parse_clue(raw))
    for tag in vtts_abi.TAGS:
        begin, end = found[tag]
        found[tag] = None if begin < 0 else raw[begin:end].decode(errors="replace")
    return found


@settings(max_examples=1000, deadline=None)
@given(texts)
def test_clues(raw: bytes) -> None:
    expected = abi_cases.clue_dict(raw)
    assert repr(found_clue(raw)) == repr(expected)  # repr: tells 0.0 from -0.0


seconds = st.one_of(
    st.floats(-10, 100), st.integers(0, 70).map(float), st.floats(-1e300, 1e300), st.just(-0.0)
)
spans = st.tuples(seconds, seconds)
near = st.floats(0, 60).flatmap(lambda t: st.tuples(st.just(t), st.floats(t, t + 10)))
corners = st.one_of(st.floats(0, 1), st.floats(-50, 900), st.floats(-1e300, 1e300))
boxes = st.tuples(corners, corners, corners, corners)


@st.composite
def clues(draw: st.DrawFn) -> Clue:
    found = draw(st.lists(st.one_of(near, spans), max_size=4))
    glue = draw(st.sampled_from([None, "[]", "x"])) if not found else "x"
    return Clue(spans=tuple(found), boxes=tuple(draw(st.lists(boxes, max_size=3))), glue=glue)


@st.composite
def videos(draw: st.DrawFn) -> dict[str, Any]:
    sides = st.one_of(st.integers(1, 2000), st.integers(1, 1 << 20))
    shape = {"height": draw(sides), "width": draw(sides)}
    if draw(st.integers(0, 3)) == 0:
        return {"is_image": 1, "num_frames": 1, **shape}
    num = draw(st.one_of(st.integers(1, 60), st.integers(1, 5000)))
    rate = draw(st.one_of(st.sampled_from([1.0, 24.0, 25.0, 30000 / 1001]), st.floats(0.01, 500)))
    duration = draw(st.one_of(st.just(num / rate), st.floats(0.01, 4000)))
    found = {"num_frames": num, "source_fps": rate, "duration_seconds": duration, **shape}
    if num <= 60 and draw(st.booleans()):
        steps = draw(st.lists(st.floats(0, 3), min_size=num, max_size=num))
        found["timestamps_seconds"] = np.cumsum(steps).tolist()
    return found


configs = st.fixed_dictionaries(
    {"max_frames": st.integers(2, 40).map(lambda n: 2 * n), "min_frames": st.sampled_from([2, 4])},
    optional={
        "sample_fps": st.floats(0.01, 60),
        "min_pixels": st.integers(1, 10**6),
        "total_pixels": st.integers(1, 10**7),
        "key_ratio": st.floats(0.01, 20),
        "focus_frames": st.integers(0, 30).map(lambda n: 2 * n),
        "focus_margin_cells": st.floats(0, 20),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(vtts_abi.STRATEGIES),
    configs,
    st.lists(videos(), min_size=1, max_size=3),
    st.lists(st.tuples(clues(), st.booleans()), max_size=3),
)
def test_plans(
    strategy: str,
    config: dict[str, Any],
    metadata: list[dict[str, Any]],
    history: list[tuple[Clue, bool]],
) -> None:
    expected = abi_cases.plan_rounds(strategy, config, metadata, history)
    planner = vtts_abi.Planner(strategy, config, metadata)
    found = [planner.next()]
    for clue, forced in history:
        native = vtts_abi.make_clue(clue.spans, clue.boxes)
        native.glue_is_empty_list = clue.glue == "[]"
        found.append(planner.next(native, forced=forced))
    for one, other in zip(found, expected, strict=True):
        # Python's words for a division by zero depend on its version.
        for plan in (one, other):
            plan["notes"] = [n.replace("float division", "division") for n in plan["notes"]]
        assert repr(one) == repr(other)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 1 << 20),
    st.integers(1, 1 << 20),
    st.one_of(st.integers(1, 10**6), st.integers(1, 1 << 50)),
    st.one_of(st.floats(1, 1e7), st.integers(1, 1 << 50).map(float)),
)
def test_smart_resize(height: int, width: int, low: int, high: float) -> None:
    found = vtts_abi.smart_resize(height, width, low, high)
    assert found == list(smart_resize(height, width, low, high))


int64s = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(int64s, min_size=4, max_size=4), max_size=40),
    st.integers(1, 20),
    st.binary(max_size=300),
)
def test_page_hashes(rows: list[list[int]], page_size: int, space: bytes) -> None:
    keys = np.array(rows, dtype=np.int64).reshape(-1, 4)
    expected = [h.hex() for h in page_hashes(keys, page_size, space)]
    assert vtts_abi.page_hashes(keys, page_size, space) == expected
    assert len(expected) == len(rows) // page_size


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.lists(int64s, min_size=8, max_size=8))
def test_content_ids(video_id: str, numbers: list[int]) -> None:
    video_id = video_id.encode(errors="replace").decode()
    a, b, *rest = numbers
    expected = content_id(pair_name(video_id, a, b, PixelBox(*rest[:4]), (rest[4], rest[5])))
    assert vtts_abi.pair_content_id(video_id, a, b, rest[:4], rest[4:]) == expected


def test_long_texts_take_time_in_proportion() -> None:
    """Not a judgement of time: a quadratic parser would not come back from these at all."""
    for piece in (b"<", b"<glue>", b"(1,2)", b"1:", b"<think", b"\xe3\x80\x80", b"9"):
        raw = b"<glue>" + piece * (4_000_000 // len(piece))
        assert vtts_abi.parse_clue(raw).num_spans <= 64


def test_hashes_tell_what_must_differ() -> None:
    keys = np.arange(64, dtype=np.int64).reshape(16, 4)
    plain = page_hashes(keys, 4)
    assert len(set(plain)) == 4
    changed = keys.copy()
    changed[5, 2] += 1  # an M-RoPE position inside the second page
    other = page_hashes(changed, 4)
    assert [a == b for a, b in zip(plain, other, strict=True)] == [True, False, False, False]
    assert not set(plain) & set(page_hashes(keys, 4, b"other weights"))
    first = hashlib.blake2b(b"", digest_size=16, person=b"vtts-kv-space-v1").digest()
    data = first + keys[:4].astype("<i8").tobytes()
    expected = hashlib.blake2b(data, digest_size=16, person=b"vtts-kv-page-v1").digest()
    assert plain[0] == expected
