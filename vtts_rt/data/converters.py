"""Public annotation formats as rows: Charades-STA, NExT-GQA, ActivityNet Captions, QVHighlights,
RefCOCO (+, g) and GOT-10k, in the files of their authors, of lmms-eval or of VideoChat-R1.

A converter yields a row, or a BadRow with file and place, for each annotation. Times are seconds.
"""

from __future__ import annotations

import configparser
import csv
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vtts_rt.data.row import NUM_TRACKED, Row, numbers, time_span
from vtts_rt.data.rows import (
    BadRow,
    is_file,
    lines_of,
    parse_json,
    read_bounded,
    records_of,
)
from vtts_rt.types import Box, TimeSpan, require

T = TypeVar("T")
Found = Iterator[Row | BadRow]

MAX_ANNOTATION_BYTES = 16 << 20  # of one sequence
GOT10K_FPS = 10.0  # its toolkit and paper (Huang et al., 2018, section 3)


@dataclass(frozen=True, slots=True)
class Converter:
    """read: annotations of a path, with the name of their media, in which "{id}" is replaced.

    task_type, media_type: of a data set of these rows. about: the files it reads.
    """

    read: Callable[[Path, str], Found]
    task_type: str
    media_type: str
    media_name: str
    about: str


def convert(name: str, path: str | Path, media_name: str | None = None) -> Found:
    """The rows of annotations at `path` in the format `name`, one of CONVERTERS.

    media_name: what "{id}" becomes part of to name a row's media file; None: the format's own.
    ValueError for an unknown format, and where the file as a whole cannot be read as one.
    """
    require("convert", "format", name, name in CONVERTERS, f"one of {', '.join(CONVERTERS)}")
    converter = CONVERTERS[name]
    media_name = converter.media_name if media_name is None else media_name
    require("convert", "media_name", media_name, "{id}" in media_name, "a name with {id} in it")
    return converter.read(Path(path), media_name)


# -- what all read with ---------------------------------------------------------------------


def _attempt(path: Path, place: str, make: Callable[[], T]) -> T | BadRow:
    try:
        return make()
    except OSError as error:
        rule = "must be a file that can be read"
        return BadRow(path, place, f"{error.filename} {rule}, got {error.strerror}")
    except (ValueError, configparser.Error) as error:
        return BadRow(path, place, str(error))


def _object(value: Any, what: str = "annotation") -> dict[str, Any]:
    require("row", what, value, isinstance(value, dict), "a JSON object")
    return dict(value)


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    text = value.strip() if isinstance(value, str) else ""
    require("row", name, value, bool(text), "a non-empty text")
    return text


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    require("row", name, value, isinstance(value, list), "a list")
    return list(value or ())


def _spans(record: dict[str, Any], name: str) -> tuple[TimeSpan, ...]:
    spans = tuple(time_span(name, span) for span in _list(record, name))
    require("row", name, spans, bool(spans), "at least one [start, end]")
    return spans


def _duration(record: dict[str, Any]) -> float:
    return numbers("duration", [record.get("duration")], 1)[0]


def _decoded(path: Path, most: int) -> str:
    try:
        return read_bounded(path, "annotations", most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"annotations: {path} must be UTF-8, got {error}") from error


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, columns by name) of each line of a CSV file. ValueError where it is none."""
    reader = csv.DictReader(io.StringIO(_decoded(path, 64 << 20), newline=""))
    try:
        for record in reader:
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise ValueError(f"annotations: {path} must be CSV, got {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    data = parse_json(read_bounded(path, "annotations"), f"annotations: {path}")
    require("annotations", str(path), type(data).__name__, isinstance(data, dict), "a JSON object")
    return dict(data)


# -- events in time -------------------------------------------------------------------------


def _charades(path: Path, media_name: str) -> Found:
    """`ID start end##sentence` a line, and durations from a Charades_v1_*.csv beside it; or JSON as
    of `_captions`."""
    if path.suffix == ".json":
        yield from _captions(path, media_name)
        return
    durations: dict[str, float] = {}
    for table in sorted(path.parent.glob("Charades_v1_*.csv")):
        for _, record in _table(table):
            if record.get("id") and (length := _float(record.get("length"))) is not None:
                durations[record["id"]] = length
    for place, line in lines_of(path):
        yield _attempt(path, place, partial(_charades_row, line, durations, media_name))


def _float(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _charades_row(line: bytes, durations: dict[str, float], media_name: str) -> Row:
    head, _, sentence = line.decode().partition("##")
    words = head.split()
    times = [_float(word) for word in words[1:]]
    ok = len(times) == 2 and None not in times and bool(sentence.strip())
    require("row", "line", line[:100], ok, "`ID start end##sentence`")
    span = TimeSpan(*(t for t in times if t is not None))
    return _event(words[0], sentence, span, durations.get(words[0]), media_name)


def _event(
    video: str, sentence: str, span: TimeSpan, duration: float | None, media_name: str
) -> Row:
    return Row(
        media=media_name.replace("{id}", video),
        question=sentence.strip(),
        spans=(span,),
        duration_seconds=duration,
    )


def _captions(path: Path, media_name: str) -> Found:
    """{ID: {"duration", "timestamps": [[s, e]], "sentences"}}: ActivityNet Captions, and
    Charades-STA as VideoChat-R1 has it."""
    for video, value in _json_object(path).items():
        place = f"entry {video}"
        events = _attempt(path, place, partial(_events, value))
        if isinstance(events, BadRow):
            yield events
            continue
        duration, pairs = events
        for number, pair in enumerate(pairs, 1):
            make = partial(_caption_row, video, pair, duration, media_name)
            yield _attempt(path, f"{place}, sentence {number}", make)


def _events(value: Any) -> tuple[float, list[tuple[Any, Any]]]:
    record = _object(value)
    times, sentences = _list(record, "timestamps"), _list(record, "sentences")
    require("row", "sentences", len(sentences), len(sentences) == len(times), "one a timestamp")
    return _duration(record), list(zip(times, sentences, strict=True))


def _caption_row(video: str, pair: tuple[Any, Any], duration: float, media_name: str) -> Row:
    span = time_span("timestamps", pair[0])
    return _event(video, _text({"sentence": pair[1]}, "sentence"), span, duration, media_name)


def _qvhighlights(path: Path, media_name: str) -> Found:
    """A JSON object a line: `vid query duration relevant_windows`."""
    for place, line in lines_of(path):
        yield _attempt(path, place, partial(_qvhighlights_row, line, media_name))


def _qvhighlights_row(line: bytes, media_name: str) -> Row:
    record = _object(parse_json(line, "row"))
    return Row(
        media=media_name.replace("{id}", _text(record, "vid")),
        question=_text(record, "query"),
        spans=_spans(record, "relevant_windows"),
        duration_seconds=_duration(record),
    )


def _nextgqa(path: Path, media_name: str) -> Found:
    """`<split>.csv`, with `gsub_<split>.json` beside it, and map_vid_vidorID.json where videos lie
    in VidOR's folders."""
    spans = _json_object(path.with_name(f"gsub_{path.stem}.json"))
    map_path = path.with_name("map_vid_vidorID.json")
    folders = _json_object(map_path) if is_file(map_path) else {}
    for place, record in _table(path):
        yield _attempt(path, place, partial(_nextgqa_row, record, spans, folders, media_name))


def _nextgqa_row(
    record: dict[str, Any], evidence: dict[str, Any], folders: dict[str, Any], media_name: str
) -> Row:
    video, answer = _text(record, "video_id"), _text(record, "answer")
    options = tuple(_text(record, f"a{number}") for number in range(5))
    require("row", "answer", answer, options.count(answer) == 1, f"one of the options {options}")
    found = _object(evidence.get(video), f"evidence of video {video}")
    location = _object(found.get("location"), f"location of video {video}")
    question = _text(record, "qid")
    return Row(
        media=media_name.replace("{id}", _text({"map": folders.get(video, video)}, "map")),
        question=_text(record, "question"),
        options=options,
        answer=chr(ord("A") + options.index(answer)),
        spans=_spans(
            {f"location of {question}": location.get(question)}, f"location of {question}"
        ),
        duration_seconds=_duration(found),
    )


# -- objects --------------------------------------------------------------------------------


def _refcoco(path: Path, media_name: str) -> Found:
    """lmms-eval's records, as JSON or JSONL: `image` or `file_name`, `answer` with the expressions,
    `bbox` [x, y, w, h] px; or VideoChat-R1's: `img_path expression bbox` [x0, y0, x1, y1] px. A row
    for each expression."""
    for place, value in records_of(path):
        rows = _attempt(path, place, partial(_refcoco_rows, value, media_name))
        if isinstance(rows, BadRow):
            yield rows
        else:
            yield from rows


def _refcoco_rows(value: Callable[[], Any], media_name: str) -> list[Row]:
    record = _object(value())
    x0, y0, x1, y1 = numbers("bbox", record.get("bbox"), 4)
    if "expression" in record:
        image, said = _text(record, "img_path"), [_text(record, "expression")]
    else:
        x1, y1 = x0 + x1, y0 + y1
        image = _text(record, "image" if isinstance(record.get("image"), str) else "file_name")
        answer = record.get("answer")
        said = [answer] if isinstance(answer, str) else _list(record, "answer")
        said = [_text({"answer": text}, "answer") for text in said]
        require("row", "answer", said, bool(said), "at least one expression")
    media = media_name.replace("{id}", image)
    box = (x0, y0, x1, y1)
    return [Row(media, text, "image", pixel_boxes=(box,)) for text in dict.fromkeys(said)]


def _got10k(path: Path, media_name: str) -> Found:
    """A split's folder: `list.txt`, and of each sequence `groundtruth.txt` (left, top, width,
    height px a frame), `meta_info.ini` and `absence.label`; or VideoChat-R1's JSON: `path object
    gt`, eight boxes as fractions."""
    if path.is_dir():
        for place, line in lines_of(path / "list.txt"):
            make = partial(_sequence_row, path, line, media_name)
            yield _attempt(path / "list.txt", place, make)
        return
    for place, value in records_of(path):
        yield _attempt(path, place, partial(_tracked_row, value, media_name))


def _tracked_row(value: Callable[[], Any], media_name: str) -> Row:
    record = _object(value())
    boxes = _list(record, "gt")
    require("row", "gt", len(boxes), len(boxes) == NUM_TRACKED, f"{NUM_TRACKED} boxes")
    return Row(
        media=media_name.replace("{id}", _text(record, "path")),
        question=_text(record, "object"),
        boxes=tuple(Box(*numbers("gt", box, 4)) for box in boxes),
    )


def _sequence_row(folder: Path, line: bytes, media_name: str) -> Row:
    """Eight boxes, evenly spread over the frames that show the object."""
    name = line.decode().strip()
    plain = name not in (".", "..") and not re.search(r"[/\\\0]", name)
    require("row", "sequence", name, plain, "the name of a folder")
    truth = _columns(folder / name / "groundtruth.txt", 4)
    gone_path = folder / name / "absence.label"
    gone = _columns(gone_path, 1) if is_file(gone_path) else [[0.0]] * len(truth)
    require("row", gone_path.name, len(gone), len(gone) == len(truth), f"{len(truth)} lines")
    meta = configparser.ConfigParser(interpolation=None)
    meta.read_string(_decoded(folder / name / "meta_info.ini", MAX_ANNOTATION_BYTES))
    section = dict(meta["METAINFO"]) if meta.has_section("METAINFO") else {}
    size = re.findall(r"\d{1,6}", section.get("resolution", ""))
    width, height = (float(size[0]), float(size[1])) if len(size) == 2 else (math.inf, math.inf)
    boxes = {}
    for index, ((left, top, w, h), (absent,)) in enumerate(zip(truth, gone, strict=True)):
        box = (max(left, 0.0), max(top, 0.0), min(left + w, width), min(top + h, height))
        if not absent and box[0] < box[2] and box[1] < box[3]:
            boxes[index] = box
    require("row", "boxes", len(boxes), len(boxes) > 1, "on at least two frames (a test split?)")
    shown = list(boxes)
    places = np.linspace(0, len(shown) - 1, min(NUM_TRACKED, len(shown))).round().astype(int)
    indices = [shown[place] for place in places]
    return Row(
        media=media_name.replace("{id}", name),
        question=_text(section, "object_class"),
        pixel_boxes=tuple(boxes[index] for index in indices),
        box_times=tuple(index / GOT10K_FPS for index in indices),
        duration_seconds=len(truth) / GOT10K_FPS,
    )


def _columns(path: Path, count: int) -> list[list[float]]:
    table = []
    for number, line in enumerate(_decoded(path, MAX_ANNOTATION_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        values = [_float(text) for text in line.split(",")]
        good = [value for value in values if value is not None]
        ok = len(good) == len(values) == count
        require(path.name, f"line {number}", line, ok, f"{count} number{'s' * (count > 1)}")
        table.append(good)
    return table


def encode_sequence(folder: str | Path, path: str | Path, source_fps: float = GOT10K_FPS) -> int:
    """The pictures of a folder, in the order of their names, as a video; returns how many.

    GOT-10k's sequences are folders, rows name one media file. An odd last row or column of pixels
    is left out.
    """
    from vtts_rt.video import open_video
    from vtts_rt.video.writer import write_video

    names = [p for p in sorted(Path(folder).iterdir()) if p.suffix.lower() in (".jpg", ".png")]
    require("encode_sequence", "folder", str(folder), bool(names), "a folder of pictures")

    def frames() -> Iterator[np.ndarray]:
        for name in names:
            with open_video(name) as source:
                frame = np.asarray(next(iter(source.read([0])))[1])
            yield frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]

    return write_video(path, frames(), source_fps=source_fps)


_EVENTS = "{ID: {duration, timestamps, sentences}} as JSON"
CONVERTERS: dict[str, Converter] = {
    "charades-sta": Converter(
        _charades,
        "tg",
        "video",
        "{id}.mp4",
        f"charades_sta_*.txt (durations from Charades_v1_*.csv beside it), or {_EVENTS}",
    ),
    "activitynet": Converter(_captions, "tg", "video", "{id}.mp4", _EVENTS),
    "qvhighlights": Converter(
        _qvhighlights, "tg", "video", "{id}.mp4", "highlight_*_release.jsonl"
    ),
    "nextgqa": Converter(
        _nextgqa, "gqa", "video", "{id}.mp4", "val.csv or test.csv, with gsub_*.json beside it"
    ),
    "refcoco": Converter(
        _refcoco,
        "detection",
        "image",
        "{id}",
        "records of lmms-eval or VideoChat-R1, JSON or JSONL",
    ),
    "got10k": Converter(
        _got10k, "tracking", "video", "{id}.mp4", "a split's folder, or VideoChat-R1's got_*.json"
    ),
}
