"""Frame policies: the published sampler restated with torch, the grid's invariants, budgets."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from utils import resolved

from vtts_rt.config import STRATEGIES
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.policy_grid import finer_frames
from vtts_rt.perception.policy_official import uniform_indices
from vtts_rt.perception.published import clue_stream
from vtts_rt.perception.sizing import frame_cap, smart_resize
from vtts_rt.perception.strategy import find_strategy, first_pairs, plan_round
from vtts_rt.types import PixelBox, TimeSpan, VideoMetadata

FOCUS = {"focus_frames": 24, "focus_margin_cells": 1.0}
NEEDLE = resolved(sample_fps=0.5, max_frames=24, min_pixels=7056, total_pixels=12 * 7056, **FOCUS)


def video(num_frames: int, fps: float = 30.0, height: int = 360, width: int = 640) -> VideoMetadata:
    times, seconds = np.arange(num_frames) / fps, num_frames / fps
    return VideoMetadata("v", num_frames, fps, seconds, height, width, "test", False, times)


IMAGE = VideoMetadata("i", 1, 1.0, 0.0, 300, 400, "image", is_image=True)


def follow(strategy, config, videos, *clues, forced=False):  # type: ignore[no-untyped-def]
    """Plans of the rounds; every clue is a glue text."""
    history: list[RoundHistory] = []
    plans = [plan_round(strategy, config, videos, history, 0)]
    for i, glue in enumerate(clues):
        stream = clue_stream(find_strategy(strategy).literal_clues)
        stream.feed(f"<glue>{glue}</glue>")
        history.append(RoundHistory(plans[-1], stream.finish(), forced))
        plans.append(plan_round(strategy, config, videos, history, i + 1))
    return plans


# -- official ---------------------------------------------------------------------------------


def published_indices(total_frames, fps, spans):  # type: ignore[no-untyped-def]
    """The published behaviour, from its description, with torch and plain Python."""
    n = total_frames / fps * 2.0
    n = min(min(max(n, 4), min(512, total_frames) // 2 * 2), total_frames)
    n = int(n // 2) * 2
    uniform = torch.linspace(0, total_frames - 1, n).round().long().tolist()
    if spans is None:
        return uniform, n
    total = total_frames - 1
    try:
        bounds = [(int(s * fps), min(int(e * fps), total - 1)) for s, e in spans]
        bounds = [(a, b) for a, b in bounds if a <= b]
        k = sum(b - a + 1 for a, b in bounds)
        in_key = round(n * (k * 1.5) / (k * 1.5 + (total - k) * 1.0))
        picked = []
        for a, b in bounds:
            num = max(1, round(in_key * (b - a + 1) / k))
            picked += np.linspace(a, b, num=num, dtype=int).tolist()
        key = {i for a, b in bounds for i in range(a, b + 1)}
        rest = [i for i in range(total) if i not in key]
        if n - in_key > 0 and rest:
            picked += [rest[i] for i in np.linspace(0, len(rest) - 1, n - in_key, dtype=int)]
        picked = sorted(set(picked))
    except Exception:
        return uniform, n
    if picked and picked[0] < -total_frames:
        return uniform, n
    return [i % total_frames for i in picked], n  # decord counts negative indices from the end


SPAN = st.tuples(st.floats(-20, 80), st.floats(-20, 80))


@settings(max_examples=120, deadline=None)
@given(
    st.integers(2, 2000),
    st.sampled_from([23.976, 25.0, 29.97, 30.0, 60.0, 1.0, 0.5]),
    st.one_of(st.none(), st.lists(SPAN, min_size=1, max_size=5)),
)
def test_official_is_the_published_sampler(total, fps, spans):  # type: ignore[no-untyped-def]
    config, metadata = resolved(), video(total, fps)
    history = []
    if spans is not None:
        first = plan_round("official", config, [metadata], [], 0)
        history.append(RoundHistory(first, Clue(spans=tuple(spans))))
    plan = plan_round("official", config, [metadata], history, len(history))
    indices, nominal = published_indices(total, fps, spans)
    assert list(plan.frame_indices) == indices
    assert plan.sample_fps == nominal / total * fps
    (segment,) = plan.segments
    assert segment.seconds_per_grid == 2 / plan.sample_fps
    assert list(segment.frame_indices) == indices + indices[-1:] * (len(indices) % 2)
    cap = max(min(768 * 784, config.total_pixels / len(indices) * 2), int(128 * 784 * 1.05))
    assert segment.resized_hw == smart_resize(360, 640, 128 * 784, cap, 28)


def test_uniform_is_torch_linspace_bit_for_bit() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        total = int(10 ** rng.uniform(0.4, 6.3))
        n = 2 * rng.randint(1, 256)
        expected = torch.linspace(0, total - 1, n).round().long().tolist()
        assert uniform_indices(total, n) == expected, (total, n)
    # A float32 rounds 2^27 - 1 up to a frame that is not there.
    for total in (2**24 + 1, 2**26 - 1, 2**27 - 1, 2**27, 2**27 + 9, 2**31 - 5):
        for n in (2, 5, 64, 512):
            expected = torch.linspace(0, total - 1, n).round().long().clamp(max=total - 1).tolist()
            assert uniform_indices(total, n) == expected, (total, n)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pairs_of_a_first_look_are_counted_without_its_plan(strategy) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(1)
    for _ in range(100):
        videos = [video(rng.randint(1, 3000), rng.choice((1.0, 8.0, 29.97))) for _ in range(2)]
        rate = rng.choice((0.5, 1.0, 4.0))
        config = resolved(max_frames=2 * rng.randint(2, 64), sample_fps=rate)
        num_pairs = plan_round(strategy, config, videos, [], 0).num_pairs
        counted = first_pairs(strategy, config, videos)
        assert counted == num_pairs or (strategy == "official" and counted - num_pairs <= 2)


def test_an_empty_list_is_not_a_missing_clue() -> None:
    metadata = video(901)
    empty, none = (follow("official", resolved(), [metadata], g)[1] for g in ("[]", "x"))
    assert list(empty.frame_indices) == published_indices(901, 30.0, [])[0]
    assert list(none.frame_indices) == published_indices(901, 30.0, None)[0]
    assert empty.frame_indices != none.frame_indices
    assert none.notes and not empty.notes


@pytest.mark.parametrize(
    ("num", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 2]), (4, [0, 1, 2, 3])]
)
def test_short_videos(num: int, expected: list[int]) -> None:
    plan = plan_round("official", resolved(), [video(num)], [], 0)
    assert list(plan.frame_indices) == expected
    assert plan.num_pairs == (len(expected) + 1) // 2


def test_numbers_that_the_sampler_cannot_take_fall_back_and_say_so() -> None:
    for spans in ([(1e308, 1e308)], [(-1e9, 5.0)], [(0.0, 1e308)]):
        first = plan_round("official", resolved(), [video(900)], [], 0)
        look = RoundHistory(first, Clue(spans=tuple(spans)))
        plan = plan_round("official", resolved(), [video(900)], [look], 1)
        assert plan.frame_indices == first.frame_indices
        assert "uniform sampling" in plan.notes[0]


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hw", "bounds", "expected"),
    [
        ((360, 640), (128 * 784, 768 * 784), (364, 644)),
        ((720, 1280), (128 * 784, 768 * 784), (560, 1008)),
        ((720, 1280), (128 * 784, 276 * 784), (336, 616)),
        ((42, 70), (1, 10**6), (56, 56)),  # half to even: 1.5 -> 2, 2.5 -> 2
        ((100, 25_000), (10**5, 6 * 10**5), smart_resize(100, 20_000, 10**5, 6 * 10**5, 28)),
        ((1, 250), (128 * 784, 768 * 784), smart_resize(1, 200, 128 * 784, 768 * 784, 28)),
        ((1, 1), (1, 1), (28, 28)),
    ],
)
def test_smart_resize(hw: tuple[int, int], bounds: tuple[int, int], expected: object) -> None:
    assert smart_resize(*hw, *bounds, 28) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10**6), st.integers(784, 10**6))
def test_smart_resize_is_defined_everywhere(h: int, w: int, low: int, high: int) -> None:
    rows, columns = smart_resize(h, w, low, high, 28)
    assert rows % 28 == columns % 28 == 0 and min(rows, columns) >= 28


# -- all strategies -----------------------------------------------------------------------------

GLUES = st.sampled_from(
    ["x", "[(3, 5)]", "[(0, 999)]", "(5, 3)", "[(-4, 2), (7, 7)]", "[0.2, 0.3, 0.4, 0.5]",
     "[(3, 9)] [20, 20, 60, 50]", "[(2,2.01)] [0, 0, 0.001, 0.001]", "[(500, 600)]", "(1, 1e300)",
     "[5, 5, 5, 9]"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(list(STRATEGIES)),
    st.sampled_from([resolved(), NEEDLE, resolved(max_frames=4)]),
    st.lists(
        st.one_of(
            st.builds(
                video,
                st.integers(1, 1500),
                st.sampled_from([1.0, 12.0, 29.97]),
                st.integers(1, 500),
                st.integers(1, 500),
            ),
            st.just(IMAGE),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(GLUES, max_size=3),
)
def test_plans_are_valid(strategy, config, videos, glues):  # type: ignore[no-untyped-def]
    plans: list[FramePlan] = follow(strategy, config, videos, *glues)
    assert not plans[0].empty
    shown = set()
    for plan in plans:
        assert len(plan.views) == len(videos)
        assert len(plan.frame_indices) == len(plan.timestamps_seconds)
        moving = 0
        for segment in plan.segments:
            metadata = videos[segment.pairs[0].video]
            assert all(0 <= f < metadata.num_frames for f in segment.frame_indices)
            assert len(segment.frame_indices) % 2 == 0
            assert min(segment.resized_hw) >= 28 and not any(s % 28 for s in segment.resized_hw)
            box = segment.box
            assert 0 <= box.x0 < box.x1 <= metadata.width
            assert 0 <= box.y0 < box.y1 <= metadata.height
            moving += 0 if segment.is_image else len(segment.pairs)
            if strategy in ("refresh", "append"):
                assert len(segment.pairs) == 1
        if strategy != "official":
            assert moving <= max(config.max_frames // 2, len(videos))
        if strategy == "append":
            keys = [(s.pairs[0].video, s.frame_indices, s.box, s.resized_hw) for s in plan.segments]
            assert len(set(keys)) == len(keys) and not shown & set(keys)
            shown |= set(keys)
        assert (not plan.empty) or plan.notes


def test_long_and_odd_videos() -> None:
    ten_hours = video(10 * 3600 * 30)
    for strategy in STRATEGIES:
        plans = follow(strategy, resolved(), [ten_hours], "[(7000, 7100)]")
        assert all(p.num_pairs <= 270 for p in plans)
    gaps = VideoMetadata(
        "g", 4, 0.4, 10.0, 90, 160, "test", timestamps_seconds=np.array([0.0, 0.1, 9.0, 9.1])
    )
    plan = plan_round("append", resolved(), [gaps], [], 0)
    assert plan.frame_indices[:2] == (0, 1)
    assert set(plan.frame_indices) <= {0, 1, 2, 3}


# -- grid -----------------------------------------------------------------------------------------


def test_grid_pairs_are_cell_starts_and_middles() -> None:
    plan = plan_round("grid", resolved(), [video(300)], [], 0)
    (segment,) = plan.segments
    assert segment.seconds_per_grid == 1.0
    assert plan.frame_indices[:6] == (0, 15, 30, 45, 60, 75)
    assert [p.time_seconds for p in segment.pairs] == list(range(10))


def test_finer_frames_are_what_the_next_level_adds() -> None:
    config = resolved(sample_fps=1.0)
    plan = plan_round("append", config, [video(300), IMAGE], [], 0)
    level = plan.views[0].level
    finer = finer_frames([video(300), IMAGE], plan, config.sample_fps)
    assert finer.keys() == {0} and len(finer[0]) == len(set(finer[0])) > 0
    look = RoundHistory(plan, Clue(spans=((2.0, 6.0),)))
    later = plan_round("append", config, [video(300), IMAGE], [look], 1)
    assert later.views[0].level == level + 1
    seen, shown = (
        {f for s in p.segments if s.pairs[0].video == 0 for f in s.frame_indices}
        for p in (plan, later)
    )
    assert shown - seen <= set(finer[0]) and not seen & set(finer[0])
    # A level at which the cells are finer than the source's frames has none.
    still = video(10, fps=1.0)
    plan = plan_round("append", config, [still], [], 0)
    assert finer_frames([still], plan, config.sample_fps).get(0, []) == []


def test_grid_keeps_most_pairs_and_a_prefix() -> None:
    rng = random.Random(0)
    config, kept, prefix = resolved(), [], []
    for _ in range(60):
        seconds = rng.choice([20, 60, 180, 600])
        length = rng.uniform(0.05, 0.3) * seconds
        start = rng.uniform(0, seconds - length)
        a, b = follow("grid", config, [video(seconds * 30)], f"({start}, {start + length})")
        old, new = a.segments[0].pairs, b.segments[0].pairs
        assert len(old) == len(new)
        assert a.resized_hw == b.resized_hw
        assert a.segments[0].seconds_per_grid == b.segments[0].seconds_per_grid
        assert [p.time_seconds for p in new] == sorted(p.time_seconds for p in new)
        inside = [p for p in new if start <= p.time_seconds < start + length]
        assert len(inside) >= sum(start <= p.time_seconds < start + length for p in old)
        kept.append(len(set(old) & set(new)) / len(old))
        prefix.append(
            next(i for i in range(len(old) + 1) if old[: i + 1] != new[: i + 1]) / len(old)
            if old != new
            else 1.0
        )
    assert np.mean(kept) > 0.90 and min(kept) > 0.85
    assert np.mean(prefix) > 0.25


@pytest.mark.parametrize(
    ("glue", "num", "fps", "unchanged"),
    [
        ("(0, 60)", 1800, 30.0, True),  # everything
        ("(10, 20)", 1800, 30.0, False),
        ("(10, 10)", 1800, 30.0, True),  # one cell of sixty: no half cell more
        ("(2, 4)", 8, 1.0, True),  # no frames between those shown
    ],
)
def test_grid_says_that_a_clue_changes_nothing(
    glue: str, num: int, fps: float, unchanged: bool
) -> None:
    first, second = follow("grid", resolved(), [video(num, fps)], glue)
    assert (first.segments == second.segments) == unchanged
    assert any("the clue changes nothing" in note for note in second.notes) == unchanged
    assert not first.notes


# -- refresh, append ------------------------------------------------------------------------------


def test_a_later_look_is_bounded_by_focus_frames() -> None:
    """60 s at one frame in two seconds: 15 pairs, then at most half as many, never no finer."""
    config = resolved(sample_fps=0.5)
    clip = video(1500, 25.0, 360, 640)
    one, two, three = follow("append", config, [clip], "[(20, 30)]", "[(24, 28)]")
    assert (one.num_pairs, two.num_pairs, three.num_pairs) == (15, 5, 4)
    assert [plan.views[0].cell_seconds for plan in (one, two, three)] == [4.0, 2.0, 1.0]
    assert two.views[0].spans == (TimeSpan(20.0, 30.0),)
    wide = follow("append", config, [clip], "[(0, 60)]")[1]
    assert wide.views[0].cell_seconds == 2.0
    rich = resolved(sample_fps=0.5, focus_frames=80)
    assert follow("append", rich, [clip], "[(20, 30)]")[1].views[0].cell_seconds == 0.25


def test_append_narrows_in_time_and_space() -> None:
    config = NEEDLE
    one, two, three = follow(
        "append", config, [video(450, 30.0, 448, 448)], "[(6, 7)]", "[(6.5, 7)] [28, 28, 56, 56]"
    )
    assert one.views[0].cell_seconds == 4.0
    assert two.views[0].spans == (TimeSpan(2.0, 11.0),)  # one cell of the first round wider
    assert two.views[0].cell_seconds == 1.0
    assert three.views[0].spans == (TimeSpan(5.5, 8.0),)
    assert three.views[0].cell_seconds == 0.25
    third = 448 // 3
    assert three.views[0].box == PixelBox(third, third, 299, 299)
    assert one.resized_hw == two.resized_hw == three.resized_hw
    assert three.regions[0].span == TimeSpan(6.5, 7.0)


def test_small_boxes_keep_a_minimal_view() -> None:
    plan = follow("refresh", NEEDLE, [video(450, 30.0, 448, 448)], "(1, 2) [0, 0, 0.001, 0.001]")[1]
    assert plan.views[0].box == PixelBox(0, 0, 56, 56)


def test_a_box_alone_keeps_the_time_and_a_span_alone_shows_the_whole_frame() -> None:
    videos = [video(450, 30.0, 448, 448)]
    one, box, span = follow("append", NEEDLE, videos, "[0, 0, 0.5, 0.5]", "(3, 4)")
    assert [p for s in box.segments for p in s.pairs] == [p for s in one.segments for p in s.pairs]
    assert box.views[0].box == PixelBox(0, 0, 224, 224)
    assert span.views[0].box == PixelBox(0, 0, 448, 448)


def test_forced_boxes_are_fractions_of_the_frame() -> None:
    videos = [video(450, 30.0, 448, 448)]
    glues = ("(3, 4) [0, 0, 0.5, 0.5]", "(3, 4) [0, 0, 0.25, 0.25]")
    assert follow("append", NEEDLE, videos, *glues)[2].views[0].box == PixelBox(0, 0, 56, 56)
    forced = follow("append", NEEDLE, videos, *glues, forced=True)
    assert forced[2].views[0].box == PixelBox(0, 0, 112, 112)


def test_nothing_new_is_an_empty_plan_that_says_why() -> None:
    for glue in ("x", "(9, 3)", "(500, 600)"):
        for strategy in ("refresh", "append"):
            plan = follow(strategy, NEEDLE, [video(450)], glue)[1]
            assert plan.empty and "no usable" in plan.notes[0] and plan.resized_hw == (0, 0)
    fine = resolved(sample_fps=30.0)
    plan = follow("append", fine, [video(60)], "(0, 2)")[1]
    assert plan.empty and "has been shown" in plan.notes[0]


def test_images_are_shown_again_only_cropped() -> None:
    one, two, three = follow("append", resolved(), [IMAGE], "[0.5, 0.5, 1, 1]", "x")
    assert one.segments[0].is_image and one.frame_indices == (0, 0)
    assert two.segments[0].box == PixelBox(200, 150, 400, 300)
    assert three.empty


def test_the_pixel_budget_is_that_of_a_full_round() -> None:
    plan = plan_round("append", NEEDLE, [video(450, 30.0, 448, 448)], [], 0)
    rows, columns = plan.resized_hw
    assert rows * columns <= frame_cap(NEEDLE, NEEDLE.max_frames)


@pytest.mark.parametrize(
    "bad",
    [{"num_frames": 0}, {"height": 0}, {"source_fps": 0.0}, {"duration_seconds": float("nan")}],
)
def test_bad_metadata(bad: dict[str, float]) -> None:
    fields = {"video_id": "v", "num_frames": 9, "source_fps": 3.0, "duration_seconds": 3.0,
              "height": 90, "width": 90, "decoder": "test", **bad}  # fmt: skip
    with pytest.raises(ValueError, match=r"^plan_round: .* must be "):
        plan_round("append", resolved(), [VideoMetadata(**fields)], [], 0)
