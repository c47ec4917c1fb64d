from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtts_rt.data.rows import (
    DataSet,
    Row,
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
    write_rows(tmp_path / name, rows)
    assert list(read_rows(tmp_path / name)) == rows


def test_published_forms_of_glue() -> None:
    base = {"video": "v.mp4", "question": "q"}
    assert row_from_dict({**base, "glue": [[1, 2], [3, 4.5]]}).spans[1] == TimeSpan(3.0, 4.5)
    assert row_from_dict({**base, "glue": [0.1, 0.2, 0.5, 0.9]}).boxes == (Box(0.1, 0.2, 0.5, 0.9),)
    assert row_from_dict({**base, "glue": None}).spans == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question must be a non-empty text"),
        ({"question": 3}, "question must be a text"),
        ({"image": "x.png"}, "exactly one of video, image"),
        ({"options": ["a", ""]}, "options must be at most 26 non-empty texts"),
        ({"options": "abc"}, "options must be a list of texts"),
        ({"options": ["a", "b"], "answer": "C"}, "answer must be one of A, B"),
        ({"glue": [[2, 1]]}, "span must be 0 <= start <= end"),
        ({"glue": [[1, float("nan")]]}, "span must be"),
        ({"glue": [[1]]}, "glue must be 2 numbers"),
        ({"glue": {"boxes": [[0.5, 0, 0.5, 1]]}}, "box must be"),
        ({"glue": "soon"}, "glue must be a list or an object"),
        ({"duration": -1}, "duration_seconds must be > 0"),
        ({"duration": "long"}, "duration must be 1 number"),
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
