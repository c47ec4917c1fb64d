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
from typing import Any, Protocol

from vtts_rt.perception.chat import BoxUnit
from vtts_rt.perception.dialect import Call, Dialect
from vtts_rt.perception.glue import GlueScanner
from vtts_rt.perception.region import RawRegion

MAX_CALL_CHARS = 8192  # a longer call or phrase is not read
MAX_DEPTH = 16  # of brackets in a call
MAX_TEXT_CHARS = 1000  # of a query or a label
MAX_ORDINALS = 64

_TIME = re.compile(r"[-+]?(?:\d{1,9}(?::\d{1,2}){0,2}(?:\.\d{0,9})?|\.\d{1,9}) ?s?", re.ASCII)
_VIEW = re.compile(r"(?:original_image|observation_(\d{1,6}))", re.ASCII)
_DAY_RANGE = re.compile(r"\s*(DAY\d{1,6}_\d{1,12})\s*-\s*(DAY\d{1,6}_\d{1,12})\s*", re.ASCII)
_ARGUMENT = re.compile(r"\b(\w+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([-+\w.:]+))")


def _number(value: object) -> float:
    """A finite number, or a text that is one; `1:05` is minutes and seconds."""
    if isinstance(value, str) and _TIME.fullmatch(value.strip()):
        text = value.strip().removesuffix("s").strip()
        seconds = 0.0
        for part in text.lstrip("+-").split(":"):
            seconds = seconds * 60.0 + float(part)
        return -seconds if text.startswith("-") else seconds
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise ValueError("is no finite number")
    return float(value)


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError("is no whole number")
    return int(number)


def _positive(value: object) -> float:
    number = _number(value)
    if not 0.0 < number <= 1000.0:
        raise ValueError("is no number in (0, 1000]")
    return number


def _numbers(value: object, count: int) -> tuple[float, ...]:
    """Exactly `count` numbers: a list, or a text that spells them."""
    if isinstance(value, str):
        scanner = GlueScanner()
        found = [*scanner.feed(value), *scanner.finish()]
        value = found[0] if len(found) == 1 else None
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"is no list of {count} numbers")
    return tuple(_number(item) for item in value)


def _ordinals(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ORDINALS:
        raise ValueError(f"is no list of 1 to {MAX_ORDINALS} frames")
    return tuple(_whole(item) for item in value)


def _view_number(value: object) -> int:
    number = _whole(value)
    if number < 1:
        raise ValueError("is no view that was shown")
    return number - 1


def _view_name(value: object) -> int:
    match = _VIEW.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is no view that was shown")
    return int(match[1] or 0)


def _day_range(value: object) -> tuple[str, str]:
    match = _DAY_RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("is no range of a day clock")
    return match[1], match[2]


def _count(value: object) -> int:
    number = _whole(value)
    if not 1 <= number <= 100_000:
        raise ValueError("is no number of frames")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value.strip()[:MAX_TEXT_CHARS]


# Argument -> how it is read.
ARGUMENTS: Mapping[str, Callable[[object], Any]] = {
    **dict.fromkeys(("start", "end", "time", "frame_number_at"), _number),
    **dict.fromkeys(("first", "last"), _whole),
    "span": lambda value: _numbers(value, 2),
    "box": lambda value: _numbers(value, 4),
    "ordinals": _ordinals,
    "day_range": _day_range,
    "view_number": _view_number,
    "view_name": _view_name,
    "sample_fps": _positive,
    "num_frames": _count,
    "query": _text,
    "label": _text,
}
# Without these a request can be met all the same: left out where they cannot be read.
_OPTIONAL = frozenset({"sample_fps", "num_frames", "query", "label"})


def region_of(
    arguments: Mapping[str, object], box_unit: BoxUnit, problems: dict[str, None]
) -> RawRegion | None:
    """The region that arguments describe; None where they do not, and `problems` says why."""
    read: dict[str, Any] = {}
    for name, value in arguments.items():
        try:
            read[name] = ARGUMENTS[name](value)
        except ValueError as error:
            problems[f"{name} {error}"] = None
            if name not in _OPTIONAL:
                return None
    for start, end, whole in (("start", "end", "span"), ("first", "last", "frames")):
        if (start in read) != (end in read):
            problems[f"{start} and {end} stand together or not at all"] = None
            return None
        if start in read:
            read[whole] = (read.pop(start), read.pop(end))
    if "time" in read:
        read["span"] = (read["time"], read.pop("time"))
    for name, field in (("view_number", "view"), ("view_name", "view")):
        if name in read:
            read[field] = read.pop(name)
    if "frame_number_at" in read:
        read["frame_number_at_seconds"] = read.pop("frame_number_at")
    places = ("span", "frames", "ordinals", "day_range", "box", "frame_number_at_seconds")
    if not any(place in read for place in places):
        problems["a request names no time, no frame and no box"] = None
        return None
    return RawRegion(**read, box_unit=box_unit)


class Reader(Protocol):
    """Reads what stands in one section, piece by piece; `finish` where the section ends.

    inside: whether a tag that comes now is part of what is read. answer: one that was found.
    """

    @property
    def inside(self) -> bool: ...
    @property
    def answer(self) -> str | None: ...
    def feed(self, text: str) -> list[RawRegion]: ...
    def finish(self) -> list[RawRegion]: ...


class JsonReader:
    """Calls as JSON objects: `{"name": .., "arguments": {..}}`, or the arguments alone.

    An object counts as soon as its last brace has come. Text around objects is passed over.
    """

    answer = None

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
                self._problems[
                    f"a call has over {MAX_CALL_CHARS} characters or {MAX_DEPTH} levels"
                ] = None
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


class _Whole:
    """What can only be read once the section ends."""

    inside = False

    def __init__(self, dialect: Dialect, problems: dict[str, None]) -> None:
        self._dialect = dialect
        self._problems = problems
        self._pieces: list[str] = []
        self._size = 0
        self.answer: str | None = None

    def feed(self, text: str) -> list[RawRegion]:
        if self._size <= MAX_CALL_CHARS:
            self._pieces.append(text)
        self._size += len(text)
        return []

    def finish(self) -> list[RawRegion]:
        if self._size > MAX_CALL_CHARS:
            self._problems[f"a request has over {MAX_CALL_CHARS} characters"] = None
            return []
        return self._read("".join(self._pieces))

    def _read(self, text: str) -> list[RawRegion]:
        raise NotImplementedError


class CodeReader(_Whole):
    """Calls in Python's notation, with named arguments that are numbers or texts."""

    def _read(self, text: str) -> list[RawRegion]:
        calls = {call.name: call for call in self._dialect.calls}
        names = "|".join(map(re.escape, calls))
        found: list[RawRegion] = []
        pattern = rf"\b({names})\(((?:[^()\"']|\"[^\"]*\"|'[^']*')*)\)"
        for match in re.finditer(pattern, text):
            given = {m[1]: m[2] or m[3] or m[4] or "" for m in _ARGUMENT.finditer(match[2])}
            found += _called(calls[match[1]], given, self._problems)
        return found


class PhraseReader(_Whole):
    """One of the phrases of the dialect, in any case."""

    def _read(self, text: str) -> list[RawRegion]:
        for pattern in self._dialect.phrases:
            match = re.fullmatch(pattern, text.strip(), re.IGNORECASE | re.ASCII | re.DOTALL)
            if match is None:
                continue
            given = match.groupdict()
            if "answer" in given:
                self.answer = given["answer"].strip()
                return []
            region = region_of(given, "px", self._problems)
            return [] if region is None else [region]
        self._problems["an action is none of those that the model has"] = None
        return []


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
            return self._region({"start": running["time"], "end": text})
        found = self.finish() if argument in running else []
        self._running[argument] = text
        return found

    def finish(self) -> list[RawRegion]:
        running, self._running = self._running, {}
        return self._region(running) if running else []

    def _region(self, arguments: Mapping[str, object]) -> list[RawRegion]:
        region = region_of(arguments, "px", self._problems)
        return [] if region is None else [region]


READERS: Mapping[str, Callable[[Dialect, dict[str, None]], Reader]] = {
    "json": JsonReader,
    "code": CodeReader,
    "phrase": PhraseReader,
}


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
    region = region_of(known, call.box_unit, problems)
    return [] if region is None else [region]
