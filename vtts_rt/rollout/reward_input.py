"""What a reward judges: the rounds of one member of a group, and the row that labels them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vtts_rt.data.rows import Row
from vtts_rt.perception.clue import Clue, ClueStream, option_letter, plain_words
from vtts_rt.perception.dialect import DIALECTS, R1_5, Dialect
from vtts_rt.perception.region import clip_box, usable_spans
from vtts_rt.rounds.results import Answer, RoundResult
from vtts_rt.types import FULL_BOX, Region, TimeSpan


@dataclass(frozen=True, slots=True)
class Look:
    """One round: the text, what counts as its answer ("" if none did), whether an answer tag was
    closed, its clue, raw and as regions of the whole frame, the visual tokens that it added, and
    (height, width) px of the first view."""

    text: str
    answered: str = ""
    closed: bool = False
    clue: Clue = Clue()
    regions: tuple[Region, ...] = ()
    visual_tokens: int = 0
    resized_hw: tuple[int, int] = (0, 0)

    @classmethod
    def of_round(cls, result: RoundResult) -> Look:
        tokens = sum(segment.num_tokens for segment in result.plan.segments)
        closed, hw = result.answer is not None, result.plan.resized_hw
        said = result.answered
        return cls(result.text, said, closed, result.clue, result.regions, tokens, hw)

    @classmethod
    def of_text(cls, text: str, row: Row, dialect: Dialect = R1_5) -> Look:
        """Of a text alone: boxes of its clue are fractions of the frame, anything else is no
        box; spans without an end of the video are taken as written."""
        stream = ClueStream(dialect)
        stream.feed(text)
        clue = stream.finish()
        spans = usable_spans(clue.spans, row.duration_seconds or math.inf)
        boxes = [box for raw in clue.boxes if max(raw) <= 1 and (box := clip_box(raw)) is not None]
        instant = (TimeSpan(0.0, 0.0),)
        regions = [Region(s, b) for s in spans or instant for b in boxes or [FULL_BOX]]
        return cls(
            text=text,
            answered=text.strip() if clue.answer is None else clue.answer,
            closed=stream.has_closed("answer"),
            clue=clue,
            regions=tuple(regions) if spans or boxes else (),
        )


@dataclass(frozen=True, slots=True)
class RewardInput:
    """What a reward judges: the labelled row, and the rounds of one member.

    answer: what the rounds came to, as `Answer.text`. last_is_final: whether the last round was not
    asked for a clue, as no round was to follow. stopped: whether the last round was, and ended the
    rounds by closing an empty one. task: of the row's data set, or "".
    """

    row: Row
    looks: tuple[Look, ...]
    answer: str = ""
    last_is_final: bool = False
    task: str = ""
    dialect: Dialect = R1_5
    stopped: bool = False

    @classmethod
    def of_answer(cls, answer: Answer, row: Row, task: str = "") -> RewardInput:
        """Rounds at the end in which nothing was said are none: a member that was out of time
        before the first token of a round is judged by what it said, which is what it trains."""
        rounds = list(answer.rounds)
        while rounds and not rounds[-1].token_ids:
            rounds.pop()
        looks = tuple(map(Look.of_round, rounds))
        final = bool(looks) and rounds[-1].is_final
        dialect = DIALECTS[answer.dialect]
        stopped = answer.stop_reason == "no_clue" and bool(looks)
        stopped = stopped and _asks_nothing(looks[-1].text, dialect)
        return cls(row, looks, answer.text, final, task, dialect, stopped)

    @classmethod
    def of_texts(
        cls, texts: Sequence[str], row: Row, task: str = "", dialect: Dialect = R1_5
    ) -> RewardInput:
        """Of the texts of all rounds, of which the last of several was asked for the answer."""
        looks = tuple(Look.of_text(text, row, dialect) for text in texts)
        said = [look.answered for look in reversed(looks) if look.answered]
        return cls(row, looks, said[0] if said else "", len(looks) > 1, task, dialect)

    @property
    def text(self) -> str:
        """What published rewards read: the text of the last round."""
        return self.looks[-1].text if self.looks else ""

    @property
    def true_boxes(self) -> list[tuple[float, float, float, float]]:
        """The row's boxes as published rewards compare them: px as they stand in the data, or
        fractions of the frame in px of the first view, in which a model speaks."""
        height, width = self.looks[0].resized_hw if self.looks else (0, 0)
        shown = [
            (b.x0 * width, b.y0 * height, b.x1 * width, b.y1 * height)
            if width
            else (b.x0, b.y0, b.x1, b.y1)
            for b in self.row.boxes
        ]
        return shown + list(self.row.pixel_boxes)

    def is_right(self, said: str) -> bool:
        """Whether an answer is the row's: its letter, or the same words where it has none."""
        truth, options = self.row.answer or "", self.row.options
        if not options and len(truth) == 1 and "A" <= truth <= "Z":
            options = ("",) * 26  # they stand in the question
        if not options:
            return bool(words := plain_words(truth)) and plain_words(said) == words
        chosen = option_letter(said, options) if said else None
        return chosen is not None and chr(ord("A") + chosen) == truth


def _asks_nothing(text: str, dialect: Dialect) -> bool:
    """Whether the last request in a text is a closed one without numbers."""
    _, opened, rest = text.rpartition(dialect.request.opening)
    inside, closed, _ = rest.partition(dialect.request.closing)
    return bool(opened and closed) and not inside.strip("[] \t\n")
