"""Rows in the format of VTTS-80K: questions with spatio-temporal clues, and manifests of them.

A row is one JSON object: the media file, a question, options and the letter of the right one
where there are options, and `glue`, where the evidence is. A manifest is a JSON object of data
sets, each naming its media type, task, folder of media and file of rows (VideoChat-R1.5). The
release's own files and what `write_rows` wrote are read into the same `Row`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from vtts_rt.checks import Rule, check, is_unicode
from vtts_rt.data.row import MEDIA_TYPE, Row, row_from_dict
from vtts_rt.errors import BadRequest
from vtts_rt.files import write_whole
from vtts_rt.types import require

__all__ = [
    "TASKS",
    "BadRow",
    "BadRows",
    "DataSet",
    "PlacedRow",
    "Row",
    "check_evidence",
    "read_manifest",
    "read_rows",
    "row_from_dict",
    "scan_manifest",
    "scan_rows",
    "sift",
    "write_manifest",
    "write_rows",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnBad = Literal["raise", "skip"]
ON_BAD: tuple[OnBad, ...] = ("raise", "skip")
MAX_FILE_BYTES = 256 << 20  # a JSON array is read whole; a .jsonl may be of any size
MAX_ROW_BYTES = 1 << 20  # a line of a .jsonl
MAX_ERROR = 600  # characters of a refusal
MAX_MANIFEST_BYTES = 16 << 20
# task -> (media type, or None for either; what a row must hold, so that its rewards mean something)
TASKS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "tg": ("video", ("spans", "duration")),
    "gqa": ("video", ("letter", "spans", "duration")),
    "igqa": ("image", ("letter", "box")),
    "detection": ("image", ("box",)),
    "mc": (None, ("letter",)),
    "tracking": ("video", ("boxes",)),
}
_NEEDS: dict[str, Rule] = {
    "spans": (lambda row: row.spans, "at least one span"),
    "duration": (lambda row: row.duration_seconds, "a duration"),
    "letter": (lambda row: row.options and row.answer, "options and the letter of the right one"),
    "box": (lambda row: row.num_boxes == 1, "one box"),
    "boxes": (lambda row: row.num_boxes > 1, "a box for each of several frames"),
}
_TEXT: Rule = (lambda text: is_unicode(text) and "\0" not in text, "valid Unicode without NUL")
_ENTRY_KEYS = ("media_type", "task_type", "visual_base", "json_path")
_ENTRY_RULES: dict[str, Rule] = {
    "media_type": MEDIA_TYPE,
    "task_type": (TASKS.__contains__, f"one of {', '.join(TASKS)}"),
    **dict.fromkeys(("name", "visual_base", "json_path"), _TEXT),
}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or an entry of a manifest, that was refused.

    path: the file; place: in it, such as "row 3" (from 1), "line 3" or "entry x"; error: why. Each
    text is one line of bounded length that can be printed, whatever was in the file.
    """

    path: Path
    place: str
    error: str

    def __post_init__(self) -> None:
        for name in ("place", "error"):
            text = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            text = " ".join(text.split())
            text = text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."
            object.__setattr__(self, name, text)

    def __str__(self) -> str:
        return f"{self.path}, {self.place}: {self.error}"


class BadRows(BadRequest):
    """Rows that were refused, all of them in `bad`; as a text the first one, and how many more."""

    def __init__(self, bad: Sequence[BadRow]) -> None:
        super().__init__(bad)
        self.bad = tuple(bad)
        if not all(isinstance(item, BadRow) for item in self.bad):
            raise TypeError("BadRows: bad must be of BadRow")  # DataLoader then hands on the text

    def __str__(self) -> str:
        more = f" (and {len(self.bad) - 1} more)" if len(self.bad) > 1 else ""
        return f"{self.bad[0]}{more}"


def sift(found: Iterable[T | BadRow], on_bad: OnBad = "raise") -> tuple[list[T], list[BadRow]]:
    """(what is good, what is bad). on_bad: "raise" raises BadRows for all that is bad, "skip" logs
    the first and how many there are."""
    require("sift", "on_bad", on_bad, on_bad in ON_BAD, f"one of {', '.join(ON_BAD)}")
    good: list[T] = []
    bad: list[BadRow] = []
    for item in found:
        if isinstance(item, BadRow):
            bad.append(item)
        else:
            good.append(item)
    if bad and on_bad == "raise":
        raise BadRows(bad)
    if bad:
        logger.warning("%d of %d skipped: %s", len(bad), len(good) + len(bad), BadRows(bad))
    return good, bad


def read_bounded(path: Path, what: str, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file; ValueError where there are more than `most`. OSErrors pass."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    require(what, str(path), f"more than {most} bytes", len(data) <= most, f"at most {most} bytes")
    return data


def parse_json(data: bytes, where: str, pairs: Callable[[Any], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8. ValueError with `where` for anything else."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} must be UTF-8, got {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} must be JSON of a moderate depth") from error
    except ValueError as error:  # JSONDecodeError, and numbers of too many digits
        raise ValueError(f"{where} must be valid JSON, got {error}") from error


def records_of(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(its place, what gives its value) of each row of a file."""
    if path.suffix == ".jsonl":
        yield from ((place, partial(_line, line)) for place, line in lines_of(path))
        return
    items = parse_json(read_bounded(path, "rows"), f"rows: {path}")
    require("rows", str(path), type(items).__name__, isinstance(items, list), "a JSON array")
    yield from ((f"row {number}", partial(_same, item)) for number, item in enumerate(items, 1))


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of each line that is not empty: line feeds and nothing else end one. Of a line
    longer than MAX_ROW_BYTES its first MAX_ROW_BYTES + 1 bytes."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_ROW_BYTES + 1)
            if line.strip():
                yield f"line {number}", line


def _line(line: bytes) -> Any:
    short = len(line) <= MAX_ROW_BYTES
    require("row", "row", line[:50], short, f"at most {MAX_ROW_BYTES} bytes")
    return parse_json(line, "row")


def _same(item: Any) -> Any:
    return item


def scan_rows(
    path: str | Path, check_row: Callable[[Row], None] | None = None
) -> Iterator[Row | BadRow]:
    """Each row of a file, or why it was refused. check_row: raises ValueError for further reasons.

    A JSON array, or one JSON object a line (`.jsonl`; only line feeds end one). ValueError where
    the file is neither.
    """
    for item in _scan(Path(path), check_row):
        yield item if isinstance(item, BadRow) else item[1]


def _scan(
    path: Path, check_row: Callable[[Row], None] | None
) -> Iterator[tuple[str, Row] | BadRow]:
    """(place, row) of each row of a file, or why it was refused."""
    for place, value in records_of(path):
        try:
            row = row_from_dict(value())
            if check_row is not None:
                check_row(row)
        except ValueError as error:
            yield BadRow(path, place, str(error))
        else:
            yield place, row


def read_rows(path: str | Path, *, on_bad: OnBad = "raise") -> list[Row]:
    """Rows of a file. on_bad: as in `sift`; BadRows names the file and the row or line (from 1) of
    every row that is wrong. ValueError where the file is no file of rows."""
    return sift(scan_rows(path), on_bad)[0]


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON array, or one a line when the name ends in `.jsonl`."""
    path = Path(path)
    items = [row.as_dict() for row in rows]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(item) + "\n" for item in items)
    else:
        text = json.dumps(items, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def check_evidence(row: Row, task_type: str) -> None:
    """ValueError where a row cannot serve its task, or evidence lies behind the video's end.

    A span may end after the video, as some of the public annotations do by rounding.
    """
    media_type, needs = TASKS[task_type]
    same = media_type in (None, row.media_type)
    require("row", "media", row.media_type, same, f"a {media_type}, as task {task_type} asks")
    for name in needs:
        test, rule = _NEEDS[name]
        require("row", "evidence", row.as_dict(), bool(test(row)), f"{rule}, as task {task_type}")
    if row.duration_seconds is not None:
        end = row.duration_seconds
        for start in (*(span.start_seconds for span in row.spans), *row.box_times[:-1]):
            require("row", "glue", start, start < end, f"before the video's end, {end} s")


def is_file(path: Path) -> bool:
    """As Path.is_file, but False for a name that the file system refuses."""
    try:
        return path.is_file()
    except OSError:
        return False


class PlacedRow(NamedTuple):
    """A row, the manifest's entry that it is from, the task of that, its media file, and the file
    of rows and the place in it where it stands."""

    data_set: str
    task: str
    media: Path
    row: Row
    path: Path
    place: str

    def bad(self, error: str) -> BadRow:
        """The row, refused."""
        return BadRow(self.path, self.place, error)

    def check_media(self) -> PlacedRow | BadRow:
        """The row, or that its media file is missing."""
        if is_file(self.media):
            return self
        return self.bad(f"row: media must be a file, got {str(self.media)!r}")

    def validated(self) -> PlacedRow | BadRow:
        """The row, or that its media file is missing, or why `check_evidence` refuses it."""
        found = self.check_media()
        if isinstance(found, PlacedRow):
            try:
                check_evidence(self.row, self.task)
            except ValueError as error:
                return self.bad(str(error))
        return found


@dataclass(frozen=True, slots=True)
class DataSet:
    """One entry of a manifest: where rows and their media are, and what is asked of them."""

    name: str
    media_type: str
    task_type: str
    visual_base: Path
    json_path: Path

    def scan(self, *, validate: bool = False) -> Iterator[tuple[Path, Row] | BadRow]:
        """(media file, row) of each row, or why it was refused: as `placed`."""
        for item in self.placed(validate=validate):
            yield item if isinstance(item, BadRow) else (item.media, item.row)

    def placed(
        self, *, validate: bool = False, check_row: Callable[[Row, str], object] | None = None
    ) -> Iterator[PlacedRow | BadRow]:
        """Each row with its place, or why it was refused: also where its media type is another.
        validate: also where its media file is missing, or `check_evidence` refuses. check_row:
        called with row and task, raises ValueError for further reasons."""

        def checked(row: Row) -> None:
            same = row.media_type == self.media_type
            require(f"data set {self.name}", "media", row.media_type, same, self._of_type)
            if check_row is not None:
                check_row(row, self.task_type)

        for item in _scan(self.json_path, checked):
            if isinstance(item, BadRow):
                yield item
                continue
            place, row = item
            media = self.visual_base / row.media
            found = PlacedRow(self.name, self.task_type, media, row, self.json_path, place)
            yield found.validated() if validate else found

    def rows(self, *, on_bad: OnBad = "raise", validate: bool = False) -> list[tuple[Path, Row]]:
        """(media file, row) of every row. validate: as in `scan`. on_bad: as in `sift`: BadRows, a
        ValueError, holds every row that is refused, with file and place."""
        return sift(self.scan(validate=validate), on_bad)[0]

    @property
    def _of_type(self) -> str:
        return f"of type {self.media_type}"


def scan_manifest(path: str | Path) -> Iterator[DataSet | BadRow]:
    """Each entry of a manifest, or why it was refused; relative paths in it start from the
    manifest's folder. ValueError where the file is no manifest."""
    path = Path(path)
    data = parse_json(
        read_bounded(path, "manifest", MAX_MANIFEST_BYTES), f"manifest: {path}", _unique
    )
    require("manifest", str(path), type(data).__name__, isinstance(data, dict), "a JSON object")
    for name, entry in data.items():
        what = f"manifest entry {name}"
        try:
            require(what, "entry", entry, isinstance(entry, dict), "a JSON object")
            for key in _ENTRY_KEYS:
                require(what, key, entry.get(key), isinstance(entry.get(key), str), "a text")
            given = {key: entry[key] for key in _ENTRY_KEYS}
            check(what, _ENTRY_RULES, {"name": name, **given})
        except ValueError as error:
            yield BadRow(path, f"entry {name}", str(error))
        else:
            base, rows = path.parent / entry["visual_base"], path.parent / entry["json_path"]
            yield DataSet(name, entry["media_type"], entry["task_type"], base, rows)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("one name twice in an object")  # told by `parse_json`
    return data


def read_manifest(path: str | Path, *, on_bad: OnBad = "raise") -> list[DataSet]:
    """Data sets of a manifest file. on_bad: as in `sift`, about entries, such as one of an unknown
    task. Relative paths in it start from the manifest's folder."""
    return sift(scan_manifest(path), on_bad)[0]


def write_manifest(path: str | Path, sets: Iterable[DataSet]) -> None:
    """Write a manifest; paths are kept as given, relative to the manifest's folder or absolute. One
    that was there stays whole until the new one is."""
    path = Path(path)
    data = {
        entry.name: {
            "media_type": entry.media_type,
            "task_type": entry.task_type,
            "visual_base": str(entry.visual_base),
            "json_path": str(entry.json_path),
        }
        for entry in sets
    }
    write_whole(path, json.dumps(data, indent=1) + "\n")
