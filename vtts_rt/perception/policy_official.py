"""The frame sampler of VideoChat-R1.5, to the index.

Restated from the published evaluation code (`Videochat-R1.5/src_eval/my_vision_process.py`),
with its consequences kept: the sampler sees one frame less than the video has, overlapping
spans count twice, negative starts reach back from the end, counts shrink with duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.plan import (
    FramePlan,
    RoundHistory,
    View,
    frame_times,
    make_image,
    make_plan,
    make_segment,
)
from vtts_rt.perception.region import RawSpan, full_view
from vtts_rt.perception.sizing import image_size, smart_nframes, view_size
from vtts_rt.types import PairRef, Segment, TimeSpan, VideoMetadata, require


def uniform_indices(num_frames: int, num_samples: int) -> list[int]:
    """`torch.linspace(0, num_frames - 1, num_samples).round()`, bit for bit, but for the last frame
    where its float32 is one that is not there (from 2^24 frames on).

    torch on CPU works in float32 with fused multiply-add, from the start in the first half and
    from the end in the second. A float64 product of two float32 is exact, so one rounding of
    a float64 sum gives what the fused operation gives for these ranges.
    """
    if num_samples == 1:
        return [0]
    end = np.float32(num_frames - 1)
    step = np.float64(end / np.float32(num_samples - 1))
    i = np.arange(num_samples)
    up, down = step * i, np.float64(end) - step * (num_samples - 1 - i)
    exact = np.where(i < num_samples // 2, up, down).astype(np.float32)
    return [min(int(v), num_frames - 1) for v in np.rint(exact)]


def key_indices(
    spans: Sequence[RawSpan],
    num_frames: int,
    num_samples: int,
    key_ratio: float,
    source_fps: float,
) -> list[int]:
    """Indices with `key_ratio` times the density inside the spans (raw seconds).

    Ascending before negative ones are taken from the end as decord does, so those come first.
    ValueError, OverflowError or ZeroDivisionError where the published sampler fails, would
    run out of memory, or would ask for frames that do not exist.
    """
    total = num_frames - 1
    ranges = []
    for start_seconds, end_seconds in spans:
        start = int(start_seconds * source_fps)
        stop = min(int(end_seconds * source_fps), total - 1)
        if start <= stop:
            ranges.append((start, stop))
    lowest = min((start for start, _ in ranges), default=0)
    require("key_indices", "start", lowest, lowest >= -num_frames, "a frame of the video")
    num_key = sum(stop - start + 1 for start, stop in ranges)
    weight = num_key * key_ratio + (total - num_key) * 1.0
    num_inside = round(num_samples * (num_key * key_ratio) / weight)
    num_outside = num_samples - num_inside
    # Never reached with the published ratio of 1.5, where at most 3 n are asked for.
    asked = max(num_inside, num_outside)
    require("key_indices", "samples", asked, asked <= 4 * num_samples, "<= 4 x frames")
    chosen: set[int] = set()
    outside = np.ones(total, dtype=bool)
    for start, stop in ranges:
        num = max(1, round(num_inside * (stop - start + 1) / num_key))
        chosen.update(np.linspace(start, stop, num=num, dtype=int).tolist())
        outside[max(start, 0) : max(stop + 1, 0)] = False
    others = np.flatnonzero(outside)
    if num_outside > 0 and len(others) > 0:
        picks = np.linspace(0, len(others) - 1, num=num_outside, dtype=int)
        chosen.update(others[picks].tolist())
    return [i if i >= 0 else i + num_frames for i in sorted(chosen)]


def official_indices(
    metadata: VideoMetadata, config: ResolvedPerception, key_spans: Sequence[RawSpan] | None
) -> tuple[list[int], int, str | None]:
    """(frame indices, nominal number of samples, why the clue was not followed).

    key_spans: raw seconds; None samples uniformly, an empty list takes the other path of the
    published sampler, whose integer linspace truncates. A video of one frame gives that frame.
    """
    num_frames = metadata.num_frames
    if num_frames == 1:
        return [0], 1, None
    source_fps, note = metadata.source_fps, None
    num_samples = smart_nframes(config, num_frames, source_fps)
    if key_spans is not None:
        try:
            indices = key_indices(key_spans, num_frames, num_samples, config.key_ratio, source_fps)
            return indices, num_samples, None
        except (ValueError, OverflowError, ZeroDivisionError) as error:
            note = f"the clue cannot be sampled ({error}): uniform sampling"
    return uniform_indices(num_frames, num_samples), num_samples, note


def official_pairs(
    config: ResolvedPerception, metadata: VideoMetadata, videos: Sequence[VideoMetadata]
) -> int:
    """Frame pairs of a first look at one of `videos`, where no two samples are the same frame."""
    return max(1, smart_nframes(config, metadata.num_frames, metadata.source_fps) // 2)


def _leading_look(history: Sequence[RoundHistory], sticky: bool) -> RoundHistory | None:
    """The round whose clue the next one follows: the last, or the last that wrote a clue."""
    for look in reversed(history):
        if not sticky or look.forced or look.clue.glue is not None:
            return look
    return None


def plan_official(
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    history: Sequence[RoundHistory],
    round_index: int,
) -> FramePlan:
    """One segment a video. Every video has the whole frame and pixel budget for itself."""
    key_spans: Sequence[RawSpan] | None = None
    notes: list[str] = []
    look = _leading_look(history, config.sticky_clues)
    if look is not None and (look.clue.spans or look.clue.empty_list):
        key_spans = look.clue.spans
    elif history:
        problems = () if look is None else look.clue.problems
        notes.append(f"{(*problems, 'no time span in the clue')[0]}: uniform sampling")
    looks: list[tuple[View, list[Segment]]] = []
    frames: list[list[int]] = []
    rates: list[float] = []
    for video, metadata in enumerate(videos):
        box = full_view(metadata.height, metadata.width)
        if metadata.is_image:
            size = image_size(config, metadata.height, metadata.width, 1)
            looks.append(make_image(config, metadata, View(video, box, size, (), 0.0)))
            frames.append([0])
            continue
        indices, num_samples, note = official_indices(metadata, config, key_spans)
        if note is not None:
            notes.append(note)
        size = view_size(config, metadata.height, metadata.width, len(indices))
        # The release tells the model the nominal rate, transformers' processor the rate of the
        # frames that it is given.
        num_told = num_samples if config.parity == "release" else len(indices)
        rates.append(num_told / metadata.num_frames * metadata.source_fps)
        step = 2.0 / rates[-1]
        padded = indices + indices[-1:] * (len(indices) % 2)
        at = dict(zip(padded, frame_times(metadata)[padded].tolist(), strict=True))
        pairs = [
            PairRef(video, metadata.video_id, a, b, at[a], (at[a] + at[b]) / 2)
            for a, b in zip(padded[::2], padded[1::2], strict=True)
        ]
        view = View(video, box, size, (TimeSpan(0.0, metadata.duration_seconds),), step)
        looks.append((view, [make_segment(config, pairs, view, seconds_per_grid=step)]))
        frames.append(indices)
    plan = make_plan(config, videos, look, round_index, looks, notes, frames)
    return replace(plan, sample_fps=rates[0]) if rates else plan
