"""The wording of prompts: every piece of text that a prompt holds beside the user's own.

A model may bring its own wording, and a user may override fields with a JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

from vtts_rt.checks import UNICODE, check
from vtts_rt.config import ResolvedPerception
from vtts_rt.errors import BadRequest
from vtts_rt.perception.chat import ChatFormat
from vtts_rt.perception.dialect import DIALECTS, tagged
from vtts_rt.types import require

# Fields that take values, and which; the others are plain text.
PLACEHOLDERS: Mapping[str, frozenset[str]] = {
    "context": frozenset({"context"}),
    "question": frozenset({"question"}),
    "options": frozenset({"options"}),
    "option": frozenset({"letter", "text"}),
    "previous": frozenset({"spans", "boxes"}),
    "video_heading": frozenset({"number"}),
    "time_label": frozenset({"seconds", "index"}),
}

_THINK, _ANSWER, _GLUE = (tagged(name, "") for name in ("think", "answer", "glue"))
_TASK = (
    f"Think about what the video shows. Write your reasoning in {_THINK}, your answer in "
    f"{_ANSWER} (for a question with options, the letter alone), and where the evidence "
    f"is in {_GLUE}: time spans in seconds as [(start, end), (start, end)], and, if a part "
    "of the picture is too small to make out, a box around it as [x0, y0, x1, y1]."
)


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """Texts of all strategies. Placeholders stand in braces and are checked; `{{` is a brace.

    system: the system turn; "" leaves it out, None is the chat format's.
    context {context}, question {question}, option {letter} {text} (one line each) and options
    {options} (the lines) show the task.
    look, final: the instruction of a round that is followed by another, and of the last one,
    in `official` and `grid`. task: what `refresh` and `append` say once, before the pairs;
    cue_look, cue_final: what they say after the pairs of a round.
    previous {spans} {boxes}: how a clue travels to the next round of `refresh`.
    video_heading {number}: before each of several videos. time_label {seconds} {index} (of
    the source frame): before a frame pair; None is the chat format's.
    """

    system: str | None = None
    context: str = "Text that belongs to the video:\n{context}\n\n"
    question: str = "Question: {question}\n"
    options: str = "Options:\n{options}\n"
    option: str = "{letter}. {text}"
    look: str = _TASK
    final: str = (
        f"Answer now, without reasoning: write in {_ANSWER} nothing but the answer "
        "(for a question with options, the letter alone)."
    )
    task: str = (
        "You see frames of the video, each after its time in seconds, and may look again more "
        "closely where you point to. " + _TASK + "\n"
    )
    cue_look: str = "\nWhat do you see, and where should one look closer?"
    cue_final: str = f"\nThis was the last look. Write only {_ANSWER}."
    previous: str = "An earlier look pointed to the time spans {spans} and the boxes {boxes}.\n"
    video_heading: str = "Video {number}:\n"
    time_label: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            text = getattr(self, f.name)
            if text is f.default is None:
                continue
            require("prompts", f.name, text, isinstance(text, str), "a text")
            check("prompts", {f.name: UNICODE}, {f.name: text})
            if f.name in PLACEHOLDERS:
                _check_placeholders(f.name, text, PLACEHOLDERS[f.name])

    def fit_for(self, chat: ChatFormat) -> PromptTemplates:
        """These texts. ValueError for one that could hold a control token of the format."""
        for f in fields(self):
            text = getattr(self, f.name) or ""
            ok = chat.control not in text
            require("prompts", f.name, text, ok, f"free of control tokens (`{chat.control}...`)")
        return self


def _check_placeholders(name: str, text: str, allowed: frozenset[str]) -> None:
    rule = f"a text whose placeholders are among {sorted('{' + a + '}' for a in allowed)}"
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise BadRequest(f"prompts: {name} must be {rule}, got {text!r} ({error})") from None
    for _, placeholder, format_spec, conversion in parts:
        if placeholder is not None:
            plain = placeholder in allowed and not format_spec and not conversion
            require("prompts", name, text, plain, rule)


def prompts_from_dict(
    overrides: Mapping[str, Any], base: PromptTemplates | None = None
) -> PromptTemplates:
    """`base` (default: our wording) with some fields replaced.

    ValueError for an unknown field, a value that is no text, an unknown placeholder.
    """
    require("prompts", "overrides", overrides, isinstance(overrides, Mapping), "an object")
    names = [f.name for f in fields(PromptTemplates)]
    for name in overrides:
        require("prompts", "field", name, name in names, f"one of {', '.join(names)}")
    return replace(base or PromptTemplates(), **overrides)


def load_prompts(path: str | Path, base: PromptTemplates | None = None) -> PromptTemplates:
    """`base` with the fields replaced that a JSON object in a UTF-8 file names.

    ValueError as `prompts_from_dict`, and for a file that cannot be read or is no JSON.
    """
    try:
        overrides = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"prompts: file must be a readable JSON file, got {str(path)!r} ({error})"
        ) from error
    return prompts_from_dict(overrides, base)


def resolve_prompts(
    config: ResolvedPerception, own: PromptTemplates, chat: ChatFormat
) -> PromptTemplates:
    """The wording of a question: that of config.prompts, else the model's own, else its dialect's,
    else ours. ValueError as `load_prompts` and `fit_for`."""
    ours = PromptTemplates()
    wording = DIALECTS[config.dialect].wording
    open_fields = [name for name in wording if getattr(own, name) == getattr(ours, name)]
    templates = prompts_from_dict({name: wording[name] for name in open_fields}, own)
    if config.prompts:
        templates = load_prompts(config.prompts, base=templates)
    return templates.fit_for(chat)
