"""What a model's text says about where the evidence is, in the notation of its dialect.

One scanner reads the text, whole (`parse_clue`) or in pieces (`ClueStream`): it never fails, takes
time linear in the text, and keeps numbers as written. What can be looked at is decided later
(region.py, the policies).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vtts_rt.perception.calls import MAX_CALL_CHARS, READERS, WHOLE, MarkReader, Reader
from vtts_rt.perception.dialect import R1_5, TAGS, Dialect
from vtts_rt.perception.region import RawBox, RawRegion, RawSpan
from vtts_rt.types import FULL_BOX, Region, require

MAX_SPANS = 64
MAX_BOXES = 64


@dataclass(frozen=True, slots=True)
class Clue:
    """What one answer said.

    text: all of it. think, answer, glue: what stood in the tag of the thought, of the answer, of
    the clue (whitespace stripped), None where the tag never came. spans: (start, end) seconds and
    boxes: (x0, y0, x1, y1), both as written: not clipped, not ordered; finite; at most 64 each
    (published.py: all of them). A box refers to the view that the model saw
    (`region.resolve_boxes`). regions: what a call or a mark binds together, in order; their spans
    and boxes stand in spans and boxes too. problems: sentences about what could not be used.
    empty_list: an empty list of spans was given, which `official` tells from no clue.
    """

    text: str = ""
    think: str | None = None
    answer: str | None = None
    spans: tuple[RawSpan, ...] = ()
    boxes: tuple[RawBox, ...] = ()
    problems: tuple[str, ...] = ()
    glue: str | None = None
    empty_list: bool = False
    regions: tuple[RawRegion, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.spans or self.boxes or self.regions)


@dataclass(slots=True)
class _Section:
    """What stands between an opening tag and the next tag that ends it."""

    pieces: list[str] = field(default_factory=list)
    closed: bool = False
    reader: Reader | None = None
    spans: list[RawRegion] = field(default_factory=list)
    boxes: list[RawRegion] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(self.pieces).strip()


class ClueStream:
    """Reads an answer while it is written.

    A section runs from an opening tag to the next tag of any kind; but in an open brace of a call
    only the call's own tags count, and marks (`field` tags) stand in other sections. Of several
    sections with one tag the last that was closed counts, or the last at all if none was; of calls
    and marks, the first `max_calls`. A closing tag of the thought without an opening one makes the
    text before it the thought, since some chat templates open it in the prompt. Tags may be in any
    case and hold spaces.
    """

    def __init__(self, dialect: Dialect = R1_5) -> None:
        self._dialect = dialect
        self._tags = {tag.name: tag for tag in dialect.tags}
        names = "|".join(self._tags)
        self._tag_pattern = re.compile(
            rf"<[ ]{{0,4}}(?:(/)[ ]{{0,4}})?({names})[ ]{{0,4}}>", re.IGNORECASE | re.ASCII
        )
        self._longest_tag = 2 + 1 + 3 * 4 + max(len(name) for name in self._tags)
        self._pieces: list[str] = []
        self._held = ""
        self._open: str | None = None
        self._section = _Section()
        self._best: dict[str, _Section] = {}
        self._outside: list[str] = []
        self._problems: dict[str, None] = {}
        self._regions: list[RawRegion] = []
        self._marks = MarkReader(self._problems)
        self._mark: tuple[str, list[str]] | None = None

    def feed(self, piece: str) -> list[RawRegion]:
        """Take the next piece of text; the spans, boxes and requests that it completes."""
        self._pieces.append(piece)
        text = self._held + piece
        found: list[RawRegion] = []
        position = 0
        for match in self._tag_pattern.finditer(text):
            found += self._content(text[position : match.start()])
            name, closing = match[2].lower(), bool(match[1])
            reader = self._section.reader
            if reader is not None and reader.inside and name != self._open:
                found += self._content(match[0])
            elif self._tags[name].holds == "field":
                found += self._at_mark(name, closing=closing)
            else:
                found += self._tag(name, closing=closing)
            position = match.end()
        # The end of the piece may be the beginning of a tag: hold it until that is decided.
        start = text.rfind("<", position)
        if start < 0 or ">" in text[start:] or len(text) - start > self._longest_tag:
            start = len(text)
        found += self._content(text[position:start])
        self._held = text[start:]
        return found

    def finish(self) -> Clue:
        """The whole text as a clue; the stream takes no more text after that."""
        self._content(self._held)
        self._held = ""
        self._leave(closed=False)
        self._keep(self._marks.finish())
        request = self._dialect.request
        glue = self._best.get(request.name)
        if glue is None and request.holds != "field":
            self._problems[f"the text holds no {request.opening}"] = None
        elif glue is not None and not glue.closed and not self._regions:
            self._problems[f"{request.opening} is never closed"] = None
        if request.holds == "numbers" and glue is not None and not glue.spans + glue.boxes:
            self._problems[f"{request.opening} holds no span and no box"] = None
        return self.so_far()

    def so_far(self) -> Clue:
        """What has been read, as the clue that it would be if nothing more came."""
        glue = self._section if self._open == self._dialect.request.name else None
        glue = glue or self._best.get(self._dialect.request.name)
        found = self._regions if glue is None else [*glue.spans, *glue.boxes, *self._regions]
        think, answer = self._best.get("think"), self._best.get("answer")
        return Clue(
            text=self.text,
            think=None if think is None else think.content,
            answer=None if answer is None else answer.content,
            spans=tuple(region.span for region in found if region.span),
            boxes=tuple(region.box for region in found if region.box),
            problems=tuple(self._problems),
            glue=None if glue is None else glue.content,
            regions=tuple(self._regions),
        )

    def has_closed(self, tag: str) -> bool:
        """Whether a section with `tag` has been closed, so far."""
        section = self._best.get(tag)
        return section is not None and section.closed

    @property
    def text(self) -> str:
        """All of the text, so far."""
        return "".join(self._pieces)

    @property
    def outside(self) -> str:
        """The text in no section, so far."""
        return "".join(self._outside)

    def _content(self, text: str) -> list[RawRegion]:
        if not text:
            return []
        if self._open is None:
            self._outside.append(text)
        self._section.pieces.append(text)
        if self._mark is not None:
            self._mark[1].append(text)
        reader = self._section.reader
        return [] if reader is None else self._keep(reader.feed(text))

    def _tag(self, tag: str, *, closing: bool) -> list[RawRegion]:
        if closing and tag == "think" and self._open is None:
            self._open = "think"
            self._outside.clear()
        found = self._leave(closed=closing and self._open == tag)
        if not closing:
            self._open, holds = tag, self._tags[tag].holds
            if holds in READERS:
                self._section.reader = READERS[holds](self._dialect, self._problems)
        return found

    def _at_mark(self, name: str, *, closing: bool) -> list[RawRegion]:
        """A tag of a mark, which leaves the section that it stands in open."""
        mark, self._mark = self._mark, None
        if not closing:
            self._mark = (name, [])
        elif mark is not None and mark[0] == name:
            return self._keep(self._marks.mark(self._tags[name].field, "".join(mark[1])))
        return []

    def _leave(self, *, closed: bool) -> list[RawRegion]:
        """End the running section, whatever it is."""
        section, tag = self._section, self._open
        self._mark = None
        found: list[RawRegion] = []
        if section.reader is not None:
            found = self._keep(section.reader.finish())
        elif tag is not None and (read := WHOLE.get(self._tags[tag].holds)) is not None:
            regions: list[RawRegion] = []
            answer = None
            if len(text := section.content) <= MAX_CALL_CHARS:
                regions, answer = read(text, self._dialect, self._problems)
            else:
                self._problems[f"a request has over {MAX_CALL_CHARS} characters"] = None
            found = self._keep(regions)
            if answer is not None:
                self._best["answer"] = _Section([answer], closed=closed)
        section.closed = closed
        if tag is not None:
            best = self._best.get(tag)
            if best is None or closed or not best.closed:
                self._best[tag] = section
        self._section, self._open = _Section(), None
        return found

    def _keep(self, found: Iterable[RawRegion]) -> list[RawRegion]:
        """Note what was found; returns what is within the bounds."""
        kept = []
        listed = self._open is not None and self._tags[self._open].holds == "numbers"
        for region in found:
            into, most, what = self._regions, self._dialect.max_calls, "requests of a turn"
            if listed and region.span:
                into, most, what = self._section.spans, MAX_SPANS, "spans of a list"
            elif listed:
                into, most, what = self._section.boxes, MAX_BOXES, "boxes of a list"
            if len(into) < most:
                into.append(region)
                kept.append(region)
            else:
                self._problems[f"only the first {most} {what} count"] = None
        return kept


def parse_clue(text: str, dialect: Dialect = R1_5) -> Clue:
    """The clue in a whole text; never raises on a str."""
    stream = ClueStream(dialect)
    stream.feed(text)
    return stream.finish()


# -- JSON -------------------------------------------------------------------------------------


def clue_to_json(clue: Clue, regions: Sequence[Region] = ()) -> dict[str, list[list[float]]]:
    """`{"spans": [[s, e]...], "boxes": [[x0, y0, x1, y1]...]}` of the public contract.

    spans: seconds as written. boxes: those of `regions` (whole frame, normalised; of the first
    video that has regions), without the ones that are the whole frame.
    """
    first = min((region.video for region in regions), default=0)
    boxes = [region.box for region in regions if region.video == first and region.box != FULL_BOX]
    return {
        "spans": [list(span) for span in clue.spans],
        "boxes": [[b.x0, b.y0, b.x1, b.y1] for b in dict.fromkeys(boxes)],
    }


def clue_from_json(item: Any) -> Clue:
    """A forced clue: `[[s, e]...]` or `{"spans": [[s, e]...], "boxes": [[x0, y0, x1, y1]...]}`.

    Spans are seconds; any finite numbers are taken and clipped later as a model's would be.
    Boxes are fractions of the whole frame. None is no clue, an empty list of spans is one for
    `official`. ValueError says what is wrong with any other shape.
    """
    what = "assume_clues"
    if not isinstance(item, Mapping):
        item = {"spans": item}
    for key in item:
        require(what, "key", key, key in ("spans", "boxes"), '"spans" or "boxes"')
    spans = [(s[0], s[1]) for s in _number_rows(what, "spans", item.get("spans"), 2, MAX_SPANS)]
    rows = _number_rows(what, "boxes", item.get("boxes"), 4, MAX_BOXES)
    for row in rows:
        inside = all(0.0 <= v <= 1.0 for v in row)
        require(what, "boxes", row, inside, "fractions of the frame in [0, 1]")
    boxes = [(r[0], r[1], r[2], r[3]) for r in rows]
    problems = () if spans or boxes else ("the forced clue is empty",)
    empty_list = item.get("spans") is not None and not spans
    return Clue(spans=tuple(spans), boxes=tuple(boxes), problems=problems, empty_list=empty_list)


def _number_rows(what: str, name: str, rows: Any, width: int, limit: int) -> list[list[float]]:
    if rows is None:
        return []
    rule = f"a list of [{', '.join(['number'] * width)}]"
    require(what, name, rows, isinstance(rows, list | tuple), rule)
    require(what, f"number of {name}", len(rows), len(rows) <= limit, f"<= {limit}")
    for row in rows:
        require(what, name, row, isinstance(row, list | tuple) and len(row) == width, rule)
        for value in row:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(what, name, row, number and abs(value) < 1e300, "finite numbers")
    return [[float(value) for value in row] for row in rows]


# -- the chosen option --------------------------------------------------------------------------

LetterRule = Literal["lenient", "published"]
LETTER_RULES: tuple[LetterRule, ...] = ("lenient", "published")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_ANSWER_CHARS = 4096
_LEAD_IN = re.compile(
    r"(?:so|thus|therefore|hence|final|the|my|best|correct|right|most likely|answer|option|choice"
    r"|letter|would be|should be|must be|is|i choose|i think|it|that)(?![a-z])[\s,:*]*",
    re.IGNORECASE,
)
_LETTER_FIRST = re.compile(r"[\s(\[{*\"'`]*([A-Za-z])(?=[.):\]}*\"'`,;]|\s*$)")
_LETTER_ALONE = re.compile(r"\W*[^\W\d_]?\W*")
_LETTER_ANYWHERE = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])")


# VideoChat-R1.5 (extract_characters_regex of its evaluation scripts): what it strikes out first.
_PUBLISHED_LEAD_INS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:Best option:",
)


def option_letter(
    answer: str | Clue, options: Sequence[str], *, letter: LetterRule = "lenient"
) -> int | None:
    """Which of `options` an answer names, as an index, or None.

    answer: a clue, or a text; where it has an answer tag what stands there counts, otherwise
    the text outside all tags. letter: "published" is the rule of VideoChat-R1.5's evaluation, for
    accuracies that are compared with published ones: the first capital A to G of the first closed
    answer tag, else of the whole text, be it in a word. "lenient", in this order: the exact text of
    one option, if that is more than a letter (`A. Smith`), a letter at the start (`B.`, `(B)`,
    `b)`, `B. red`), both also after common lead-ins (`The answer is B.`), an option's words, the
    first capital that stands alone (`A` and `I` before a lower-case word are words), an option's
    text inside the answer if only one occurs. Only the first 4,096 characters are read.
    """
    require("option_letter", "letter", letter, letter in LETTER_RULES, f"one of {LETTER_RULES}")
    letters = _LETTERS[: len(options)]
    if letter == "published":
        named = _tagged_letter(answer.text if isinstance(answer, Clue) else answer)
        return letters.index(named) if named and named in letters else None
    text = _answer_text(answer)[:_MAX_ANSWER_CHARS].strip()
    rest, exact = text, [_same_text(option) for option in options]
    while True:
        said = _same_text(rest)
        if exact.count(said) == 1 and not _LETTER_ALONE.fullmatch(said):
            return exact.index(said)
        match = _LETTER_FIRST.match(rest)
        if match is not None and match[1].upper() in letters:
            return letters.index(match[1].upper())
        lead_in = _LEAD_IN.match(rest.lstrip(" \t\n:,*"))
        if lead_in is None:
            break
        rest = rest.lstrip(" \t\n:,*")[lead_in.end() :]
    plain = [plain_words(option) for option in options]
    for candidate in (plain_words(text), plain_words(rest)):
        if candidate and candidate in plain:
            return plain.index(candidate)
    for match in _LETTER_ANYWHERE.finditer(rest):
        is_word = match[1] in "AI" and re.match(r"\s+[a-z]", rest[match.end() :]) is not None
        if match[1] in letters and not is_word:
            return letters.index(match[1])
    inside = [
        i for i, option in enumerate(plain) if option and f" {option} " in f" {plain_words(text)} "
    ]
    return inside[0] if len(inside) == 1 else None


def _tagged_letter(text: str) -> str:
    opening, closing = TAGS["answer"]
    _, found, rest = text.partition(opening)
    if found and closing in rest:
        text = rest.partition(closing)[0]
    return published_letter(text)


def published_letter(answer: str) -> str:
    """The letter that VideoChat-R1.5's code, of evaluation and of rewards, finds in an answer, or
    "". Its other condition, no letter in more than ten words, adds nothing."""
    text = answer.strip()
    for lead_in in _PUBLISHED_LEAD_INS:
        text = text.replace(lead_in, "")
    match = re.search("[A-G]", text)
    return "" if match is None else match[0]


def _answer_text(answer: str | Clue) -> str:
    stream = ClueStream()
    stream.feed(answer.text if isinstance(answer, Clue) else answer)
    clue = stream.finish()
    return stream.outside if clue.answer is None else clue.answer


def _same_text(text: str) -> str:
    """Without regard to case, white space and a full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(" .")


def plain_words(text: str) -> str:
    """Lower case, words and numbers only, single spaces: for comparing option texts."""
    return " ".join(re.findall(r"\w+", text.casefold()))
