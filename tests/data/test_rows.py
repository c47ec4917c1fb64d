from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from vtts_rt.data import rows as rows_module
from vtts_rt.data.rows import (
    BadRow,
    BadRows,
    DataSet,
    Row,
    check_evidence,
    read_manifest,
    read_rows,
    row_from_dict,
    write_manifest,
    write_rows,
)
from vtts_rt.types import Box, TimeSpan

FULL = Row(
    media="a/clip.mp4",
    question="Which?",
    options=("one", "two"),
    answer="B",
    spans=(TimeSpan(1.0, 2.5), TimeSpan(4.0, 4.0)),
    boxes=(Box(0.1, 0.2, 0.3, 0.4),),
    duration_seconds=20.0,
)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_survive_a_file(tmp_path: Path, name: str) -> None:
    rows = [FULL, Row("b.mp4", "What?", spans=(TimeSpan(0, 1),)), Row("c.png", "Hm?", "image")]
    boxes = (Box(0.1, 0.2, 0.3, 0.4), Box(0.2, 0.2, 0.4, 0.4))
    rows += [Row("d.png", "Where?", "image", boxes=boxes[:1]), Row("e.mp4", "it", boxes=boxes)]
    rows += [Row("e.mp4", "it", boxes=boxes, box_times=(0.0, 1.5))]
    for options in (("A. Lincoln", "B. Obama"), ("A. Lincoln", "a bee"), ("A.", "(B)"), ("A. x",)):
        rows += [Row("e.mp4", "who?", options=options, answer="A")]  # texts that begin like letters
    rows += [Row("e.mp4", "it", pixel_boxes=((0.0, 0.0, 1.0, 1.0), (3.0, 3.0, 9.0, 9.0)))]
    write_rows(tmp_path / name, rows)
    assert list(read_rows(tmp_path / name)) == rows


def test_published_forms_of_glue() -> None:
    base = {"video": "v.mp4", "question": "q"}
    assert row_from_dict({**base, "glue": [[1, 2], [3, 4.5]]}).spans[1] == TimeSpan(3.0, 4.5)
    assert row_from_dict({**base, "glue": [0.1, 0.2, 0.5, 0.9]}).boxes == (Box(0.1, 0.2, 0.5, 0.9),)
    assert row_from_dict({**base, "glue": None}).spans == ()
    assert row_from_dict({**base, "glue": [[-0.1, 11.0]]}).spans == (TimeSpan(0.0, 11.0),)
    flat = {"image": "v.png", "question": "q", "answer": [12, 30, 50, 96]}
    assert row_from_dict(flat).pixel_boxes == ((12.0, 30.0, 50.0, 96.0),)
    track = [[0.1 * k, 0.2, 0.1 * k + 0.2, 0.9] for k in range(8)]
    row = row_from_dict({**base, "glue": track})
    assert row.boxes[7] == Box(*track[7]) and not row.box_times and not row.spans
    assert (
        row_from_dict({**base, "glue": {"boxes": track[:2], "times": [0, 2.5]}}).box_times[1] == 2.5
    )
    one_unit = row_from_dict({**base, "glue": [[0, 0, 1, 1], [5, 5, 9, 9]]})
    assert one_unit.pixel_boxes[0] == (0.0, 0.0, 1.0, 1.0) and not one_unit.boxes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question must be a non-empty text"),
        ({"question": 3}, "question must be a text"),
        ({"image": "x.png"}, "exactly one of video, image"),
        ({"options": ["a", ""]}, "options must be at most 26 non-empty texts"),
        ({"options": 3}, "options must be a list of texts"),
        ({"options": ["A. a", "B. b"], "answer": "A. b"}, "the text of its own option"),
        ({"answer": "\ud800"}, "text must be valid Unicode"),
        ({"video": "a\0.mp4"}, "media must be a path"),
        ({"options": ["a", "b"], "answer": "C"}, "answer must be one of A, B"),
        ({"glue": [[2, 1]]}, "span must be 0 <= start <= end"),
        ({"glue": [[-1, 1]]}, "span must be 0 <= start <= end"),
        ({"glue": [[1, float("nan")]]}, "span must be"),
        ({"glue": [[1]]}, "glue must be 2 numbers"),
        ({"glue": {"boxes": [[0.5, 0, 0.5, 1]]}}, "box must be"),
        ({"glue": "soon"}, "glue must be a list or an object"),
        ({"duration": -1}, "duration_seconds must be > 0"),
        ({"duration": "long"}, "duration must be 1 number"),
        ({"duration": 10**400}, "duration must be 1 number"),
        ({"glue": [5.2]}, "glue must be 2 numbers"),
        ({"glue": [[1, 2], 3]}, "glue must be 2 numbers"),
        ({"glue": {"boxes": 3}}, "glue boxes must be a list"),
        (
            {"glue": {"span": [[1, 2]]}},
            "key of glue must be one of spans, boxes, times, got 'span'",
        ),
        ({"glue": [30, 40, 20, 90]}, "box must be 0 <= x0 < x1 and 0 <= y0 < y1"),
        ({"glue": {"boxes": [[0, 0, 1, 1]], "times": [1, 2]}}, "box_times must be ascending"),
        ({"glue": {"boxes": [[0, 0, 1, 1]] * 2, "times": [2, 1]}}, "box_times must be ascending"),
        ({"glue": {"times": 3}}, "glue times must be a list"),
        ({"glue": [[0, 1]] * 5000}, "glue must be at most 4096 spans or boxes, got 5000"),
        ({"answer": [[1, 2], "x"]}, "glue must be 2 numbers"),
    ],
)
def test_bad_rows_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_from_dict({"video": "v.mp4", "question": "q", **change})


def test_bad_files_name_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([FULL.as_dict(), {"video": "v.mp4"}]))
    with pytest.raises(ValueError, match=r"rows\.json, row 2: row: question must be a text"):
        list(read_rows(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="must be valid JSON"):
        list(read_rows(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a JSON array"):
        list(read_rows(path))


def test_manifest_paths_start_from_its_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [FULL])
    entry = DataSet("needle", "video", "gqa", Path("clips"), Path("rows.json"))
    write_manifest(tmp_path / "manifest.json", [entry])
    (found,) = read_manifest(tmp_path / "manifest.json")
    assert list(found.rows()) == [(tmp_path / "clips" / "a" / "clip.mp4", FULL)]


def test_bad_manifests(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    good = {"media_type": "video", "task_type": "mc", "visual_base": ".", "json_path": "r.json"}
    path.write_text(json.dumps({"x": {**good, "task_type": "chat"}}))
    with pytest.raises(ValueError, match="manifest entry x: task_type must be one of tg"):
        read_manifest(path)
    path.write_text(json.dumps({"x": {k: v for k, v in good.items() if k != "json_path"}}))
    with pytest.raises(ValueError, match="json_path must be a text, got None"):
        read_manifest(path)
    path.write_text(json.dumps({"x": {**good, "media_type": "image"}}))
    write_rows(tmp_path / "r.json", [FULL])
    with pytest.raises(ValueError, match="media must be of type image"):
        list(read_manifest(path)[0].rows())


# Rows as the files of VTTS-80K hold them, one of each task.
RELEASED: list[tuple[dict[str, Any], Row]] = [
    (
        {"video": "c/AO8RW.mp4", "question": "a person opens a door", "glue": [2.1, 8.9],
         "duration": 33.0},
        Row("c/AO8RW.mp4", "a person opens a door", spans=(TimeSpan(2.1, 8.9),),
            duration_seconds=33.0),
    ),
    (
        {"video": "1164/3238.mp4", "question": "why does she smile", "answer": "(C)",
         "options": "(A) tired\n(B) hungry\n(C) happy\n(D) cold\n(E) asleep\n",
         "glue": [[0.0, 3.5], [7, 9]], "durations": 20},
        Row("1164/3238.mp4", "why does she smile", options=("tired", "hungry", "happy", "cold",
            "asleep"), answer="C", spans=(TimeSpan(0.0, 3.5), TimeSpan(7, 9)),
            duration_seconds=20.0),
    ),
    (
        {"video": "v.mp4", "question": "what?", "options": ["A. run", "B. sit"],
         "answer": "B. sit"},
        Row("v.mp4", "what?", options=("run", "sit"), answer="B"),
    ),
    (
        {"image": "v.jpg", "question": "which?", "options": ["red", "blue"], "answer": "blue",
         "glue": [12, 30, 50.5, 96]},
        Row("v.jpg", "which?", "image", ("red", "blue"), "B",
            pixel_boxes=((12.0, 30.0, 50.5, 96.0),)),
    ),
    (
        {"video": "v.mp4", "question": "count", "options": ["1. a", "A. b"], "answer": "A"},
        Row("v.mp4", "count", options=("1. a", "A. b"), answer="A"),
    ),
    (
        {"video": "v.mp4", "question": "who?", "options": ["A. A. Lincoln", "B. Obama"],
         "answer": "A. Lincoln"},
        Row("v.mp4", "who?", options=("A. Lincoln", "Obama"), answer="A"),
    ),
    (
        {"video": "v.mp4", "question": "say it", "answer": "(C)", "options": []},
        Row("v.mp4", "say it", answer="(C)"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("data", "row"), RELEASED)
def test_rows_of_the_release(data: dict[str, Any], row: Row, tmp_path: Path) -> None:
    assert row_from_dict(data) == row
    write_rows(tmp_path / "rows.jsonl", [row])
    assert list(read_rows(tmp_path / "rows.jsonl")) == [row]


@pytest.mark.parametrize(
    "answer", ["B", "(B)", "B.", "B)", " B ", "(B) two", "B. two", "B:two", "two"]
)
def test_forms_of_an_answer(answer: str) -> None:
    data = {"video": "v", "question": "q", "options": ["one", "two"], "answer": answer}
    assert row_from_dict(data).answer == "B"


def test_boxes_in_pixels_become_fractions_once_the_size_is_known() -> None:
    row = row_from_dict({"image": "v.jpg", "question": "q", "glue": [20, 30, 120, 96]})
    assert row.sized(100, 100) == Row("v.jpg", "q", "image", boxes=(Box(0.2, 0.3, 1.0, 0.96),))
    with pytest.raises(ValueError, match=r"box must be inside 20 x 100 px, got \(20.0"):
        row.sized(100, 20)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\r"])
def test_only_line_feeds_end_a_line(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data = {"video": "a.mp4", "question": f"q{separator}r"}
    plain = json.dumps(data, ensure_ascii=False).encode()
    path.write_bytes(plain + b"\r\n\n" + plain + b"\n")
    assert [row.question for row in read_rows(path)] == [f"q{separator}r"] * 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        b'{"video": "a.mp4", "question": "\xff"}',
        b'{"video": "a.mp4", "question": "q", "duration": 1' + b"0" * 5000 + b"}",
        b'{"video": "a.mp4", "question": "q", "glue": [[NaN, 1]]}',
        b'{"video": "a.mp4", "question": "q", "glue": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"video": "\\ud800.mp4", "question": "q"}',
        b"[1, 2]",
        b"nonsense",
    ],
    ids=["utf8", "digits", "nan", "deep", "surrogate", "list", "nonsense"],
)
def test_a_refusal_names_the_file_and_the_line(name: str, row: bytes, tmp_path: Path) -> None:
    path, good = tmp_path / name, b'{"video": "a.mp4", "question": "q"}'
    lines = name.endswith("l")
    path.write_bytes(good + b"\n" + row + b"\n" if lines else b"[" + good + b"," + row + b"]")
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        list(read_rows(path))
    assert not lines or "line 2" in str(caught.value)


def mutations(num: int) -> Iterator[bytes]:
    random = Random(0)
    seeds = [json.dumps(data).encode() for data, _ in RELEASED]
    pieces = [
        b"\xff",
        b"\\ud800",
        b"1e999",
        b"[[",
        b"null",
        b"-",
        b'"',
        b"{}",
        b"\n",
        b"\xe2\x80\xa8",
    ]
    for _ in range(num):
        data = bytearray(random.choice(seeds) + b"\n" + random.choice(seeds))
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(data))
            data[at : at + random.randint(0, 3)] = random.choice(pieces)
        yield bytes(data)


def test_any_bytes_give_rows_or_one_sentence_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for data in mutations(1000):
        path.write_bytes(data)
        try:
            rows = list(read_rows(path))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert [row_from_dict(row.as_dict()) for row in rows] == rows


def write_set(folder: Path, items: list[Any], **entry: str) -> Path:
    """A manifest of one set with these rows."""
    (folder / "rows.json").write_text(json.dumps(items))
    told = {"media_type": "video", "task_type": "mc", "visual_base": ".", "json_path": "rows.json"}
    (folder / "manifest.json").write_text(json.dumps({"set": {**told, **entry}}))
    return folder / "manifest.json"


def test_every_bad_row_is_told(tmp_path: Path) -> None:
    good = {"video": "a.mp4", "question": "q", "options": ["x", "y"], "answer": "A"}
    bad = [{**good, "question": ""}, {**good, "answer": "C"}, {"image": "a.png", "question": "q"}]
    (entry,) = read_manifest(write_set(tmp_path, [bad[0], good, bad[1], bad[2], 7]))
    with pytest.raises(BadRows) as caught:
        entry.rows()
    assert [item.place for item in caught.value.bad] == ["row 1", "row 3", "row 4", "row 5"]
    assert all(item.path == tmp_path / "rows.json" for item in caught.value.bad)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.json'}, row 1: Row: question must be")
    assert str(caught.value).endswith(" (and 3 more)") and "of type video" in str(
        caught.value.bad[2]
    )
    assert pickle.loads(pickle.dumps(caught.value)).bad == caught.value.bad
    assert [row.answer for _, row in entry.rows(on_bad="skip")] == ["A"]
    with pytest.raises(ValueError, match="on_bad must be one of raise, skip"):
        entry.rows(on_bad="drop")  # type: ignore[arg-type]


def test_validation_wants_media_and_evidence(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    good = {"video": "a.mp4", "question": "q", "glue": [1, 2], "duration": 3}
    late, none = {**good, "glue": [3, 4]}, {"video": "a.mp4", "question": "q", "duration": 3}
    items = [good, {**good, "video": "b.mp4"}, late, none, {**good, "glue": [2, 3.4]}]
    items += [{**good, "video": "x" * 5000}]
    (entry,) = read_manifest(write_set(tmp_path, items, task_type="tg"))
    assert len(entry.rows()) == 6  # a reader that does not validate takes them
    found = list(entry.scan(validate=True))
    errors = [item.error if isinstance(item, BadRow) else "" for item in found]
    assert errors[0] == errors[4] == ""
    assert re.search(r"media must be a file, got '.*b\.mp4'", errors[1])
    assert "glue must be before the video's end, 3.0 s, got 3.0" in errors[2]
    assert "evidence must be at least one span, as task tg" in errors[3]
    assert "media must be a file" in errors[5]


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("gqa", {"answer": None}),
        ("gqa", {"duration_seconds": None}),
        ("mc", {"options": (), "answer": "text"}),
        ("tracking", {"boxes": (Box(0, 0, 1, 1),)}),
        ("igqa", {}),
        ("detection", {"media_type": "image"}),
    ],
)
def test_rows_that_cannot_serve_their_task(task: str, change: dict[str, Any]) -> None:
    two = (Box(0, 0, 1, 1), Box(0, 0, 0.5, 1))
    whole = replace(FULL, boxes=two)
    for served in ("tg", "gqa", "mc", "tracking"):
        check_evidence(whole, served)
    with pytest.raises(ValueError, match=f"as task {task}"):
        check_evidence(replace(whole, **change), task)


def test_unknown_tasks_are_told_and_skipped(tmp_path: Path) -> None:
    path = write_set(tmp_path, [])
    told = json.loads(path.read_text())
    told["other"] = {**told["set"], "task_type": "chat"}
    told["third"] = {**told["set"], "media_type": 3}
    path.write_text(json.dumps(told))
    with pytest.raises(BadRows, match=r"entry other: manifest entry other: .*\(and 1 more\)"):
        read_manifest(path)
    assert [entry.name for entry in read_manifest(path, on_bad="skip")] == ["set"]
    path.write_text('{"a": {}, "a": {}}')
    with pytest.raises(ValueError, match="one name twice"):
        read_manifest(path)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = b'{"video": "a.mp4", "question": "q"}'
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 64)
    path.write_bytes(good + b"\n" + b"x" * 500 + b"\n" + good + b"\n" + good + b" " * 500)
    assert len(read_rows(path, on_bad="skip")) == 2
    with pytest.raises(
        BadRows, match=r"line 2: row: row must be at most 64 bytes, got b'x.*and 1 more"
    ):
        read_rows(path)
    monkeypatch.setattr(rows_module, "MAX_MANIFEST_BYTES", 16)
    with pytest.raises(ValueError, match="at most 16 bytes"):
        read_manifest(write_set(tmp_path, []))


def test_any_bytes_give_a_manifest_or_one_sentence(tmp_path: Path) -> None:
    path = write_set(tmp_path, [])
    whole, random = path.read_bytes(), Random(1)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            at = random.randrange(len(data))
            data[at : at + random.randint(0, 3)] = random.choice([b"\xff", b'"', b"{", b"\\ud800"])
        path.write_bytes(data)
        try:
            read_manifest(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
