"""Rows in the format of VTTS-80K: questions with spatio-temporal clues, and manifests of them.

A row is one JSON object: the media file, a question, options and the letter of the right one
where there are options, and `glue`, where the evidence is. A manifest is a JSON object of data
sets, each naming its media type, task, folder of media and file of rows (VideoChat-R1.5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtts_rt.types import Box, TimeSpan, require

MEDIA_TYPES = ("video", "image")
TASK_TYPES = ("tg", "gqa", "igqa", "detection", "mc")
MAX_OPTIONS = 26


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled question.

    media: path relative to the data set's folder; media_type: "video" or "image".
    options: texts, answer: letter of the right one, or a free text where there are no options,
    or None. spans: evidence in seconds; boxes: evidence as fractions of the whole frame.
    duration_seconds: of the video, or None.
    """

    media: str
    question: str
    media_type: str = "video"
    options: tuple[str, ...] = ()
    answer: str | None = None
    spans: tuple[TimeSpan, ...] = ()
    boxes: tuple[Box, ...] = ()
    duration_seconds: float | None = None

    def __post_init__(self) -> None:
        def check(argument: str, ok: bool, rule: str) -> None:
            require("Row", argument, getattr(self, argument), ok, rule)

        check("media", bool(self.media), "a path")
        check("media_type", self.media_type in MEDIA_TYPES, f"one of {', '.join(MEDIA_TYPES)}")
        check("question", bool(self.question.strip()), "a non-empty text")
        options_ok = len(self.options) <= MAX_OPTIONS and all(o.strip() for o in self.options)
        check("options", options_ok, f"at most {MAX_OPTIONS} non-empty texts")
        if self.options and self.answer is not None:
            letters = [chr(65 + i) for i in range(len(self.options))]
            check("answer", self.answer in letters, f"one of {', '.join(letters)}")
        if self.duration_seconds is not None:
            duration_ok = math.isfinite(self.duration_seconds) and self.duration_seconds > 0
            check("duration_seconds", duration_ok, "> 0")
        for span in self.spans:
            ok = 0 <= span.start_seconds <= span.end_seconds < math.inf
            require("Row", "span", span, ok, "0 <= start <= end")
        for box in self.boxes:
            ok = 0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1
            require("Row", "box", box, ok, "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")

    def as_dict(self) -> dict[str, Any]:
        """The JSON object. `glue` is the list of spans; a row with boxes gives both by name."""
        out: dict[str, Any] = {self.media_type: self.media, "question": self.question}
        if self.options:
            out["options"] = list(self.options)
        if self.answer is not None:
            out["answer"] = self.answer
        spans = [[s.start_seconds, s.end_seconds] for s in self.spans]
        if self.boxes:
            out["glue"] = {"spans": spans, "boxes": [[b.x0, b.y0, b.x1, b.y1] for b in self.boxes]}
        elif self.spans:
            out["glue"] = spans
        if self.duration_seconds is not None:
            out["duration"] = self.duration_seconds
        return out


def row_from_dict(data: Any) -> Row:
    """A row from its JSON object. ValueError says which field is wrong.

    `glue` may be a list of [start, end], one [x0, y0, x1, y1] box, or {"spans", "boxes"}.
    """
    require("row", "row", data, isinstance(data, dict), "a JSON object")
    kinds = [kind for kind in MEDIA_TYPES if kind in data]
    require("row", "media", sorted(data), len(kinds) == 1, "named by exactly one of video, image")
    for name in (kinds[0], "question"):
        require("row", name, data.get(name), isinstance(data.get(name), str), "a text")
    options, answer = data.get("options") or (), data.get("answer")
    texts = isinstance(options, (list, tuple)) and all(isinstance(o, str) for o in options)
    require("row", "options", options, texts, "a list of texts")
    require("row", "answer", answer, answer is None or isinstance(answer, str), "a text")
    spans, boxes = _glue(data.get("glue"))
    duration = data.get("duration")
    return Row(
        media=data[kinds[0]],
        media_type=kinds[0],
        question=data["question"],
        options=tuple(options),
        answer=answer,
        spans=tuple(TimeSpan(*span) for span in spans),
        boxes=tuple(Box(*box) for box in boxes),
        duration_seconds=None if duration is None else _numbers("duration", [duration], 1)[0],
    )


def _glue(glue: Any) -> tuple[list[list[float]], list[list[float]]]:
    if glue is None:
        return [], []
    if isinstance(glue, dict):
        spans, boxes = glue.get("spans") or [], glue.get("boxes") or []
    else:
        require("row", "glue", glue, isinstance(glue, list), "a list or an object")
        is_box = len(glue) == 4 and not any(isinstance(item, list) for item in glue)
        spans, boxes = ([], [glue]) if is_box else (glue, [])
    return [_numbers("glue", s, 2) for s in spans], [_numbers("glue", b, 4) for b in boxes]


def _numbers(name: str, values: Any, count: int) -> list[float]:
    ok = isinstance(values, (list, tuple)) and len(values) == count
    ok = ok and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    require("row", name, values, ok, f"{count} number{'s' if count > 1 else ''}")
    return [float(v) for v in values]


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a file: a JSON array, or one JSON object a line (`.jsonl`).

    ValueError names the file and the number (from 1) of the row that is wrong.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    lines = path.suffix == ".jsonl"
    try:
        if lines:
            items = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"rows: {path} must be valid JSON, got {error}") from error
    require("rows", str(path), type(items).__name__, isinstance(items, list), "a JSON array")
    for number, item in enumerate(items, 1):
        try:
            yield row_from_dict(item)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON array, or one a line when the name ends in `.jsonl`."""
    path = Path(path)
    items = [row.as_dict() for row in rows]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(item) + "\n" for item in items)
    else:
        text = json.dumps(items, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class DataSet:
    """One entry of a manifest: where rows and their media are, and what is asked of them."""

    name: str
    media_type: str
    task_type: str
    visual_base: Path
    json_path: Path

    def rows(self) -> Iterator[tuple[Path, Row]]:
        """(media file, row) of every row; ValueError where a row's media type is another."""
        for row in read_rows(self.json_path):
            require(
                f"data set {self.name}",
                "media",
                row.media_type,
                row.media_type == self.media_type,
                f"of type {self.media_type}",
            )
            yield self.visual_base / row.media, row


def read_manifest(path: str | Path) -> list[DataSet]:
    """Data sets of a manifest file; relative paths in it start from the manifest's folder."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"manifest: {path} must be valid JSON, got {error}") from error
    require("manifest", str(path), type(data).__name__, isinstance(data, dict), "a JSON object")
    sets = []
    for name, entry in data.items():
        what = f"manifest entry {name}"
        require(what, "entry", entry, isinstance(entry, dict), "a JSON object")
        for key in ("media_type", "task_type", "visual_base", "json_path"):
            require(what, key, entry.get(key), isinstance(entry.get(key), str), "a text")
        media_ok, task_ok = entry["media_type"] in MEDIA_TYPES, entry["task_type"] in TASK_TYPES
        require(
            what, "media_type", entry["media_type"], media_ok, f"one of {', '.join(MEDIA_TYPES)}"
        )
        require(what, "task_type", entry["task_type"], task_ok, f"one of {', '.join(TASK_TYPES)}")
        base, rows = path.parent / entry["visual_base"], path.parent / entry["json_path"]
        sets.append(DataSet(name, entry["media_type"], entry["task_type"], base, rows))
    return sets


def write_manifest(path: str | Path, sets: Iterable[DataSet]) -> None:
    """Write a manifest; paths are kept as given, relative to the manifest's folder or absolute."""
    data = {
        entry.name: {
            "media_type": entry.media_type,
            "task_type": entry.task_type,
            "visual_base": str(entry.visual_base),
            "json_path": str(entry.json_path),
        }
        for entry in sets
    }
    Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
