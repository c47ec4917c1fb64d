"""What the public functions of a Runtime take, checked before anything is opened or loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtts_rt.checks import UNICODE, Rule, check, check_names, is_flag, is_number, is_whole
from vtts_rt.config import QUANTIZATIONS, EngineConfig, PerceptionConfig, ResolvedPerception
from vtts_rt.models.qwen2_5_vl import DTYPES
from vtts_rt.perception.clue import clue_from_json
from vtts_rt.perception.layout import PROMPT_RULES
from vtts_rt.types import Prompt, SamplingParams, TimeLabel, require
from vtts_rt.video import FrameStore
from vtts_rt.video.open import OPENING_RULES, check_range

# Seconds that every wait of the standard library takes: 31 years.
_MAX_SECONDS = 1e9


def _none_or(kind: type[Any] | tuple[type[Any], ...], rule: str) -> Rule:
    return lambda value: value is None or isinstance(value, kind), f"{rule} or None"


def _are_clues(value: Any) -> bool:
    """ValueError for a clue of another shape."""
    return isinstance(value, list | tuple) and bool([clue_from_json(item) for item in value] or 1)


def _is_prompt(value: Any) -> bool:
    parts = value.parts if isinstance(value, Prompt) else (value,)
    return all(isinstance(part, str | TimeLabel) for part in parts)


def _text_of(prompt: Prompt) -> str:
    texts = (part for part in prompt.parts if isinstance(part, str | TimeLabel))
    return "".join(part.text if isinstance(part, TimeLabel) else part for part in texts)


_MODES = ("drain", "abort")
_FLAG: Rule = (is_flag, "True or False")
_COUNT: Rule = (lambda v: is_whole(v) and v >= 1, "a whole number >= 1")
_SAMPLING = _none_or(SamplingParams, "a SamplingParams")
_PERCEPTION = _none_or((PerceptionConfig, ResolvedPerception), "a PerceptionConfig")
_PROMPT: Rule = (_is_prompt, "text only, or a Prompt of text, without vision segments (use ask)")

_STREAM: dict[str, Rule] = {
    "video": (
        lambda v: not isinstance(v, list | tuple) or len(v) > 0,
        "at least one video or image",
    ),
    **PROMPT_RULES,
    "perception": _PERCEPTION,
    "sampling": _SAMPLING,
    "assume_clues": (
        lambda v: v is None or _are_clues(v),
        "None or a list with a clue a round, [[start, end], ...] in seconds or "
        '{"spans": ..., "boxes": [[x0, y0, x1, y1], ...]} with boxes in [0, 1], at most 64 each',
    ),
    "timeout_seconds": (
        lambda v: v is None or (is_number(v) and 0.0 < v <= _MAX_SECONDS),
        "> 0 seconds, at most 1e9, or None",
    ),
    "member": (
        lambda v: v is None or (is_whole(v) and 0 <= v < 2**63),
        "a whole number in [0, 2**63) or None",
    ),
    "timestamps_seconds": (
        lambda v: v is None or (not isinstance(v, str | bytes) and len(v) >= 0),
        "a list of times or None",
    ),
    **{name: rule for name, rule in OPENING_RULES.items() if name != "deadline_seconds"},
}
_ASK = {**_STREAM, "on_event": (lambda v: v is None or callable(v), "a function or None")}
_GROUP = {name: rule for name, rule in _ASK.items() if name != "member"}

# Function -> what it takes.
RULES: dict[str, dict[str, Rule]] = {
    "ask": _ASK,
    "stream": _STREAM,
    "ask_async": _STREAM,
    "stream_async": _STREAM,
    "ask_batch": {
        "requests": (
            lambda v: isinstance(v, Sequence) and not isinstance(v, str | bytes),
            "a list of requests",
        ),
        "return_exceptions": _FLAG,
    },
    "ask_group": {**_GROUP, "num_answers": _COUNT, "return_exceptions": _FLAG},
    "plan": {
        **{name: _STREAM[name] for name in ("video", *PROMPT_RULES, "perception")},
        "max_tokens": (lambda v: v is None or _COUNT[0](v), f"{_COUNT[1]} or None"),
        "timestamps_seconds": _STREAM["timestamps_seconds"],
        **OPENING_RULES,
    },
    "perception": {"perception": _PERCEPTION},
    "generate": {"prompt": _PROMPT, "sampling": _SAMPLING},
    "score": {
        "prompt": _PROMPT,
        "token_ids": (
            lambda v: not isinstance(v, Mapping) and all(is_whole(i) and i >= 0 for i in v),
            "a list of token ids",
        ),
    },
    "update_weights": {
        "tensors": (lambda v: isinstance(v, Mapping), "a mapping of names to tensors"),
        "finish": _FLAG,
        "in_flight": (_MODES.__contains__, "drain or abort"),
    },
    "Runtime": {
        "model": (
            lambda v: isinstance(v, str | Path) and str(v) != "",
            "'tiny', a directory or a hub id",
        ),
        "dtype": (
            lambda v: v == "auto" or v in DTYPES or v in DTYPES.values(),
            f"'auto' or one of {', '.join(DTYPES)}",
        ),
        "device": (lambda v: isinstance(v, str | torch.device), "auto, cpu or cuda[:n]"),
        "quantization": (
            lambda v: v is None or v in QUANTIZATIONS,
            f"None or one of {', '.join(QUANTIZATIONS)}",
        ),
        "engine": _none_or(EngineConfig, "an EngineConfig"),
        "frame_store": _none_or(FrameStore, "a FrameStore"),
    },
}
_TEXTS = (*PROMPT_RULES, "prompt")


def check_call(function: str, given: Mapping[str, Any], what: str = "") -> None:
    """Check the arguments of one call, by name.

    function: of RULES. what: what messages begin with, by default the function. TypeError for a
    name that it does not take, ValueError for a value.
    """
    what, rules = what or function, RULES[function]
    check_names(what, given, rules)
    check(what, rules, given)
    texts = {
        name: _text_of(value) if isinstance(value, Prompt) else value
        for name, value in given.items()
        if name in _TEXTS
    }
    check(what, dict.fromkeys(_TEXTS, UNICODE), texts)
    check_range(what, given.get("start_seconds"), given.get("end_seconds"))
    video, times = given.get("video"), given.get("timestamps_seconds")
    if isinstance(video, list | tuple) and times is not None:
        ok = isinstance(times, list | tuple) and len(times) == len(video)
        require(what, "timestamps_seconds", times, ok, f"a list of {len(video)}, one entry a video")


def check_requests(
    requests: Sequence[Mapping[str, Any]], return_exceptions: bool
) -> dict[int, Exception]:
    """Check the arguments of `ask_batch`: by index, the errors of requests that cannot be asked.

    TypeError or ValueError where return_exceptions is False, for the first of them.
    """
    check_call("ask_batch", {"requests": requests, "return_exceptions": return_exceptions})
    refused: dict[int, Exception] = {}
    for index, request in enumerate(requests):
        what = f"ask_batch requests[{index}]"
        try:
            ok = isinstance(request, Mapping)
            require("ask_batch", f"requests[{index}]", request, ok, "a mapping of arguments")
            for name in ("video", "question"):
                if name not in request:
                    raise TypeError(f"{what}: missing argument {name!r}")
            check_call("ask", request, what)
        except (TypeError, ValueError) as error:
            if not return_exceptions:
                raise
            # Without the traceback, which holds this frame.
            refused[index] = error.with_traceback(None)
    return refused
