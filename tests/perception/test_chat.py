"""Chat formats: turns and markers as a family writes them, and texts without control tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from utils import resolved

from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.perception.chat import ChatFormat, Message
from vtts_rt.perception.clue import parse_clue
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.strategy import plan_round
from vtts_rt.types import Box, PairRef, PixelBox, Segment, TimeLabel, TimeSpan, VideoMetadata

PACKAGE = Path(__file__).resolve().parents[2] / "vtts_rt"
# A format that shares nothing with Qwen's.
OTHER = ChatFormat(
    turn_open="[@{role}]",
    turn_close="[@/]~",
    end_of_turn="[@/]",
    vision_start="[@v]",
    vision_end="[@/v]",
    image_pad="[@i]",
    video_pad="[@m]",
    control="[@",
    time_label="at {seconds}",
)
VIDEO = Segment((PairRef(0, "v", 0, 1, 0.0),), PixelBox(0, 0, 56, 56), (56, 56), GEOMETRY)
IMAGE = replace(VIDEO, is_image=True)
FORMATS = pytest.mark.parametrize("chat", [CHAT, OTHER], ids=["qwen", "other"])


def test_turns_and_markers() -> None:
    messages = [
        Message("system", ("S",)),
        Message("user", ("a", "b", TimeLabel("<1s>"), VIDEO, IMAGE, "", "c")),
        Message("assistant", ("d",)),
    ]
    prompt = CHAT.render(messages)
    assert CHAT.text(prompt) == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nab<1s><|vision_start|><|video_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|>c<|im_end|>\n"
        "<|im_start|>assistant\nd<|im_end|>\n<|im_start|>assistant\n"
    )
    # A text between two segments is one run, markers of turns included.
    assert [type(part) for part in prompt.parts] == [str, TimeLabel, Segment, Segment, str]
    assert OTHER.text(OTHER.render([Message("user", (IMAGE, "q"))])) == (
        "[@user][@v][@i][@/v]q[@/]~[@assistant]"
    )


@FORMATS
def test_a_prompt_may_go_on_behind_an_answer(chat: ChatFormat) -> None:
    message = Message("user", ("more",))
    fresh = chat.text(chat.render([message], system=""))
    assert chat.text(chat.render([message], goes_on=True)) == chat.turn_close + fresh


@FORMATS
@given(data=st.data())
def test_no_text_holds_a_control_token(chat: ChatFormat, data: st.DataObject) -> None:
    """However a token is cut into parts: `<` may be of the user, `|im_end|>` of the wording."""
    pieces = [*chat.control, chat.control, chat.end_of_turn, "|im_end|>", "@/]", "x"]
    texts = data.draw(st.lists(st.lists(st.sampled_from(pieces)).map("".join), max_size=5))
    parts = [TimeLabel(t) if t.startswith("x") else t for t in texts]
    shown = chat.text(chat.render([Message("user", (*parts, VIDEO))]))
    own = chat.text(chat.render([Message("user", (VIDEO,))]))
    assert shown.count(chat.control) == own.count(chat.control)
    assert shown.count(chat.end_of_turn) == own.count(chat.end_of_turn)
    assert shown.count(chat.video_pad) == 1


def test_boxes_are_read_in_the_unit_of_the_family() -> None:
    still = VideoMetadata("i", 1, 1.0, 0.0, 600, 1200, "image", is_image=True)
    plan = plan_round("append", resolved(), [still], [], 0)
    clue = parse_clue("<glue>[50, 100, 100, 150]</glue>")
    looks = [RoundHistory(plan, clue), RoundHistory(plan, clue, box_unit="thousandth")]
    height, width = plan.resized_hw
    assert [look.boxes(0, still) for look in looks] == [
        [Box(*map(pytest.approx, (50 / width, 100 / height, 100 / width, 150 / height)))],
        [Box(*map(pytest.approx, (0.05, 0.1, 0.1, 0.15)))],
    ]
    (region,) = looks[1].regions([still])
    assert (region.box, region.span) == (looks[1].boxes(0, still)[0], TimeSpan(0.0, 0.0))


def test_token_strings_stand_in_the_folder_of_their_family() -> None:
    token = re.compile(r"<\|[a-z_0-9]+\|>")
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if token.search(path.read_text())
    ]
    own = ("models/qwen2_5_vl/", "bench/")
    assert found and not [name for name in found if not name.startswith(own)]
