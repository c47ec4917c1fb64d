"""Layouts: the order of texts and vision segments in the user's turn of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from vtts_rt.checks import Rule
from vtts_rt.perception.chat import ChatFormat
from vtts_rt.perception.plan import FramePlan
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.types import FULL_BOX, Marker, PromptPart, Segment, TimeLabel, VideoWrapper

MAX_OPTIONS = 26  # one capital each
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A cell shorter than this has its time written with two decimals.
_FINE_CELL_SECONDS = 0.1


def _has_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _are_options(options: Any) -> bool:
    several = isinstance(options, Sequence) and not isinstance(options, str | bytes)
    return several and len(options) <= MAX_OPTIONS and all(map(_has_text, options))


PROMPT_RULES: dict[str, Rule] = {
    "question": (_has_text, "a text that is not blank"),
    "options": (_are_options, f"a list of at most {MAX_OPTIONS} texts, none blank"),
    "context": (lambda text: isinstance(text, str), "a text"),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user's turn of a round is made of.

    task: context, question and options as text (`task_text`). is_later: another round came before.
    goes_on: it stands before this turn, with the task. is_last: only the answer is asked for.
    text_first, video_wrapper: see PerceptionConfig.
    """

    chat: ChatFormat
    templates: PromptTemplates
    task: str
    plan: FramePlan
    is_later: bool
    goes_on: bool
    is_last: bool
    text_first: bool
    video_wrapper: VideoWrapper = "outer"


def video_first(turn: Turn) -> list[PromptPart]:
    """Vision segments, then all text."""
    text = turn.task + (turn.templates.final if turn.is_last else turn.templates.look)
    return [*with_labels(turn, lambda *_: "", headings=False), text]


def labelled_pairs(turn: Turn) -> list[PromptPart]:
    """Text, which a later round can reuse, then pairs with their times, then a short cue; or, for
    many questions about one video, the pairs of the first look before the text."""
    templates = turn.templates
    text = turn.task + templates.task
    if turn.is_later:
        text = "" if turn.goes_on else text + _previous(templates, turn.plan)
    before, after = (text, "") if turn.text_first else ("", text)
    cue = templates.cue_final if turn.is_last else templates.cue_look
    return [before, *with_labels(turn, _time_label), after + cue]


def task_text(
    templates: PromptTemplates, question: str, options: Sequence[str], context: str
) -> str:
    """The user's own texts in the wording of a model."""
    text = ""
    if context.strip():
        text += templates.context.format(context=context)
    text += templates.question.format(question=question)
    if options:
        lines = [
            templates.option.format(letter=letter, text=option)
            for letter, option in zip(_LETTERS, options, strict=False)
        ]
        text += templates.options.format(options="\n".join(lines))
    return text


def _previous(templates: PromptTemplates, plan: FramePlan) -> str:
    """The clue that led to the plan, as text; nothing where there was none to follow."""
    if not plan.regions:
        return ""
    first = [r for r in plan.regions if r.video == plan.regions[0].video]
    spans = dict.fromkeys((r.span.start_seconds, r.span.end_seconds) for r in first)
    boxes = dict.fromkeys(r.box for r in first if r.box != FULL_BOX)
    return templates.previous.format(
        spans="[" + ", ".join(f"({s:.1f}, {e:.1f})" for s, e in spans) + "]",
        boxes="["
        + ", ".join(f"[{b.x0:.2f}, {b.y0:.2f}, {b.x1:.2f}, {b.y1:.2f}]" for b in boxes)
        + "]",
    )


def with_labels(
    turn: Turn, label: Callable[[Turn, int, Segment], str], *, headings: bool = True
) -> list[PromptPart]:
    """Segments, each after its label, which may be empty; with several videos those of each after
    its heading. label: of a turn, and of a segment and its number in it.

    Where the chat format writes videos pair by pair, every pair is a segment behind a time, and
    markers stand around those of a video unless `turn.video_wrapper` says otherwise.
    """
    chat, plan = turn.chat, turn.plan
    parts: list[PromptPart] = []
    number = 0
    for video, run in groupby(plan.segments, lambda segment: segment.pairs[0].video):
        segments = list(run)
        if headings and len(plan.views) > 1:
            parts.append(turn.templates.video_heading.format(number=video + 1))
        by_pair = chat.per_pair and not segments[0].is_image
        wrapped = by_pair and turn.video_wrapper == "outer"
        if by_pair:
            segments = [replace(s, pairs=(pair,)) for s in segments for pair in s.pairs]
        if wrapped:
            parts.append(Marker(chat.vision_start))
        for segment in segments:
            text = label(turn, number, segment) or (_time(turn, segment, 1) if by_pair else "")
            if text:
                parts.append(TimeLabel(text))
            parts.append(segment)
            number += 1
        if wrapped:
            parts.append(Marker(chat.vision_end))
    return parts


def _time_label(turn: Turn, number: int, segment: Segment) -> str:
    if segment.is_image or not turn.plan.time_labels:
        return ""
    view = turn.plan.views[segment.pairs[0].video]
    return _time(turn, segment, 2 if view.cell_seconds < _FINE_CELL_SECONDS else 1)


def _time(turn: Turn, segment: Segment, decimals: int) -> str:
    (pair, *_), chat = segment.pairs, turn.chat
    seconds = pair.time_seconds
    if chat.per_pair and pair.mean_seconds is not None:
        seconds = pair.mean_seconds
    label = turn.templates.time_label
    label = chat.time_label if label is None else label
    return label.format(seconds=f"{seconds:.{decimals}f}", index=pair.frame_a)
