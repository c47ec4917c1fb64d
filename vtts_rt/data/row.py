"""One labelled question with its spatio-temporal clues, and its JSON object in VTTS-80K."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vtts_rt.checks import UNICODE, Rule, check
from vtts_rt.types import Box, TimeSpan, require

MEDIA_TYPES = ("video", "image")
MAX_OPTIONS = 26
MAX_EVIDENCE = 4096  # spans, or boxes, of one row
NUM_TRACKED = 8  # boxes of a tracking row, and of the answer to it, as in VideoChat-R1
# `A. text`, `(A) text`, `A) text`, `(A):text`; alone, `A` and `(A)`.
_LABEL = re.compile(r"\s*\(?([A-Z])(?:\)[.:]?|[.:])\s*")
_LETTER = re.compile(r"\s*\(?([A-Z])\)?[.:]?\s*")

MEDIA_TYPE: Rule = (MEDIA_TYPES.__contains__, f"one of {', '.join(MEDIA_TYPES)}")
_RULES: dict[str, Rule] = {
    "media": (lambda text: text and "\0" not in text, "a path"),
    "media_type": MEDIA_TYPE,
    "question": (str.strip, "a non-empty text"),
    "options": (
        lambda texts: len(texts) <= MAX_OPTIONS and all(map(str.strip, texts)),
        f"at most {MAX_OPTIONS} non-empty texts",
    ),
    "duration_seconds": (lambda n: n is None or 0 < n < math.inf, "> 0"),
}

PixelCorners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled question.

    media: path relative to the data set's folder; media_type: "video" or "image".
    options: texts without letters, answer: letter of the right one, or a free text where there
    are no options, or None. spans: evidence in seconds; boxes: evidence as fractions of the whole
    frame, or pixel_boxes: as (x0, y0, x1, y1) px of the media file, until its size is known
    (`sized`). box_times: when each box holds, in seconds, ascending, as many as boxes; where empty,
    a single box holds for all spans, and several, of a tracking row, are spread evenly over the
    video. duration_seconds: of the video, or None.
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
    box_times: tuple[float, ...] = ()

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
        num_boxes, times = self.num_boxes, self.box_times
        one_unit = not (self.boxes and self.pixel_boxes)
        require("Row", "boxes", self.boxes, one_unit, "all fractions, or all in px")
        in_pixels = not self.pixel_boxes or any(max(box) > 1 for box in self.pixel_boxes)
        require("Row", "pixel_boxes", self.pixel_boxes, in_pixels, "in px: one number above 1")
        require("Row", "boxes", num_boxes, num_boxes <= MAX_EVIDENCE, f"at most {MAX_EVIDENCE}")
        ok = not times or (len(times) == num_boxes and times[0] >= 0 and times[-1] < math.inf)
        ok = ok and all(a < b for a, b in zip(times, times[1:], strict=False))
        require("Row", "box_times", times, ok, "ascending seconds, one a box")

    @property
    def num_boxes(self) -> int:
        return len(self.boxes) + len(self.pixel_boxes)

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
        """The JSON object. Options that would be read as texts with letters get letters in front of
        them. `glue` is the list of spans, or one box, or a list of several; a row with boxes and
        spans, or with times, gives each by name."""
        out: dict[str, Any] = {self.media_type: self.media, "question": self.question}
        if self.options:
            out["options"] = options = list(self.options)
            if _are_labelled(options):
                out["options"] = [f"{chr(65 + i)}. {text}" for i, text in enumerate(options)]
        if self.answer is not None:
            out["answer"] = self.answer
        spans = [[s.start_seconds, s.end_seconds] for s in self.spans]
        boxes = [[b.x0, b.y0, b.x1, b.y1] for b in self.boxes]
        boxes += [list(box) for box in self.pixel_boxes]
        if self.box_times:
            out["glue"] = {"spans": spans, "boxes": boxes, "times": list(self.box_times)}
        elif boxes:
            plain = boxes[0] if len(boxes) == 1 else boxes
            out["glue"] = {"spans": spans, "boxes": boxes} if spans else plain
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
    them, one [x0, y0, x1, y1] box, a list of them, or {"spans", "boxes", "times"}. Boxes with a
    number above 1 are in pixels of the media file, otherwise in fractions of it. durations is read
    as duration, and an answer that is a list as glue, where there is none.
    """
    require("row", "row", data, isinstance(data, dict), "a JSON object")
    kinds = [kind for kind in MEDIA_TYPES if kind in data]
    require("row", "media", sorted(data), len(kinds) == 1, "named by exactly one of video, image")
    for name in (kinds[0], "question"):
        require("row", name, data.get(name), isinstance(data.get(name), str), "a text")
    options, answer, glue = _options(data.get("options")), data.get("answer"), data.get("glue")
    if isinstance(answer, list) and glue is None:
        answer, glue = None, answer
    require("row", "answer", answer, answer is None or isinstance(answer, str), "a text")
    spans, boxes, times = _glue(glue)
    corners = tuple((b[0], b[1], b[2], b[3]) for b in boxes)
    in_pixels = any(not max(box) <= 1 for box in corners)
    duration = data.get("duration", data.get("durations"))
    return Row(
        media=data[kinds[0]],
        media_type=kinds[0],
        question=data["question"],
        options=options,
        answer=_letter(answer, options) if options and answer is not None else answer,
        spans=tuple(spans),
        boxes=() if in_pixels else tuple(Box(*box) for box in corners),
        pixel_boxes=corners if in_pixels else (),
        box_times=tuple(times),
        duration_seconds=None if duration is None else numbers("duration", [duration], 1)[0],
    )


def _options(options: Any) -> tuple[str, ...]:
    """Texts without their letters."""
    if isinstance(options, str):
        options = [line for line in options.split("\n") if line.strip()]
    options = options or ()
    texts = isinstance(options, (list, tuple)) and all(isinstance(o, str) for o in options)
    require("row", "options", options, texts, "a list of texts, or lines of text")
    if _are_labelled(options):
        return tuple(_LABEL.sub("", text, count=1).strip() for text in options)
    return tuple(options)


def _are_labelled(options: Sequence[str]) -> bool:
    """Whether all begin with their letters, in order, and have a text behind them."""
    labels = [_LABEL.match(text) for text in options]
    return all(
        label is not None and label[1] == chr(65 + i) and label.end() < len(text)
        for i, (text, label) in enumerate(zip(options, labels, strict=True))
    )


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


def _glue(glue: Any) -> tuple[list[TimeSpan], list[list[float]], list[float]]:
    """(spans, boxes, times of the boxes)."""
    if glue is None:
        return [], [], []
    times: list[float] = []
    if isinstance(glue, dict):
        names = ("spans", "boxes", "times")
        for name in glue:
            require("row", "key of glue", name, name in names, f"one of {', '.join(names)}")
        parts = [glue.get(name) or [] for name in names]
        for name, items in zip(names, parts, strict=True):
            require("row", f"glue {name}", items, isinstance(items, list), "a list")
        spans, boxes = parts[:2]
        times = numbers("glue times", parts[2], len(parts[2]))
    else:
        require("row", "glue", glue, isinstance(glue, list), "a list or an object")
        if glue and not any(isinstance(item, list) for item in glue):
            glue = [glue]
        four = bool(glue) and all(isinstance(item, list) and len(item) == 4 for item in glue)
        spans, boxes = ([], glue) if four else (glue, [])
    most = max(len(spans), len(boxes), len(times))
    require("row", "glue", most, most <= MAX_EVIDENCE, f"at most {MAX_EVIDENCE} spans or boxes")
    return (
        [time_span("glue", span) for span in spans],
        [numbers("glue", box, 4) for box in boxes],
        times,
    )


def time_span(name: str, values: Any) -> TimeSpan:
    """[start, end] as a span; a start before 0 by less than a second, as NExT-GQA has, is 0."""
    start, end = numbers(name, values, 2)
    return TimeSpan(0.0 if -1 < start < 0 else start, end)


def numbers(name: str, values: Any, count: int) -> list[float]:
    """The values as floats; ValueError where they are no list of `count` numbers."""
    ok = isinstance(values, (list, tuple)) and len(values) == count
    ok = ok and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    ok = ok and all(abs(v) < 1e300 or isinstance(v, float) for v in values)
    require("row", name, values, ok, f"{count} number{'s' if count > 1 else ''}")
    return [float(v) for v in values]
