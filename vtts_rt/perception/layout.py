"""Prompt layouts of the four strategies, with Qwen's chat template written out.

`official` and `grid`: vision segments, then all text, afresh in every round. `refresh` and
`append`: text first (the reused prefix, the same in every round), then time-labelled pairs, then
a short cue; or, for many questions about one video, the pairs of the first look before the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtts_rt.checks import Rule, check
from vtts_rt.config import STRATEGIES
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.types import FULL_BOX, Prompt, PromptPart, Segment, Strategy, TimeLabel, require

MAX_OPTIONS = 26  # one capital each
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_USER = "<|im_start|>user\n"
_END = "<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n"
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


def neutralise(text: str) -> str:
    """Text of a user without control tokens: a space goes into every `<|`.

    All of Qwen's control tokens are spelt `<|name|>`; left alone, one in a question would end
    the turn or stand for an image.
    """
    return text.replace("<|", "< |")


def build_prompt(
    strategy: Strategy,
    templates: PromptTemplates,
    *,
    question: str,
    options: Sequence[str],
    context: str,
    round_index: int,
    max_rounds: int,
    plan: FramePlan,
    history: Sequence[RoundHistory],
    text_first: bool = True,
) -> Prompt:
    """The prompt of one round.

    question: not blank. options: may be empty, at most 26, none blank. context: subtitles or
    other long text, may be empty. round_index: from 0; the last of max_rounds asks for the
    answer only. plan: of this round. history: the finished rounds. For `append` with a history the
    result is the part that the round adds after the model's last token, beginning with the end
    of its turn. text_first: see PerceptionConfig. ValueError for a bad argument.
    """
    require("ask", "strategy", strategy, strategy in STRATEGIES, f"one of {STRATEGIES}")
    check("ask", PROMPT_RULES, {"question": question, "options": options, "context": context})
    last = round_index >= max_rounds - 1
    system = f"<|im_start|>system\n{templates.system}{_END}" if templates.system else ""
    task = _task_text(templates, question, options, context)
    if strategy in ("official", "grid"):
        instruction = templates.final if last else templates.look
        parts: list[PromptPart] = [system + _USER, *plan.segments, task + instruction]
    else:
        text = task + templates.task
        if history and strategy == "append":
            before, after = _END + _USER, ""
        else:
            text += _previous(templates, plan) if history else ""
            before, after = (text, "") if text_first else ("", text)
            before = system + _USER + before
        cue = templates.cue_final if last else templates.cue_look
        parts = [before, *_labelled(templates, plan), after + cue]
    parts.append(_END + _ASSISTANT)
    return Prompt(tuple(_joined(parts)))


def _task_text(
    templates: PromptTemplates, question: str, options: Sequence[str], context: str
) -> str:
    text = ""
    if context.strip():
        text += templates.context.format(context=neutralise(context))
    text += templates.question.format(question=neutralise(question))
    if options:
        lines = [
            templates.option.format(letter=letter, text=neutralise(option))
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


def _labelled(templates: PromptTemplates, plan: FramePlan) -> list[PromptPart]:
    """Segments, each after its time; with several videos each after its heading."""
    parts: list[PromptPart] = []
    heading = None
    for segment in plan.segments:
        video = segment.pairs[0].video
        if len(plan.views) > 1 and video != heading:
            parts.append(templates.video_heading.format(number=video + 1))
            heading = video
        if plan.time_labels and not segment.is_image:
            parts.append(TimeLabel(_time_text(templates, plan, segment)))
        parts.append(segment)
    return parts


def _time_text(templates: PromptTemplates, plan: FramePlan, segment: Segment) -> str:
    pair = segment.pairs[0]
    decimals = 2 if plan.views[pair.video].cell_seconds < _FINE_CELL_SECONDS else 1
    return templates.time_label.format(seconds=f"{pair.time_seconds:.{decimals}f}")


def _joined(parts: Sequence[PromptPart]) -> list[PromptPart]:
    """Neighbouring text runs as one, no empty runs: a tokenizer sees each run as a whole."""
    joined: list[PromptPart] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined
