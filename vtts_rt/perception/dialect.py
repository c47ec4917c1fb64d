"""Dialects: how a model writes that it wants another look, and how the look is given back.

A dialect is one frozen object, `DIALECTS` the table of them, and the only place where a tag or the
name of a tool is spelt; one scanner reads them all (clue.py, calls.py). Formats are those of the
published models that `models` names; all wording is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vtts_rt.perception.chat import BoxUnit

# text: kept as it stands. numbers: spans and boxes in any notation (glue.py). json: calls. code:
# calls in Python's notation. phrase: one of the dialect's phrases. field: a part of a region, in
# running text.
Holds = Literal["text", "numbers", "json", "code", "phrase", "field"]
# fresh: a new prompt that knows nothing of earlier answers. append: a further turn. splice: frames
# go into the answer that is being written. subcontext: each look is answered by itself, and only
# that text comes back. none: the model never looks again.
Continuation = Literal["fresh", "append", "splice", "subcontext", "none"]


@dataclass(frozen=True, slots=True)
class Tag:
    """A pair of tags. field: of a `field` tag, the argument that stands in it (calls.py)."""

    name: str
    holds: Holds = "text"
    field: str = ""

    @property
    def opening(self) -> str:
        return f"<{self.name}>"

    @property
    def closing(self) -> str:
        return f"</{self.name}>"

    def around(self, text: str) -> str:
        return self.opening + text + self.closing


@dataclass(frozen=True, slots=True)
class Call:
    """A tool. name: "" where the object holds the arguments alone. arguments: name as written ->
    argument (calls.py); what is not named here, such as the path of a video, is not read."""

    name: str
    arguments: Mapping[str, str]
    box_unit: BoxUnit = "px"


@dataclass(frozen=True, slots=True)
class Reply:
    """How a look is given back.

    role: who gives it; "tool" is written as a user's turn, between the tags of a tool's response.
    frame_label: text before each frame, with {number} of the frame in the reply from 0, {index} of
    the source frame, {seconds}. as_images: each frame is an image, else two are a pair of a video.
    sample_fps, max_frames: density where a request says none, and most frames of one.
    max_frame_px: most pixels of a frame, 0: as the run says.
    """

    role: Literal["user", "tool"] = "user"
    frame_label: str = ""
    as_images: bool = True
    sample_fps: float = 1.0
    max_frames: int = 8
    max_frame_px: int = 0

    @property
    def around(self) -> tuple[str, str]:
        """The texts before and after all frames."""
        if self.role == "user":
            return "", ""
        return f"{_TOOL_RESPONSE.opening}\n", f"\n{_TOOL_RESPONSE.closing}"


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """One way of asking for a look and of getting it.

    models: who writes so. tags: all that are read. calls: tools in `json` and `code` tags. phrases:
    patterns whose named groups are arguments, or the answer. max_calls: requests of one turn that
    count, the first ones. stop: texts that end a turn, kept out of its text. continuations: how
    rounds may go on, the usual way first; config.DIALECTS names the dialects whose rounds run here.
    reply: None where a round shows what its strategy says. wording: fields of PromptTemplates that
    tell a model how to ask.
    """

    name: str
    models: str
    tags: tuple[Tag, ...]
    continuations: tuple[Continuation, ...]
    calls: tuple[Call, ...] = ()
    phrases: tuple[str, ...] = ()
    max_calls: int = 1
    stop: tuple[str, ...] = ()
    reply: Reply | None = None
    wording: Mapping[str, str] = field(default_factory=dict)

    @property
    def request(self) -> Tag:
        """The tag in which a look is asked for."""
        return next(tag for tag in self.tags if tag.holds != "text")


_THINK, _ANSWER = Tag("think"), Tag("answer")
_TOOL_CALL = Tag("tool_call", "json")
_SECONDS = {"start_time": "start", "end_time": "end"}
_VIDEO_ZOOM = Tag("video_zoom", "json")
_TOOL_RESPONSE = Tag("tool_response")

R1_5 = Dialect(
    name="r1.5",
    models="VideoChat-R1.5, the embedded model",
    tags=(_THINK, _ANSWER, Tag("glue", "numbers")),
    continuations=("fresh", "append"),
)
# The tags of `r1.5`: name -> opening and closing one.
TAGS: Mapping[str, tuple[str, str]] = {tag.name: (tag.opening, tag.closing) for tag in R1_5.tags}


def tagged(name: str, text: str) -> str:
    """`text` between two tags of `r1.5`."""
    return next(tag for tag in R1_5.tags if tag.name == name).around(text)


def _wording(request: str) -> dict[str, str]:
    """How a model is told to ask, by an example of a request, in turns that go on."""
    answer = _ANSWER.around("")
    return {
        "task": "Think about what the video shows and write your reasoning in "
        f"{_THINK.around('')}. If a part of the video has to be seen again more "
        f"closely, end with a request for it, in seconds, such as {request}: its frames follow. "
        f"Once you are sure, write your answer in {answer} (for a question with options, the "
        "letter alone).\n",
        "cue_look": "",
        "cue_final": f"\nThis was the last look. Write your answer in {answer}.",
    }


_ALL = (
    R1_5,
    Dialect(
        name="longvt",
        models="LongVT",
        tags=(_THINK, _ANSWER, _TOOL_CALL),
        calls=(Call("crop_video", _SECONDS),),
        continuations=("append",),
        reply=Reply("tool", max_frames=128, max_frame_px=224 * 224),
        wording=_wording(
            _TOOL_CALL.around(
                '{"name": "crop_video", "arguments": {"start_time": 3.0, "end_time": 5.5}}'
            )
        ),
    ),
    Dialect(
        name="paravt",
        models="ParaVT",
        tags=(_THINK, _ANSWER, _TOOL_CALL, Tag("tool_code", "code")),
        calls=(Call("crop_video", {**_SECONDS, "start": "start", "end": "end", "task": "query"}),),
        max_calls=5,
        continuations=("subcontext",),
        reply=Reply("tool", max_frames=16),
    ),
    Dialect(
        name="video-zoom-in",
        models="models with a tool video_zoom_in_tool",
        tags=(_THINK, _ANSWER, _TOOL_CALL),
        calls=(Call("video_zoom_in_tool", _SECONDS),),
        continuations=("append",),
        reply=Reply("tool"),
    ),
    Dialect(
        name="videozoomer",
        models="VideoZoomer",
        tags=(_THINK, _ANSWER, _VIDEO_ZOOM),
        calls=(Call("", {"segment": "span", "fps": "sample_fps"}),),
        stop=(_VIDEO_ZOOM.closing,),
        continuations=("append",),
        reply=Reply(
            "tool",
            frame_label="<frame{number}_time{seconds:.2f}s>",
            max_frames=16,
        ),
        wording=_wording(_VIDEO_ZOOM.around('{"segment": [3.0, 5.5], "fps": 2}')),
    ),
    Dialect(
        name="timesearch-r",
        models="TimeSearch-R; its queries need scores of frames by text",
        tags=(_THINK, _ANSWER, _TOOL_CALL),
        calls=(
            Call("seek_video_frames", {**_SECONDS, "query": "query", "num_frames": "num_frames"}),
        ),
        continuations=("append",),
        reply=Reply("tool"),
    ),
    Dialect(
        name="conan",
        models="Conan",
        tags=(Tag("score"), _THINK, Tag("clip", "numbers"), _ANSWER),
        continuations=("append",),
        reply=Reply(),
    ),
    Dialect(
        name="framethinker",
        models="FrameThinker",
        tags=(_THINK, Tag("action", "phrase")),
        phrases=(
            r"choose frames between (?P<first>[\d.]+) and (?P<last>[\d.]+)",
            r"get frame number at time (?P<frame_number_at>[\d:.]+)",
            r"output answer ?: ?(?P<answer>.*)",
        ),
        continuations=("append",),
        reply=Reply(frame_label="frame {index}:", max_frames=12),
    ),
    Dialect(
        name="pixel-reasoner",
        models="Pixel-Reasoner",
        tags=(_THINK, _ANSWER, _TOOL_CALL),
        calls=(
            Call("select_frames", {"target_frames": "ordinals"}),
            Call(
                "crop_image_normalized",
                {"bbox_2d": "box", "target_image": "view_number"},
                box_unit="fraction",
            ),
        ),
        continuations=("append",),
        reply=Reply("tool"),
    ),
    Dialect(
        name="deepeyes",
        models="DeepEyes",
        tags=(_THINK, _ANSWER, _TOOL_CALL),
        calls=(Call("image_zoom_in_tool", {"bbox_2d": "box", "label": "label"}),),
        continuations=("append",),
        reply=Reply("tool", max_frames=1),
    ),
    Dialect(
        name="mini-o3",
        models="Mini-o3",
        tags=(_THINK, _ANSWER, Tag("grounding", "json")),
        calls=(Call("", {"bbox_2d": "box", "source": "view_name"}, box_unit="fraction"),),
        continuations=("append",),
        reply=Reply(max_frames=1),
    ),
    Dialect(
        name="dynframe",
        models="DynFrame",
        tags=(_THINK, _ANSWER, Tag("span", "field", "span"), Tag("fps", "field", "sample_fps")),
        max_calls=64,
        continuations=("splice",),
        reply=Reply(as_images=False),
    ),
    Dialect(
        name="ego-r1",
        models="Ego-R1",
        tags=(_THINK, _ANSWER, Tag("tool", "json")),
        calls=(Call("video_llm", {"question": "query", "range": "day_range"}),),
        continuations=("subcontext",),
    ),
    Dialect(
        name="open-o3-video",
        models="Open-o3-Video",
        tags=(
            *(_THINK, _ANSWER, Tag("obj", "field", "label")),
            *(Tag("box", "field", "box"), Tag("t", "field", "time")),
        ),
        max_calls=64,
        continuations=("none",),
    ),
    Dialect(
        name="video-thinker",
        models="Video-Thinker",
        tags=(_THINK, _ANSWER, Tag("time", "numbers"), Tag("caption")),
        continuations=("none",),
    ),
)
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in _ALL}
