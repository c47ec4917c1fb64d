"""Requests for a look that are written as calls, phrases or marks, read while they arrive.

An argument is what a dialect maps a name or a group to:
start, end, span (seconds, clock times too), time (an instant in seconds), first, last (source frame
indices), ordinals, day_range, frame_number_at, box, view_number (from 1, which is the original),
view_name, sample_fps, num_frames, query, label. RawRegion says what they mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from vtts_rt.perception.dialect import Call, Dialect
from vtts_rt.perception.glue import GlueScanner, clock_seconds
from vtts_rt.perception.region import RawRegion

MAX_CALL_CHARS = 8192  # a longer call or phrase is not read
MAX_DEPTH = 16  # of brackets in a call
MAX_TEXT_CHARS = 1000  # of a query or a label
MAX_ORDINALS = 64

_TIME = re.compile(r"([-+]?)(\d{1,9}(?::\d{1,2}){0,2}(?:\.\d{0,9})?|\.\d{1,9}) ?s?", re.ASCII)
_VIEW = re.compile(r"(?:original_image|observation_(\d{1,6}))", re.ASCII)
_DAY_RANGE = re.compile(r"\s*(DAY\d{1,6}_\d{1,12})\s*-\s*(DAY\d{1,6}_\d{1,12})\s*", re.ASCII)
_ARGUMENT = re.compile(r"\b(\w+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([-+\w.:]+))")


def _number(value: object, least: float = -1e300, most: float = 1e300) -> float:
    """A number within bounds, or a text that is one; `1:05` is minutes and seconds."""
    if isinstance(value, str) and (match := _TIME.fullmatch(value.strip())):
        value = clock_seconds(match[2]) * (-1.0 if match[1] == "-" else 1.0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # type: ignore[operator]
        raise ValueError("is no finite number" if most == 1e300 else f"is not {least} to {most}")
    return float(value)  # type: ignore[arg-type]


def _whole(value: object, least: float = -1e9, most: float = 1e9) -> int:
    number = _number(value, least, most)
    if number != int(number):
        raise ValueError("is no whole number")
    return int(number)


def _numbers(value: object, count: int) -> tuple[float, ...]:
    """Exactly `count` numbers: a list, or a text that spells them."""
    if isinstance(value, str):
        scanner = GlueScanner({})
        found = [*scanner.feed(value), *scanner.finish()]
        value = found[0].span or found[0].box if len(found) == 1 else None
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"is no list of {count} numbers")
    return tuple(map(_number, value))


def _ordinals(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ORDINALS:
        raise ValueError(f"is no list of 1 to {MAX_ORDINALS} frames")
    return tuple(map(_whole, value))


def _match(pattern: re.Pattern[str], what: str, value: object) -> re.Match[str]:
    match = pattern.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"is no {what}")
    return match


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value.strip()[:MAX_TEXT_CHARS]


# Argument -> how it is read.
ARGUMENTS: Mapping[str, Callable[[object], Any]] = {
    **dict.fromkeys(("start", "end", "time", "frame_number_at"), _number),
    **dict.fromkeys(("first", "last"), _whole),
    "span": partial(_numbers, count=2),
    "box": partial(_numbers, count=4),
    "ordinals": _ordinals,
    "day_range": lambda value: _match(_DAY_RANGE, "range of a day clock", value).groups(),
    "view_number": lambda value: _whole(value, 1, 1e6) - 1,
    "view_name": lambda value: int(_match(_VIEW, "view that was shown", value)[1] or 0),
    "sample_fps": partial(_number, least=1e-3, most=1e3),
    "num_frames": partial(_whole, least=1, most=1e5),
    **dict.fromkeys(("query", "label"), _text),
}
# Without these a request can be met all the same: left out where they cannot be read.
_OPTIONAL = frozenset({"sample_fps", "num_frames", "query", "label"})
_PLACES = ("span", "frames", "ordinals", "day_range", "box", "frame_number_at_seconds")
# Argument -> the field of RawRegion that holds it, where that has another name.
_FIELDS = {
    **dict.fromkeys(("view_number", "view_name"), "view"),
    "frame_number_at": "frame_number_at_seconds",
}


def region_of(
    arguments: Mapping[str, object], problems: dict[str, None], call: Call | None = None
) -> list[RawRegion]:
    """The region that arguments describe; none where they do not, and `problems` says why.

    call: whose arguments they are, for what they leave to it.
    """
    read: dict[str, Any] = {} if call is None else {"box_unit": call.box_unit, "view": call.view}
    for name, value in arguments.items():
        try:
            read[_FIELDS.get(name, name)] = ARGUMENTS[name](value)
        except ValueError as error:
            problems[f"{name} {error}"] = None
            if name not in _OPTIONAL:
                return []
    for start, end, whole in (("start", "end", "span"), ("first", "last", "frames")):
        if (start in read) != (end in read):
            problems[f"{start} and {end} stand together or not at all"] = None
            return []
        if start in read:
            read[whole] = (read.pop(start), read.pop(end))
    if "time" in read:
        read["span"] = (read["time"], read.pop("time"))
    if not any(place in read for place in _PLACES):
        problems["a request names no time, no frame and no box"] = None
        return []
    return [RawRegion(**read)]


class Reader(Protocol):
    """Reads what stands in one section, piece by piece; `finish` where the section ends.

    inside: whether a tag that comes now is part of what is read.
    """

    @property
    def inside(self) -> bool: ...
    def feed(self, text: str) -> list[RawRegion]: ...
    def finish(self) -> list[RawRegion]: ...


class JsonReader:
    """Calls as JSON objects: `{"name": .., "arguments": {..}}`, or the arguments alone.

    An object counts as soon as its last brace has come. Text around objects is passed over.
    """

    def __init__(self, dialect: Dialect, problems: dict[str, None]) -> None:
        self._calls = {call.name: call for call in dialect.calls}
        self._problems = problems
        self._pieces: list[str] = []
        self._depth = 0
        self._in_text = self._escaped = self._given_up = False

    @property
    def inside(self) -> bool:
        return self._depth > 0

    def feed(self, text: str) -> list[RawRegion]:
        found: list[RawRegion] = []
        for char in text:
            if self._given_up:
                break
            if self._depth == 0 and char != "{":
                continue
            self._pieces.append(char)
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped = char == "\\"
                self._in_text = char != '"'
            elif char == '"':
                self._in_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    found += self._object("".join(self._pieces))
                    self._pieces.clear()
            if len(self._pieces) > MAX_CALL_CHARS or self._depth > MAX_DEPTH:
                bound = f"a call has over {MAX_CALL_CHARS} characters or {MAX_DEPTH} levels"
                self._problems[bound] = None
                self._given_up, self._depth = True, 0
        return found

    def finish(self) -> list[RawRegion]:
        if self._depth > 0:
            self._problems["a call is cut off"] = None
        return []

    def _object(self, text: str) -> list[RawRegion]:
        try:
            item = json.loads(text)
        except ValueError:
            self._problems["a call is no JSON"] = None
            return []
        call, arguments = self._calls.get(""), item
        if call is None:
            name, arguments = item.get("name"), item.get("arguments")
            call = self._calls.get(name) if isinstance(name, str) else None
        return _called(call, arguments, self._problems)


def read_code(
    text: str, dialect: Dialect, problems: dict[str, None]
) -> tuple[list[RawRegion], str | None]:
    """Calls in Python's notation, with named arguments that are numbers or texts; no answer."""
    calls = {call.name: call for call in dialect.calls}
    names = "|".join(map(re.escape, calls))
    found: list[RawRegion] = []
    pattern = rf"\b({names})\(((?:[^()\"']|\"[^\"]*\"|'[^']*')*)\)"
    for match in re.finditer(pattern, text):
        given = {m[1]: m[2] or m[3] or m[4] or "" for m in _ARGUMENT.finditer(match[2])}
        found += _called(calls[match[1]], given, problems)
    return found, None


def read_phrase(
    text: str, dialect: Dialect, problems: dict[str, None]
) -> tuple[list[RawRegion], str | None]:
    """(requests, answer) of one of the phrases of the dialect, in any case."""
    for pattern in dialect.phrases:
        match = re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII | re.DOTALL)
        if match is not None:
            given = match.groupdict()
            answer = given.pop("answer", None)
            return region_of(given, problems) if given else [], answer and answer.strip()
    problems["an action is none of those that the model has"] = None
    return [], None


class MarkReader:
    """Regions put together from marks in running text: a time, a box, a label, a density.

    A mark of a kind that the running region has begins the next one; but a time right after a
    time is the end of a span.
    """

    def __init__(self, problems: dict[str, None]) -> None:
        self._problems = problems
        self._running: dict[str, object] = {}

    def mark(self, argument: str, text: str) -> list[RawRegion]:
        running = self._running
        if argument == "time" and list(running) == ["time"]:
            self._running = {}
            return region_of({"start": running["time"], "end": text}, self._problems)
        found = self.finish() if argument in running else []
        self._running[argument] = text
        return found

    def finish(self) -> list[RawRegion]:
        running, self._running = self._running, {}
        return region_of(running, self._problems) if running else []


# What a section holds -> what reads it while it arrives, or once it is whole.
READERS: Mapping[str, Callable[[Dialect, dict[str, None]], Reader]] = {
    "numbers": lambda dialect, problems: GlueScanner(problems),
    "json": JsonReader,
}
WHOLE = {"code": read_code, "phrase": read_phrase}


def _called(call: Call | None, arguments: object, problems: dict[str, None]) -> list[RawRegion]:
    """The region of one call."""
    if call is None or not isinstance(arguments, Mapping):
        problems["a call names no tool that there is, or has no arguments"] = None
        return []
    known = {
        call.arguments[name]: value
        for name, value in arguments.items()
        if name in call.arguments and value is not None
    }
    return region_of(known, problems, call)
