"""Replies: the frames that a request gets, and the texts around them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from utils import resolved

from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.perception.clue import Clue, parse_clue
from vtts_rt.perception.dialect import DIALECTS, Reply
from vtts_rt.perception.layout import Turn
from vtts_rt.perception.plan import FramePlan, RoundHistory, View
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.region import RawRegion
from vtts_rt.perception.reply import most_of_reply, plan_reply, reply_turn
from vtts_rt.types import PixelBox, PromptPart, Segment, TimeLabel, TimeSpan, VideoMetadata

VIDEO = VideoMetadata("v", 300, 30.0, 10.0, 360, 640, "test")
IMAGE = VideoMetadata("i", 1, 1.0, 0.0, 360, 640, "test", is_image=True)
CONFIG = resolved(strategy="append")
WHOLE = View(0, PixelBox(0, 0, 640, 360), (336, 616), (TimeSpan(0, 10),), 1.0)
LONGVT, VIDEOZOOMER = DIALECTS["longvt"].reply, DIALECTS["videozoomer"].reply
assert LONGVT is not None and VIDEOZOOMER is not None


def plan(reply: Reply, clue: Clue, videos: tuple[VideoMetadata, ...] = (VIDEO,)) -> FramePlan:
    views = tuple(replace(WHOLE, video=video) for video in range(len(videos)))
    first = FramePlan(0, (), (), (), 2.0, views)
    return plan_reply(reply, CONFIG, videos, [RoundHistory(first, clue)], 1)


def said(reply: Reply, plan: FramePlan, *, is_last: bool) -> list[PromptPart]:
    templates = PromptTemplates(cue_look="MORE", cue_final="END")
    turn = Turn(CHAT, templates, "", plan, True, True, is_last, True)
    return reply_turn(reply, turn)


def asked(*regions: RawRegion) -> Clue:
    return Clue(spans=tuple(r.span for r in regions if r.span), regions=regions)


def shown(plan: FramePlan) -> list[int]:
    return [segment.pairs[0].frame_a for segment in plan.segments]


def test_frames_at_the_replys_density() -> None:
    found = plan(LONGVT, asked(RawRegion(span=(2, 5.5))))
    assert shown(found) == [60, 95, 130]  # three frames, spread over the span
    for segment in found.segments:
        (pair,) = segment.pairs
        assert segment.is_image and pair.frame_a == pair.frame_b
        assert pair.time_seconds == pytest.approx(pair.frame_a / 30)
        assert segment.resized_hw[0] * segment.resized_hw[1] <= 224 * 224
    assert found.sample_fps == pytest.approx(3 / 3.5)
    assert found.views[0].spans == (TimeSpan(2, 5.5),)
    assert len(found.regions) == 1 and not found.empty


def test_frames_at_the_density_asked_for() -> None:
    text = '<video_zoom> {"segment": [4.0, 6.0], "fps": 2} </video_zoom>'
    found = plan(VIDEOZOOMER, parse_clue(text, DIALECTS["videozoomer"]))
    assert shown(found) == [120, 135, 150, 165]
    many = plan(VIDEOZOOMER, asked(RawRegion(span=(0, 8), sample_fps=10)))
    assert shown(many) == list(range(0, 240, 15))
    assert many.notes == ("80 frames are asked for, 16 are shown",)
    counted = plan(VIDEOZOOMER, asked(RawRegion(span=(0, 8), num_frames=4)))
    assert shown(counted) == [0, 60, 120, 180]


def test_a_frame_comes_once_and_an_instant_is_one_frame() -> None:
    fine = plan(VIDEOZOOMER, asked(RawRegion(span=(1, 1.1), sample_fps=100)))
    assert shown(fine) == [30, 31, 32]  # what the source has
    both = plan(LONGVT, asked(RawRegion(span=(3, 3)), RawRegion(span=(2, 4))))
    assert shown(both) == [90, 60]  # in the order of the requests


def test_forced_spans_are_given_back_as_requests() -> None:
    assert shown(plan(LONGVT, Clue(spans=((2, 4), (8, 99))))) == [60, 90, 240, 270]
    boxed = plan(LONGVT, Clue(spans=((2, 4),), boxes=((0, 0, 0.5, 0.5),)))
    assert shown(boxed) == [60, 90] and "boxes in the clue are left out" in boxed.notes[0]


@pytest.mark.parametrize(
    "clue",
    [Clue(), asked(RawRegion(span=(20, 30))), asked(RawRegion(span=(5, 4))),
     asked(RawRegion(box=(0, 0, 1, 1))), asked(RawRegion(frames=(1, 2)))],
)  # fmt: skip
def test_nothing_to_show(clue: Clue) -> None:
    found = plan(LONGVT, clue)
    assert found.empty and found.views == (WHOLE,)
    assert found.notes == ("video 0: no usable time span in the clue",)


def test_images_are_not_shown_again() -> None:
    found = plan(LONGVT, asked(RawRegion(span=(2, 4))), (IMAGE, VIDEO))
    assert {segment.pairs[0].video for segment in found.segments} == {1}


def test_frames_as_video() -> None:
    reply = replace(VIDEOZOOMER, as_images=False)
    found = plan(reply, asked(RawRegion(span=(4, 6.5), sample_fps=2)))
    pairs = [(p.frame_a, p.frame_b) for segment in found.segments for p in segment.pairs]
    assert pairs == [(120, 135), (150, 165), (180, 180)]
    assert not any(segment.is_image for segment in found.segments)


def test_texts_around_the_frames() -> None:
    found = plan(VIDEOZOOMER, asked(RawRegion(span=(4, 6), sample_fps=1)))
    first, second = found.segments
    assert said(VIDEOZOOMER, found, is_last=False) == [
        "<tool_response>\n",
        TimeLabel("<frame0_time4.00s>"),
        first,
        TimeLabel("<frame1_time5.00s>"),
        second,
        "\n</tool_response>MORE",
    ]
    framed = DIALECTS["framethinker"].reply
    assert framed is not None
    assert [p for p in said(framed, found, is_last=True) if not isinstance(p, Segment)] == [
        "",
        TimeLabel("frame 120:"),
        TimeLabel("frame 150:"),
        "END",
    ]


def test_frames_of_several_videos_stand_under_headings() -> None:
    clue = asked(RawRegion(span=(2, 4)))
    for reply, label in ((LONGVT, False), (VIDEOZOOMER, True)):
        found = plan(reply, clue, (VIDEO, IMAGE, replace(VIDEO, video_id="w")))
        parts = said(reply, found, is_last=False)
        texts = [part for part in parts if isinstance(part, str)]
        assert texts == ["<tool_response>\n", "Video 1:\n", "Video 3:\n", "\n</tool_response>MORE"]
        labels = [part.text for part in parts if isinstance(part, TimeLabel)]
        times = ["2.00", "3.00", "2.00", "3.00"]
        named = [f"<frame{i}_time{time}s>" for i, time in enumerate(times)]
        assert labels == (named if label else [])


def test_the_longest_reply_is_as_long_as_one_to_a_request_for_all() -> None:
    for reply in (LONGVT, VIDEOZOOMER, replace(VIDEOZOOMER, as_images=False)):
        for videos in (
            (VIDEO,),
            (VIDEO, IMAGE),
            (VIDEO, replace(VIDEO, num_frames=5, source_fps=0.5)),
        ):
            asks = asked(RawRegion(span=(0, 10), num_frames=100_000))
            found = plan(reply, asks, videos)
            frames = sum(len({*segment.frame_indices}) for segment in found.segments)
            tokens = sum(segment.num_tokens for segment in found.segments)
            assert most_of_reply(reply, CONFIG, videos) == (frames, tokens)
