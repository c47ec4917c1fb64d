"""Replies: the frames that a request gets, and the texts around them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from utils import resolved

from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.perception.chat import BoxUnit
from vtts_rt.perception.clue import Clue, parse_clue
from vtts_rt.perception.dialect import DIALECTS, Reply
from vtts_rt.perception.layout import Turn
from vtts_rt.perception.plan import FramePlan, RoundHistory, View
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.region import RawBox, RawRegion
from vtts_rt.perception.reply import most_of_reply, plan_reply, reply_turn
from vtts_rt.perception.strategy import plan_round
from vtts_rt.types import (
    FULL_BOX,
    Box,
    PixelBox,
    PromptPart,
    Region,
    Segment,
    TimeLabel,
    TimeSpan,
    VideoMetadata,
)

VIDEO = VideoMetadata("v", 300, 30.0, 10.0, 360, 640, "test")
IMAGE = VideoMetadata("i", 1, 1.0, 0.0, 360, 640, "test", is_image=True)
CONFIG = resolved(strategy="append")
WHOLE = View(0, PixelBox(0, 0, 640, 360), (336, 616), (TimeSpan(0, 10),), 1.0)
LONGVT, VIDEOZOOMER = DIALECTS["longvt"].reply, DIALECTS["videozoomer"].reply
ONE = Reply(max_frames=1)
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
    first = FramePlan(0, (), (), (), 2.0, (WHOLE,))
    boxed = Clue(spans=((2, 4),), boxes=((0, 0, 0.5, 0.5),))
    found = plan_reply(LONGVT, CONFIG, [VIDEO], [RoundHistory(first, boxed, forced=True)], 1)
    assert shown(found) == [60, 90]
    assert {segment.box for segment in found.segments} == {PixelBox(0, 0, 320, 180)}


@pytest.mark.parametrize(
    "clue",
    [Clue(), *(asked(RawRegion(**raw)) for raw in (  # type: ignore[arg-type]
        {"span": (20, 30)}, {"span": (5, 4)}, {"box": (5, 5, 5, 9)}, {"frames": (300, 310)},
        {"frames": (9, 3)}, {"ordinals": (0, 1, 9)}, {"frame_number_at_seconds": 10.0},
        {"day_range": ("DAY1_1", "DAY1_2")}, {"box": (0, 0, 9, 9), "view": 1},
        {"span": (2, 4), "box": (9, 9, 9, 9)},
    ))],
)  # fmt: skip
def test_nothing_to_show(clue: Clue) -> None:
    found = plan(LONGVT, clue)
    assert found.empty and found.views == (WHOLE,)
    assert found.notes == ("video 0: the clue asks for nothing that can be shown",)


def test_images_are_not_shown_again() -> None:
    found = plan(LONGVT, asked(RawRegion(span=(2, 4))), (IMAGE, VIDEO))
    assert {segment.pairs[0].video for segment in found.segments} == {1}


def test_frames_by_index_and_number() -> None:
    framed, listed = DIALECTS["framethinker"].reply, DIALECTS["pixel-reasoner"].reply
    assert framed is not None and listed is not None
    found = plan(framed, asked(RawRegion(frames=(120, 480))))
    assert shown(found) == [120, 136, 153, 169, 185, 201, 218, 234, 250, 266, 283, 299]
    assert shown(plan(framed, asked(RawRegion(frames=(7, 9))))) == [7, 8, 9]
    assert shown(plan(framed, asked(RawRegion(frame_number_at_seconds=3.01)))) == [90]
    first = plan_round("append", CONFIG, [VIDEO], [], 0)
    look = RoundHistory(first, asked(RawRegion(ordinals=(3, 1, 99, 20))))
    found = plan_reply(listed, CONFIG, [VIDEO], [look], 1)
    assert shown(found) == [30, 0, 285]  # of 20 frames, two a second
    assert found.regions == (Region(TimeSpan(0.0, 9.5), FULL_BOX, 0),)


def test_new_frames_only() -> None:
    conan = DIALECTS["conan"].reply
    assert conan is not None
    first = plan_round("append", CONFIG, [VIDEO], [], 0)
    history = [RoundHistory(first, Clue(spans=((2, 3),)))]
    found = plan_reply(conan, CONFIG, [VIDEO], history, 1)
    new = [frame for frame in range(60, 90) if frame not in (60, 75)]
    assert shown(found) == [new[round(i * 27 / 7)] for i in range(8)]
    history.append(RoundHistory(found, Clue(spans=((2, 2.1),))))
    assert shown(plan_reply(conan, CONFIG, [VIDEO], history, 2)) == [62]  # 60 and 61 are old


def test_a_query_is_told_to_be_left_out() -> None:
    found = plan(VIDEOZOOMER, asked(RawRegion(span=(2, 4), query="a red car")))
    assert shown(found) == [60, 90] and "not searched by text" in found.notes[0]


# The image is seen at 616 x 336 px.
@pytest.mark.parametrize(
    ("box", "unit", "family_unit"),
    [
        ((154, 84, 308, 168), None, "px"),
        ((154, 84, 308, 168), "px", "thousandth"),
        ((250, 250, 500, 500), None, "thousandth"),
        ((250, 250, 500, 500), "thousandth", "px"),
        ((0.25, 0.25, 0.5, 0.5), "fraction", "px"),
        ((0.5, 0.5, 0.25, 0.25), "fraction", "thousandth"),
    ],
)
def test_boxes_in_all_units_of_the_original(
    box: RawBox, unit: BoxUnit | None, family_unit: BoxUnit
) -> None:
    first = FramePlan(0, (), (), (), 2.0, (replace(WHOLE, spans=()),))
    clue = asked(RawRegion(box=box, box_unit=unit))
    look = RoundHistory(first, clue, box_unit=family_unit)
    found = plan_reply(ONE, CONFIG, [IMAGE], [look], 1)
    (segment,) = found.segments
    assert segment.box == PixelBox(160, 90, 320, 180)
    assert (segment.pairs[0].frame_a, segment.pairs[0].frame_b) == (0, 0)
    assert found.regions == (Region(TimeSpan(0, 0), Box(0.25, 0.25, 0.5, 0.5), 0),)
    assert found.views == (View(0, segment.box, segment.resized_hw, (TimeSpan(0, 0),), 0.0),)


def test_boxes_of_earlier_views() -> None:
    """The original, the one before the last, and the last."""
    first = FramePlan(0, (), (), (), 2.0, (replace(WHOLE, spans=()),))
    half: RawBox = (0.5, 0.0, 1.0, 1.0)
    history = [RoundHistory(first, asked(RawRegion(box=half, box_unit="fraction")))]
    for view, box in (
        (None, PixelBox(320, 0, 640, 360)),
        (None, PixelBox(480, 0, 640, 360)),
        (1, PixelBox(480, 0, 640, 360)),
        (3, PixelBox(560, 0, 640, 360)),
        (0, PixelBox(320, 0, 640, 360)),
    ):
        raw = RawRegion(box=half, box_unit="fraction", view=view)
        history[-1] = replace(history[-1], clue=asked(raw))
        found = plan_reply(ONE, CONFIG, [IMAGE], history, len(history))
        assert [segment.box for segment in found.segments] == [box], view
        history.append(RoundHistory(found, Clue()))
    # In pixels of the last view: its left upper quarter.
    height, width = found.resized_hw
    history[-1] = replace(history[-1], clue=asked(RawRegion(box=(0, 0, width / 2, height / 2))))
    found = plan_reply(ONE, CONFIG, [IMAGE], history, len(history))
    assert [segment.box for segment in found.segments] == [PixelBox(320, 0, 480, 180)]
    history[-1] = replace(history[-1], clue=asked(RawRegion(box=half, view=7)))
    assert plan_reply(ONE, CONFIG, [IMAGE], history, len(history)).empty


def test_a_box_of_a_frame_shows_that_frame() -> None:
    listed = DIALECTS["pixel-reasoner"].reply
    assert listed is not None
    first = plan_round("append", CONFIG, [VIDEO], [], 0)
    history = [RoundHistory(first, asked(RawRegion(ordinals=(3, 5))))]
    history.append(RoundHistory(plan_reply(listed, CONFIG, [VIDEO], history, 1), Clue()))
    for view, frame in ((1, 30), (2, 60), (None, 60)):
        raw = RawRegion(box=(0, 0, 0.5, 0.5), box_unit="fraction", view=view)
        history[-1] = replace(history[-1], clue=asked(raw))
        found = plan_reply(listed, CONFIG, [VIDEO], history, 2)
        assert (shown(found), found.segments[0].box) == ([frame], PixelBox(0, 0, 320, 180))
    # Of the original, which a video shows all of its time; and with a time, then.
    raw = RawRegion(box=(0, 0, 0.5, 0.5), box_unit="fraction", view=0)
    history[-1] = replace(history[-1], clue=asked(raw, replace(raw, span=(2, 3))))
    found = plan_reply(listed, CONFIG, [VIDEO], history, 2)
    assert shown(found) == [0, 37, 75, 112, 150, 187, 225, 262, 60]
    assert {segment.box for segment in found.segments} == {PixelBox(0, 0, 320, 180)}


def test_the_samples_of_boxes_lead_to_the_source() -> None:
    """Those that dialects write, of an image of 640 x 360 px seen at 616 x 336."""
    expected = {
        "pixel-reasoner": [PixelBox(64, 72, 192, 144)],
        "deepeyes": [PixelBox(10, 21, 104, 215)],
        "mini-o3": [PixelBox(64, 72, 320, 216), PixelBox(0, 0, 320, 216)],
    }
    first = FramePlan(0, (), (), (), 2.0, (replace(WHOLE, spans=()),))
    whole = RawRegion(box=(0, 0, 1, 1), box_unit="fraction")
    lines = (Path(__file__).parent / "dialects.jsonl").read_text().splitlines()
    for name, boxes in expected.items():
        dialect, found = DIALECTS[name], []
        assert dialect.reply is not None
        for sample in map(json.loads, lines):
            clue = parse_clue(sample["text"], dialect)
            if sample["dialect"] == name and clue.boxes:
                history = [RoundHistory(first, asked(whole))]
                history.append(
                    RoundHistory(plan_reply(dialect.reply, CONFIG, [IMAGE], history, 1), clue)
                )
                later = plan_reply(dialect.reply, CONFIG, [IMAGE], history, 2)
                found += [segment.box for segment in later.segments]
        assert found == boxes, name


@pytest.mark.parametrize("dialect", [name for name, d in DIALECTS.items() if d.reply])
def test_any_request_stays_within_the_source(dialect: str) -> None:
    reply, dice = DIALECTS[dialect].reply, random.Random(dialect)
    assert reply is not None

    def number() -> float:
        return dice.choice([0, 1, 1e9, -1e9, dice.uniform(-3, 12), dice.uniform(0, 700)])

    num_shown = 0
    for _ in range(60):
        videos = dice.choice([(VIDEO,), (IMAGE,), (VIDEO, IMAGE), (VIDEO, VIDEO)])
        first = plan_round("append", CONFIG, videos, [], 0)
        history = [RoundHistory(first, Clue())]
        for index in (1, 2, 3):
            raw = RawRegion(
                span=dice.choice([None, (number(), number())]),
                frames=dice.choice([None, (int(number()), int(number()))]),
                ordinals=dice.choice([(), (int(number()), dice.randint(1, 9))]),
                frame_number_at_seconds=dice.choice([None, number()]),
                box=dice.choice([None, (number(), number(), number(), number())]),
                box_unit=dice.choice([None, "px", "thousandth", "fraction"]),
                view=dice.choice([None, 0, 1, 2, 99]),
                sample_fps=dice.choice([None, 0.01, 1000.0]),
                num_frames=dice.choice([None, 1, 100_000]),
            )
            history[-1] = replace(history[-1], clue=asked(raw))
            found = plan_reply(reply, CONFIG, videos, history, index)
            history.append(RoundHistory(found, Clue()))
            num_shown += not found.empty
            assert len(found.segments) <= reply.max_frames * len(videos)
            assert found.empty <= (not found.regions) or reply.only_new
            for segment in found.segments:
                metadata, box = videos[segment.pairs[0].video], segment.box
                assert all(0 <= frame < metadata.num_frames for frame in segment.frame_indices)
                assert 0 <= box.x0 < box.x1 <= 640 and 0 <= box.y0 < box.y1 <= 360
                assert all(side > 0 and side % 28 == 0 for side in segment.resized_hw)
    assert num_shown > 20


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
