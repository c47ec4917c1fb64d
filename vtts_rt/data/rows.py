"""Rows in the format of VTTS-80K: questions with spatio-temporal clues, and manifests of them.

A row is one JSON object: the media file, a question, options and the letter of the right one
where there are options, and `glue`, where the evidence is. A manifest is a JSON object of data
sets, each naming its media type, task, folder of media and file of rows (VideoChat-R1.5). The
release's own files and what `write_rows` wrote are read into the same `Row`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtts_rt.checks import UNICODE, Rule, check
from vtts_rt.types import Box, TimeSpan, require

MEDIA_TYPES = ("video", "image")
TASK_TYPES = ("tg", "gqa", "igqa", "detection", "mc")
MAX_OPTIONS = 26
# `A. text`, `(A) text`, `A) text`, `(A):text`; alone, `A` and `(A)`.
_LABEL = re.compile(r"\s*\(?([A-Z])(?:\)[.:]?|[.:])\s*")
_LETTER = re.compile(r"\s*\(?([A-Z])\)?[.:]?\s*")

_MEDIA_TYPE: Rule = (MEDIA_TYPES.__contains__, f"one of {', '.join(MEDIA_TYPES)}")
_RULES: dict[str, Rule] = {
    "media": (lambda text: text and "\0" not in text, "a path"),
    "media_type": _MEDIA_TYPE,
    "question": (str.strip, "a non-empty text"),
    "options": (
        lambda texts: len(texts) <= MAX_OPTIONS and all(map(str.strip, texts)),
        f"at most {MAX_OPTIONS} non-empty texts",
    ),
    "duration_seconds": (lambda n: n is None or 0 < n < math.inf, "> 0"),
}
_ENTRY_RULES: dict[str, Rule] = {
    "media_type": _MEDIA_TYPE,
    "task_type": (TASK_TYPES.__contains__, f"one of {', '.join(TASK_TYPES)}"),
}

PixelCorners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled question.

    media: path relative to the data set's folder; media_type: "video" or "image".
    options: texts without letters, answer: letter of the right one, or a free text where there
    are no options, or None. spans: evidence in seconds; boxes: evidence as fractions of the whole
    frame; pixel_boxes: evidence as (x0, y0, x1, y1) px of the media file, until its size is known
    (`sized`). duration_seconds: of the video, or None.
    """

    media: str
    question: str
    media_type: str = "video"
    options: tuple[str, ...] = ()
    answer: str | None = None
    spans: tuple[TimeSpan, ...] = ()
    boxes: tuple[Box, ...] = ()
    duration_seconds: float | None = None
    pixel_boxes: tuple[PixelCorners, ...] = ()

    def __post_init__(self) -> None:
        check("Row", _RULES, {name: getattr(self, name) for name in _RULES})
        for text in (self.media, self.question, *self.options, self.answer or ""):
            check("Row", {"text": UNICODE}, {"text": text})
        if self.options and self.answer is not None:
            letters = [chr(65 + i) for i in range(len(self.options))]
            rule = f"one of {', '.join(letters)}"
            require("Row", "answer", self.answer, self.answer in letters, rule)
        for span in self.spans:
            ok = 0 <= span.start_seconds <= span.end_seconds < math.inf
            require("Row", "span", span, ok, "0 <= start <= end")
        for box in self.boxes:
            ok = 0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1
            require("Row", "box", box, ok, "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
        for x0, y0, x1, y1 in self.pixel_boxes:
            ok = 0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf
            require("Row", "box", (x0, y0, x1, y1), ok, "0 <= x0 < x1 and 0 <= y0 < y1")

    def sized(self, height: int, width: int) -> Row:
        """The row for media of this size in px: boxes in pixels become fractions, cut off at the
        frame. ValueError where one lies outside."""
        fractions = []
        for x0, y0, x1, y1 in self.pixel_boxes:
            inside = x0 < width and y0 < height
            require("Row", "box", (x0, y0, x1, y1), inside, f"inside {width} x {height} px")
            fractions.append(Box(x0 / width, y0 / height, min(x1 / width, 1), min(y1 / height, 1)))
        return replace(self, boxes=(*self.boxes, *fractions), pixel_boxes=())

    def as_dict(self) -> dict[str, Any]:
        """The JSON object. `glue` is the list of spans; a row with boxes gives both by name."""
        out: dict[str, Any] = {self.media_type: self.media, "question": self.question}
        if self.options:
            out["options"] = list(self.options)
        if self.answer is not None:
            out["answer"] = self.answer
        spans = [[s.start_seconds, s.end_seconds] for s in self.spans]
        boxes = [[b.x0, b.y0, b.x1, b.y1] for b in self.boxes]
        boxes += [list(box) for box in self.pixel_boxes]
        if boxes:
            out["glue"] = {"spans": spans, "boxes": boxes}
        elif self.spans:
            out["glue"] = spans
        if self.duration_seconds is not None:
            out["duration"] = self.duration_seconds
        return out


def row_from_dict(data: Any) -> Row:
    """A row from its JSON object. ValueError says which field is wrong.

    options: a list of texts, or one text with an option a line; letters in front of them (`A. `,
    `(A) `), in order from A, are taken off. answer: where there are options `C`, `(C)`, `C. text`
    or an option's own text, and its letter is kept. `glue` may be one [start, end], a list of
    them, one [x0, y0, x1, y1] box, or {"spans", "boxes"}. A box with a number above 1 is in pixels
    of the media file, otherwise in fractions of it. durations is read as duration.
    """
    require("row", "row", data, isinstance(data, dict), "a JSON object")
    kinds = [kind for kind in MEDIA_TYPES if kind in data]
    require("row", "media", sorted(data), len(kinds) == 1, "named by exactly one of video, image")
    for name in (kinds[0], "question"):
        require("row", name, data.get(name), isinstance(data.get(name), str), "a text")
    options, answer = _options(data.get("options")), data.get("answer")
    require("row", "answer", answer, answer is None or isinstance(answer, str), "a text")
    spans, boxes = _glue(data.get("glue"))
    duration = data.get("duration", data.get("durations"))
    return Row(
        media=data[kinds[0]],
        media_type=kinds[0],
        question=data["question"],
        options=options,
        answer=_letter(answer, options) if options and answer is not None else answer,
        spans=tuple(TimeSpan(*span) for span in spans),
        boxes=tuple(Box(*box) for box in boxes if max(box) <= 1),
        pixel_boxes=tuple((b[0], b[1], b[2], b[3]) for b in boxes if not max(b) <= 1),
        duration_seconds=None if duration is None else _numbers("duration", [duration], 1)[0],
    )


def _options(options: Any) -> tuple[str, ...]:
    """Texts without their letters."""
    if isinstance(options, str):
        options = [line for line in options.split("\n") if line.strip()]
    options = options or ()
    texts = isinstance(options, (list, tuple)) and all(isinstance(o, str) for o in options)
    require("row", "options", options, texts, "a list of texts, or lines of text")
    labels = [label[1] for text in options if (label := _LABEL.match(text))]
    if labels == [chr(65 + i) for i in range(len(options))]:
        return tuple(_LABEL.sub("", text, count=1).strip() for text in options)
    return tuple(options)


def _letter(answer: str, options: tuple[str, ...]) -> str:
    """The letter that an answer means; the answer itself where it means none of the options."""
    texts = [option.strip() for option in options]
    if texts.count(answer.strip()) == 1 and not _LETTER.fullmatch(answer):
        return chr(65 + texts.index(answer.strip()))
    if found := _LETTER.fullmatch(answer):
        return found[1]
    if found := _LABEL.match(answer):
        said = answer[found.end() :].strip()
        index = ord(found[1]) - 65
        other = said in texts and not (index < len(texts) and texts[index] == said)
        require("row", "answer", answer, not other, "a letter with the text of its own option")
        return found[1]
    return answer


def _glue(glue: Any) -> tuple[list[list[float]], list[list[float]]]:
    if glue is None:
        return [], []
    if isinstance(glue, dict):
        spans, boxes = glue.get("spans") or [], glue.get("boxes") or []
        for name, items in (("spans", spans), ("boxes", boxes)):
            require("row", f"glue {name}", items, isinstance(items, list), "a list")
    else:
        require("row", "glue", glue, isinstance(glue, list), "a list or an object")
        flat = bool(glue) and not any(isinstance(item, list) for item in glue)
        if flat:
            glue = [glue]
        boxes = glue if flat and len(glue[0]) == 4 else []
        spans = [] if boxes else glue
    return [_numbers("glue", s, 2) for s in spans], [_numbers("glue", b, 4) for b in boxes]


def _numbers(name: str, values: Any, count: int) -> list[float]:
    ok = isinstance(values, (list, tuple)) and len(values) == count
    ok = ok and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    ok = ok and all(abs(v) < 1e300 or isinstance(v, float) for v in values)
    require("row", name, values, ok, f"{count} number{'s' if count > 1 else ''}")
    return [float(v) for v in values]


def _parsed(data: bytes, where: str) -> Any:
    """The value of a JSON text in UTF-8. ValueError with `where` for anything else."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} must be UTF-8, got {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} must be JSON of a moderate depth") from error
    except ValueError as error:  # JSONDecodeError, and numbers of too many digits
        raise ValueError(f"{where} must be valid JSON, got {error}") from error


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each row of a file."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:  # lines end with a line feed and nothing else
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(line, f"rows: {path}, line {number}")
        return
    items = _parsed(path.read_bytes(), f"rows: {path}")
    require("rows", str(path), type(items).__name__, isinstance(items, list), "a JSON array")
    yield from ((f"{path}, row {number}", item) for number, item in enumerate(items, 1))


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a file: a JSON array, or one JSON object a line (`.jsonl`; only line feeds end one).

    ValueError names the file and the row or line (from 1) that is wrong.
    """
    for where, item in _items(Path(path)):
        try:
            row = row_from_dict(item)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield row


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
            what, same = f"data set {self.name}", row.media_type == self.media_type
            require(what, "media", row.media_type, same, f"of type {self.media_type}")
            yield self.visual_base / row.media, row


def read_manifest(path: str | Path) -> list[DataSet]:
    """Data sets of a manifest file; relative paths in it start from the manifest's folder."""
    path = Path(path)
    data = _parsed(path.read_bytes(), f"manifest: {path}")
    require("manifest", str(path), type(data).__name__, isinstance(data, dict), "a JSON object")
    sets = []
    for name, entry in data.items():
        what = f"manifest entry {name}"
        require(what, "entry", entry, isinstance(entry, dict), "a JSON object")
        for key in ("media_type", "task_type", "visual_base", "json_path"):
            require(what, key, entry.get(key), isinstance(entry.get(key), str), "a text")
        check(what, _ENTRY_RULES, {key: entry[key] for key in _ENTRY_RULES})
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
