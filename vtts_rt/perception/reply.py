"""How a look is given back where the dialect says it: which frames, and the texts around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.dialect import Reply
from vtts_rt.perception.layout import Turn, with_labels
from vtts_rt.perception.plan import FramePlan, RoundHistory, View, frame_times, image_segment
from vtts_rt.perception.policy_grid import make_plan
from vtts_rt.perception.region import RawRegion, full_view, usable_spans
from vtts_rt.perception.sizing import resize_kernel, view_size
from vtts_rt.types import PairRef, PromptPart, Segment, VideoMetadata


def plan_reply(
    reply: Reply,
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    history: Sequence[RoundHistory],
    round_index: int,
) -> FramePlan:
    """The frames that the last clue asks for, at its density or the reply's, in its order.

    A frame that was shown before is shown again: it was asked for. Every view has the pixel budget
    of a frame in a round of max_frames (the reply's), so that features serve again. Empty where
    nothing can be shown: no usable span, or images only.
    """
    look = history[-1]
    segments: list[Segment] = []
    views: list[View] = []
    notes: list[str] = []
    if look.clue.boxes:
        notes.append("a reply shows whole frames: the boxes in the clue are left out")
    for video, metadata in enumerate(videos):
        frames, step_seconds = _asked_frames(reply, look.clue, metadata, notes)
        if not frames:
            notes.append(f"video {video}: no usable time span in the clue")
            views.append(look.plan.views[video])
            continue
        box = full_view(metadata.height, metadata.width)
        size = _frame_size(reply, config, metadata)
        times = frame_times(metadata)
        one = image_segment(video, metadata, box, size, config)
        pairs = [(frame, frame) for frame in frames]
        if not reply.as_images:
            one = replace(one, is_image=False, resize=resize_kernel(config.numerics, False))
            pairs = list(zip(frames[::2], [*frames[1::2], frames[-1]], strict=False))
        for a, b in pairs:
            mean = float(times[a] + times[b]) / 2
            pair = PairRef(video, metadata.video_id, a, b, float(times[a]), mean)
            segments.append(replace(one, pairs=(pair,)))
        views.append(View(video, box, size, look.spans(metadata), 2.0 * step_seconds))
    return make_plan(config, videos, history, round_index, segments, views, notes)


def reply_turn(reply: Reply, turn: Turn) -> list[PromptPart]:
    """The turn that gives a look back: texts and segments, then the cue of the round."""
    before, after = reply.around

    def label(turn: Turn, number: int, segment: Segment) -> str:
        pair = segment.pairs[0]
        named = {"number": number, "index": pair.frame_a, "seconds": pair.time_seconds}
        return reply.frame_label.format(**named)

    cue = turn.templates.cue_final if turn.is_last else turn.templates.cue_look
    return [before, *with_labels(turn, label), after + cue]


def most_of_reply(
    reply: Reply, config: ResolvedPerception, videos: Sequence[VideoMetadata]
) -> tuple[int, int]:
    """(frames, tokens) of the longest reply to one request."""
    most_frames = most_tokens = 0
    for metadata in videos:
        if not metadata.is_image:
            num_frames = min(reply.max_frames, metadata.num_frames)
            size = _frame_size(reply, config, metadata)
            most_frames += num_frames
            num_shown = num_frames if reply.as_images else -(-num_frames // 2)
            most_tokens += num_shown * config.geometry.num_tokens(size)
    return most_frames, most_tokens


def _frame_size(
    reply: Reply, config: ResolvedPerception, metadata: VideoMetadata
) -> tuple[int, int]:
    most_px = reply.max_frame_px or math.inf
    return view_size(config, metadata.height, metadata.width, reply.max_frames, most_px)


def _asked_frames(
    reply: Reply, clue: Clue, metadata: VideoMetadata, notes: list[str]
) -> tuple[list[int], float]:
    """Frames in the order of the requests, each once, and the seconds between the first two.

    A request of n seconds at f frames a second gets floor(n f) of them, one at least, the first at
    its start; above max_frames, so many evenly spread.
    """
    frames: list[int] = []
    steps: list[float] = []
    regions = clue.regions or [RawRegion(span=span) for span in clue.spans]
    spans = [region.span or (math.nan, math.nan) for region in regions]
    if metadata.is_image:
        return [], 0.0
    times = frame_times(metadata)
    for region, raw in zip(regions, spans, strict=True):
        for span in usable_spans([raw], metadata.duration_seconds):
            seconds = span.end_seconds - span.start_seconds
            sample_fps = region.sample_fps or reply.sample_fps
            wanted = region.num_frames or int(seconds * sample_fps + 1e-6)
            count = min(max(wanted, 1), reply.max_frames)
            if count < wanted:
                notes.append(f"{wanted} frames are asked for, {count} are shown")
            step = seconds / count
            at = span.start_seconds + step * np.arange(count)
            # The frame that is on screen; timestamps are rounded in the container.
            shown = np.searchsorted(times, at + 1e-6, side="right") - 1
            frames += np.maximum(shown, 0).tolist()
            steps.append(step)
    return list(dict.fromkeys(frames)), steps[0] if steps else 0.0
