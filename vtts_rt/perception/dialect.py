"""Dialects: how a model writes that it wants another look, and how the look is given back.

A dialect is one frozen object, `DIALECTS` the table of them, and the only place where a tag or the
name of a tool is spelt; one scanner reads them all (clue.py, calls.py). How its rounds go on stands
in `config.DIALECTS`. Formats are those of the published models that `models` names; all wording is
ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vtts_rt.perception.chat import BoxUnit

# text: kept as it stands. numbers: spans and boxes in any notation (glue.py). json: calls. code:
# calls in Python's notation. phrase: one of the dialect's phrases. field: a part of a region, in
# running text.
Holds = Literal["text", "numbers", "json", "code", "phrase", "field"]


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


_THINK, _ANSWER = Tag("think"), Tag("answer")
_TOOL_CALL, _TOOL_RESPONSE = Tag("tool_call", "json"), Tag("tool_response")
_ACTION, _VIDEO_ZOOM = Tag("action", "phrase"), Tag("video_zoom", "json")


@dataclass(frozen=True, slots=True)
class Call:
    """A tool. name: "" where the object holds the arguments alone. arguments: name as written ->
    argument (calls.py); what is not named here, such as the path of a video, is not read. box_unit,
    view: of a box, where the arguments say none (RawRegion)."""

    name: str
    arguments: Mapping[str, str]
    box_unit: BoxUnit | None = None
    view: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """How a look is given back.

    role: who gives it; "tool" is written as a user's turn, between the tags of a tool's response.
    frame_label: text before each frame, with {number} of the frame in the reply from 0, {index} of
    the source frame, {seconds}. as_images: each frame is an image, else two are a pair of a video.
    sample_fps, max_frames: density where a request says none (0: always max_frames), and most
    frames of one. only_new: frames that were shown before are left out.
    max_frame_px: most pixels of a frame, 0: as the run says.
    """

    role: Literal["user", "tool"] = "user"
    frame_label: str = ""
    as_images: bool = True
    sample_fps: float = 1.0
    max_frames: int = 8
    max_frame_px: int = 0
    only_new: bool = False

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
    count, the first ones. stop: texts that end a turn, kept out of its text.
    reply: None where a round shows what its strategy says. examples: requests without their tags,
    and place: in what terms they say where to look, both told to the model; answer_form: where its
    answer goes. time_label: as in PromptTemplates, None for that of the chat format.
    """

    name: str
    models: str
    tags: tuple[Tag, ...] = (_THINK, _ANSWER, _TOOL_CALL)
    calls: tuple[Call, ...] = ()
    phrases: tuple[str, ...] = ()
    max_calls: int = 1
    stop: tuple[str, ...] = ()
    reply: Reply | None = None
    examples: tuple[str, ...] = ()
    place: str = "in seconds"
    answer_form: str = _ANSWER.around("")
    time_label: str | None = None

    @property
    def request(self) -> Tag:
        """The tag in which a look is asked for."""
        return next(tag for tag in self.tags if tag.holds != "text")

    @property
    def wording(self) -> dict[str, str | None]:
        """Fields of PromptTemplates that tell a model how to ask, in turns that go on."""
        if not self.examples:
            return {}
        requests = " or ".join(map(self.request.around, self.examples))
        return {
            "task": "Think about what you see and write your reasoning in "
            f"{_THINK.around('')}. If a part of it has to be seen again more closely, end with a "
            f"request for it, {self.place}, such as {requests}: its frames follow. "
            f"Once you are sure, write your answer in {self.answer_form} (for a question with "
            "options, the letter alone).\n",
            "cue_look": "",
            "cue_final": f"\nThis was the last look. Write your answer in {self.answer_form}.",
            "time_label": self.time_label,
        }


_SECONDS = {"start_time": "start", "end_time": "end"}

R1_5 = Dialect(
    name="r1.5",
    models="VideoChat-R1.5, the embedded model",
    tags=(_THINK, _ANSWER, Tag("glue", "numbers")),
)
# The tags of `r1.5`: name -> opening and closing one.
TAGS: Mapping[str, tuple[str, str]] = {tag.name: (tag.opening, tag.closing) for tag in R1_5.tags}


def tagged(name: str, text: str) -> str:
    """`text` between two tags of `r1.5`."""
    return next(tag for tag in R1_5.tags if tag.name == name).around(text)


_ALL = (
    R1_5,
    Dialect(
        name="longvt",
        models="LongVT",
        calls=(Call("crop_video", _SECONDS),),
        reply=Reply("tool", max_frames=128, max_frame_px=224 * 224),
        examples=('{"name": "crop_video", "arguments": {"start_time": 3.0, "end_time": 5.5}}',),
    ),
    Dialect(
        name="paravt",
        models="ParaVT",
        tags=(_THINK, _ANSWER, _TOOL_CALL, Tag("tool_code", "code")),
        calls=(Call("crop_video", {**_SECONDS, "start": "start", "end": "end", "task": "query"}),),
        max_calls=5,
        reply=Reply("tool", max_frames=16),
    ),
    Dialect(
        name="video-zoom-in",
        models="models with a tool video_zoom_in_tool",
        calls=(Call("video_zoom_in_tool", _SECONDS),),
        reply=Reply("tool"),
        examples=(
            '{"name": "video_zoom_in_tool", "arguments": {"start_time": 3.0, "end_time": 5.5}}',
        ),
    ),
    Dialect(
        name="videozoomer",
        models="VideoZoomer",
        tags=(_THINK, _ANSWER, _VIDEO_ZOOM),
        calls=(Call("", {"segment": "span", "fps": "sample_fps"}),),
        stop=(_VIDEO_ZOOM.closing,),
        reply=Reply(
            "tool",
            frame_label="<frame{number}_time{seconds:.2f}s>",
            max_frames=16,
        ),
        examples=('{"segment": [3.0, 5.5], "fps": 2}',),
    ),
    Dialect(
        name="timesearch-r",
        models="TimeSearch-R",
        calls=(
            Call("seek_video_frames", {**_SECONDS, "query": "query", "num_frames": "num_frames"}),
        ),
        reply=Reply("tool"),
        examples=(
            '{"name": "seek_video_frames", "arguments": {"query": "a red card", "start_time": 3.0, '
            '"end_time": 5.5, "num_frames": 4}}',
        ),
    ),
    Dialect(
        name="conan",
        models="Conan",
        tags=(Tag("score"), _THINK, Tag("clip", "numbers"), _ANSWER),
        reply=Reply(sample_fps=0.0, only_new=True),
        examples=("00:00:03-00:00:05",),
        place="in clock time",
    ),
    Dialect(
        name="framethinker",
        models="FrameThinker",
        tags=(_THINK, _ACTION),
        phrases=(
            r"choose frames between (?P<first>[\d.]+) and (?P<last>[\d.]+)",
            r"get frame number at time (?P<frame_number_at>[\d:.]+)",
            r"output answer ?: ?(?P<answer>.*)",
        ),
        reply=Reply(frame_label="frame {index}:", sample_fps=0.0, max_frames=12),
        examples=("choose frames between 24 and 48", "get frame number at time 00:03"),
        place="by the numbers of its frames",
        answer_form=_ACTION.around("output answer: "),
        time_label="frame {index}:",
    ),
    Dialect(
        name="pixel-reasoner",
        models="Pixel-Reasoner",
        calls=(
            Call("select_frames", {"target_frames": "ordinals"}),
            Call(
                "crop_image_normalized",
                {"bbox_2d": "box", "target_image": "view_number"},
                box_unit="fraction",
            ),
        ),
        reply=Reply("tool"),
        examples=(
            '{"name": "select_frames", "arguments": {"target_frames": [3, 5]}}',
            '{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.1, 0.2, 0.5, 0.6], '
            '"target_image": 1}}',
        ),
        place="by the numbers of the frames that you were shown, from 1, or by a box in fractions "
        "of an image",
    ),
    Dialect(
        name="deepeyes",
        models="DeepEyes",
        calls=(Call("image_zoom_in_tool", {"bbox_2d": "box", "label": "label"}, view=0),),
        reply=Reply("tool", max_frames=1),
        examples=('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 100, 200]}}',),
        place="by a box in the image",
    ),
    Dialect(
        name="mini-o3",
        models="Mini-o3",
        tags=(_THINK, _ANSWER, Tag("grounding", "json")),
        calls=(Call("", {"bbox_2d": "box", "source": "view_name"}, box_unit="fraction"),),
        reply=Reply(max_frames=1),
        examples=('{"bbox_2d": [0.1, 0.2, 0.5, 0.6], "source": "original_image"}',),
        place="by a box in fractions of an image that you were shown",
    ),
    Dialect(
        name="dynframe",
        models="DynFrame",
        tags=(_THINK, _ANSWER, Tag("span", "field", "span"), Tag("fps", "field", "sample_fps")),
        max_calls=64,
        reply=Reply(as_images=False),
    ),
    Dialect(
        name="ego-r1",
        models="Ego-R1",
        tags=(_THINK, _ANSWER, Tag("tool", "json")),
        calls=(Call("video_llm", {"question": "query", "range": "day_range"}),),
    ),
    Dialect(
        name="open-o3-video",
        models="Open-o3-Video",
        tags=(
            *(_THINK, _ANSWER, Tag("obj", "field", "label")),
            *(Tag("box", "field", "box"), Tag("t", "field", "time")),
        ),
        max_calls=64,
    ),
    Dialect(
        name="video-thinker",
        models="Video-Thinker",
        tags=(_THINK, _ANSWER, Tag("time", "numbers"), Tag("caption")),
    ),
)
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in _ALL}
