"""Ask: one question about videos, checked and typed, and how functions read their arguments."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict

import torch

from vtts_rt.checks import UNICODE, Rule, check, check_names, is_flag, is_number, is_whole
from vtts_rt.config import (
    QUANTIZATIONS,
    EngineConfig,
    MediaLimits,
    PerceptionConfig,
    ResolvedPerception,
    RuntimeConfig,
)
from vtts_rt.models.registry import DTYPES
from vtts_rt.perception.clue import Clue, clue_from_json
from vtts_rt.perception.layout import PROMPT_RULES
from vtts_rt.rounds.results import Answer, RoundEvent
from vtts_rt.types import DECODERS, Decoder, SamplingParams, require
from vtts_rt.video import FrameStore, VideoInput
from vtts_rt.video.open import OPENING_RULES, Times, check_range

Perception: TypeAlias = PerceptionConfig | ResolvedPerception
# A clue as JSON has it, see `perception.clue.clue_from_json`.
ClueInput: TypeAlias = Clue | Sequence[Sequence[float]] | Mapping[str, Sequence[Sequence[float]]]
Listener: TypeAlias = Callable[[RoundEvent], None]

# Seconds that every wait of the standard library takes: 31 years.
_MAX_SECONDS = 1e9


# What every function that asks takes first: an Ask, or the video(s) of one; and what `ask_batch`
# takes: the arguments of `ask` by name.
AskInput: TypeAlias = "Ask | VideoInput | Sequence[VideoInput]"
AskRequest: TypeAlias = "Ask | Mapping[str, object]"
Videos: TypeAlias = "VideoInput | Sequence[VideoInput] | None"


class OpeningOptions(TypedDict, total=False):
    """Keyword arguments with which a video is opened; see Ask."""

    source_fps: float | None
    timestamps_seconds: Times | Sequence[Times | None] | None
    start_seconds: float | None
    end_seconds: float | None
    allow_urls: bool
    decoder: Decoder | None
    device: int | None
    limits: MediaLimits | None


class AskOptions(OpeningOptions, total=False):
    """Keyword arguments of every function that asks; see Ask."""

    options: Sequence[str]
    context: str
    perception: Perception | None
    sampling: SamplingParams | None
    assume_clues: Sequence[ClueInput | None] | None
    timeout_seconds: float | None
    member: int | None


@dataclass(frozen=True, eq=False)
class Ask:
    """One question; what the fields leave to the runtime is decided there.

    videos: path, bytes, uint8 array (T, H, W, 3) with source_fps, image, open Video, or a list of
    these (kept as a tuple). question: not blank. options: texts to choose from, named A, B, ...
    context: subtitles or other long text. assume_clues: a clue per round that replaces the model's:
    `[[start, end], ...]` in seconds, or {"spans": ..., "boxes": ...} with boxes as fractions of the
    whole frame; rounds beyond the list use what the model says (kept as Clues).
    timeout_seconds: stop with what there is, counted from the call; TimeoutError before the videos
    are open. member: index in a rollout group, part of the noise; `sampling` is then a rollout's
    (`vtts_rt.sampling.rollout_sampling`). source_fps, timestamps_seconds: of an array (of a list
    of videos, a list of times or None). start_seconds, end_seconds: the part of the video that
    exists. allow_urls: videos may be URLs. decoder, device, limits: as `open_video`, None for those
    of the runtime. what: the function that messages name.
    BadRequest names the first argument that is not allowed.
    """

    videos: VideoInput | Sequence[VideoInput]
    question: str
    _: KW_ONLY
    options: Sequence[str] = ()
    context: str = ""
    perception: Perception | None = None
    sampling: SamplingParams | None = None
    assume_clues: Sequence[ClueInput | None] | None = None
    timeout_seconds: float | None = None
    member: int | None = None
    source_fps: float | None = None
    timestamps_seconds: Times | Sequence[Times | None] | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None
    allow_urls: bool = False
    decoder: Decoder | None = None
    device: int | None = None
    limits: MediaLimits | None = None
    what: InitVar[str] = "Ask"

    def __post_init__(self, what: str) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        videos = given.pop("videos")
        check(what, ASK_RULES, {"videos" if what == "Ask" else "video": videos, **given})
        texts = {name: given[name] for name in PROMPT_RULES}
        check(what, dict.fromkeys(texts, UNICODE), texts)
        check_range(what, self.start_seconds, self.end_seconds)
        times: Any = self.timestamps_seconds
        if not isinstance(videos, list | tuple):
            videos, times = (videos,), None if times is None else (times,)
        elif times is not None:
            ok = isinstance(times, list | tuple) and len(times) == len(videos)
            rule = f"a list of {len(videos)}, one entry a video"
            require(what, "timestamps_seconds", times, ok, rule)
        clues = self.assume_clues
        kept = {
            "videos": tuple(videos),
            "options": tuple(self.options),
            "timestamps_seconds": times,
            "assume_clues": None if clues is None else tuple(map(_clue, clues)),
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    @property
    def timed_videos(self) -> list[tuple[VideoInput, Times | None]]:
        """Each video with its own times, if it has any."""
        videos: Any = self.videos
        times: Any = self.timestamps_seconds or [None] * len(videos)
        return list(zip(videos, times, strict=True))

    @property
    def clues(self) -> tuple[Clue, ...] | None:
        """`assume_clues` as Clues."""
        kept: Any = self.assume_clues
        clues: tuple[Clue, ...] | None = kept
        return clues


def read_ask(
    function: str,
    video: AskInput,
    question: str,
    options: AskOptions,
) -> Ask:
    """The Ask of a call, given whole or by its arguments, as messages name the function.

    TypeError for a name that is unknown, and for arguments beside an Ask; BadRequest for a value.
    """
    check_names(function, options, _OPTIONS)
    if not isinstance(video, Ask):
        return Ask(video, question, **options, what=function)
    if question or options:
        raise TypeError(f"{function}: an Ask holds the question and its options: change it instead")
    return video


def read_requests(
    requests: Sequence[AskRequest], return_exceptions: bool
) -> list[tuple[Ask, Listener | None] | Exception]:
    """What `ask_batch` is to ask, with its `on_event`, or why it cannot be asked.

    TypeError or BadRequest where return_exceptions is False, for the first of them.
    """
    given = {"requests": requests, "return_exceptions": return_exceptions}
    check("ask_batch", CALL_RULES, given)
    read: list[tuple[Ask, Listener | None] | Exception] = []
    for index, request in enumerate(requests):
        try:
            read.append(_read_request(request, index))
        except (TypeError, ValueError) as error:
            if not return_exceptions:
                raise
            # Without the traceback, which holds this frame.
            read.append(error.with_traceback(None))
    return read


def _read_request(request: AskRequest, index: int) -> tuple[Ask, Listener | None]:
    if isinstance(request, Ask):
        return request, None
    ok = isinstance(request, Mapping)
    require("ask_batch", f"requests[{index}]", request, ok, "an Ask or a mapping of arguments")
    what, arguments = f"ask_batch requests[{index}]", dict(request)
    for name in ("video", "question"):
        if name not in request:
            raise TypeError(f"{what}: missing argument {name!r}")
    check_names(what, request, ["video", "question", "on_event", *_OPTIONS])
    listener: Any = arguments.pop("on_event", None)
    check(what, CALL_RULES, {"on_event": listener})
    video: Any = arguments.pop("video")
    question: Any = arguments.pop("question")
    options: Any = arguments
    return Ask(video, question, **options, what=what), listener


class Answerer(Protocol):
    """What answers questions in an event loop: a Runtime, or what stands in its place."""

    async def ask_async(self, ask: Ask, /) -> Answer: ...
    def stream_async(self, ask: Ask, /) -> AsyncGenerator[RoundEvent, None]: ...


def _clue(item: ClueInput | None) -> Clue:
    return item if isinstance(item, Clue) else clue_from_json(item)


def _are_clues(value: Any) -> bool:
    """ValueError for a clue of another shape."""
    return isinstance(value, list | tuple) and bool([_clue(item) for item in value] or 1)


def _none_or(kind: type[Any] | tuple[type[Any], ...], rule: str) -> Rule:
    return lambda value: value is None or isinstance(value, kind), f"{rule} or None"


COUNT: Rule = (lambda v: is_whole(v) and v >= 1, "a whole number >= 1")
SAMPLING = _none_or(SamplingParams, "a SamplingParams")
_VIDEOS: Rule = (
    lambda v: not isinstance(v, list | tuple) or len(v) > 0,
    "at least one video or image",
)
ASK_RULES: dict[str, Rule] = {
    "video": _VIDEOS,
    "videos": _VIDEOS,
    **PROMPT_RULES,
    "perception": _none_or((PerceptionConfig, ResolvedPerception), "a PerceptionConfig"),
    "sampling": SAMPLING,
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
    "decoder": (lambda v: v is None or v in DECODERS, f"one of {', '.join(DECODERS)} or None"),
}
# Of arguments beside those of an Ask.
CALL_RULES: dict[str, Rule] = {
    "requests": (
        lambda v: isinstance(v, Sequence) and not isinstance(v, str | bytes),
        "a list of requests",
    ),
    "return_exceptions": (is_flag, "True or False"),
    "on_event": (lambda v: v is None or callable(v), "a function or None"),
    "max_tokens": (lambda v: v is None or COUNT[0](v), f"{COUNT[1]} or None"),
    "perception": ASK_RULES["perception"],
    # Of a Runtime.
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
    "config": _none_or(RuntimeConfig, "a RuntimeConfig"),
    "frame_store": _none_or(FrameStore, "a FrameStore"),
    "tensors": (lambda v: isinstance(v, Mapping), "a mapping of names to tensors"),
    "finish": (is_flag, "True or False"),
    "in_flight": (("drain", "abort").__contains__, "drain or abort"),
}
_OPTIONS = [field.name for field in fields(Ask)][2:]
