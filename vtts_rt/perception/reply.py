"""How a look is given back where the dialect says it: which frames, and the texts around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vtts_rt.config import ResolvedPerception
from vtts_rt.perception.dialect import Reply
from vtts_rt.perception.layout import Turn, with_labels
from vtts_rt.perception.plan import (
    FramePlan,
    RoundHistory,
    View,
    frame_times,
    make_plan,
    make_segment,
)
from vtts_rt.perception.region import MIN_VIEW_PX, RawRegion, full_view, snap_box, usable_spans
from vtts_rt.perception.sizing import image_size, view_size
from vtts_rt.types import (
    FULL_BOX,
    PairRef,
    PixelBox,
    PromptPart,
    Region,
    Segment,
    TimeSpan,
    VideoMetadata,
)

_Videos = Sequence[VideoMetadata]


@dataclass(frozen=True, slots=True)
class _Request:
    """One request for a look at one video. frames: source indices where it names them; otherwise
    they are spread over the region's span, as densely as `raw` says."""

    region: Region
    raw: RawRegion = RawRegion()
    frames: tuple[int, ...] = ()


def plan_reply(
    reply: Reply,
    config: ResolvedPerception,
    videos: _Videos,
    history: Sequence[RoundHistory],
    round_index: int,
) -> FramePlan:
    """The frames that the last clue asks for, at its density or the reply's, in its order.

    A frame that was shown before is shown again, unless the reply holds new ones only: it was asked
    for. With a box that part of the frame is shown. Every view has the pixel budget of a frame in a
    round of max_frames (the reply's), so that features serve again. Empty where nothing can be
    shown.
    """
    look = history[-1]
    looks: list[tuple[View, list[Segment]]] = []
    notes: list[str] = []
    past = [pair for h in history for segment in h.plan.segments for pair in segment.pairs]
    requests = requests_of(reply, videos, history)
    for video, metadata in enumerate(videos):
        seen = {f for pair in past if pair.video == video for f in (pair.frame_a, pair.frame_b)}
        is_image = metadata.is_image or reply.as_images
        times = np.zeros(1) if metadata.is_image else frame_times(metadata)
        view, segments = look.plan.views[video], dict[tuple[PairRef, PixelBox], Segment]()
        for request in requests:
            if request.region.video == video:
                frames, step = _frames(reply, request, metadata, seen, notes)
                pairs = [(frame, frame) for frame in frames]
                if not reply.as_images:
                    pairs = list(zip(frames[::2], [*frames[1::2], *frames[-1:]], strict=False))
                if frames:
                    box = full_view(metadata.height, metadata.width)
                    if (part := request.region.box) != FULL_BOX:
                        box = snap_box(part, metadata.height, metadata.width, MIN_VIEW_PX)
                    size = _frame_size(reply, config, metadata, box)
                    view = View(video, box, size, (request.region.span,), 2.0 * step)
                for a, b in pairs:
                    moments = float(times[a]), float(times[a] + times[b]) / 2
                    pair = PairRef(video, metadata.video_id, a, b, *moments)
                    segment = make_segment(config, [pair], view, is_image=is_image)
                    segments.setdefault((pair, view.box), segment)
        if not segments:
            notes.append(f"video {video}: the clue asks for nothing that can be shown")
        looks.append((view, list(segments.values())))
    plan = make_plan(config, videos, look, round_index, looks, notes)
    return replace(plan, regions=tuple(request.region for request in requests))


def reply_turn(reply: Reply, turn: Turn) -> list[PromptPart]:
    """The turn that gives a look back: texts and segments, then the cue of the round."""
    before, after = reply.around

    def label(turn: Turn, number: int, segment: Segment) -> str:
        pair = segment.pairs[0]
        named = {"number": number, "index": pair.frame_a, "seconds": pair.time_seconds}
        return reply.frame_label.format(**named)

    cue = turn.templates.cue_final if turn.is_last else turn.templates.cue_look
    return [before, *with_labels(turn, label), after + cue]


def most_of_reply(reply: Reply, config: ResolvedPerception, videos: _Videos) -> tuple[int, int]:
    """(frames, tokens) of the longest reply to one request for whole frames; of images, which are
    shown again in parts, one for each where there is no video."""
    most_frames = most_tokens = 0
    for metadata in videos:
        if not metadata.is_image or all(v.is_image for v in videos):
            num_frames = min(reply.max_frames, metadata.num_frames)
            box = full_view(metadata.height, metadata.width)
            size = _frame_size(reply, config, metadata, box)
            most_frames += num_frames
            num_shown = num_frames if reply.as_images else -(-num_frames // 2)
            most_tokens += num_shown * config.geometry.num_tokens(size)
    return most_frames, most_tokens


def requests_of(reply: Reply, videos: _Videos, history: Sequence[RoundHistory]) -> list[_Request]:
    """The requests of the last clue, of each video in their order; without those that lead to
    nothing that can be shown."""
    look = history[-1]
    if not look.clue.regions:
        return [_Request(region) for region in look.regions(videos)]
    found: list[_Request] = []
    for video in range(len(videos)):
        for raw in look.clue.regions:
            found += _resolved(reply, raw, video, videos[video], history)
    return found


def _resolved(
    reply: Reply,
    raw: RawRegion,
    video: int,
    metadata: VideoMetadata,
    history: Sequence[RoundHistory],
) -> list[_Request]:
    """What a request as written means for one video: [] where that is nothing."""
    view: View | Segment = history[0].plan.views[video]
    given = [segment for past in history[1:] for segment in past.plan.segments]
    if raw.box and given and raw.view != 0:
        number = len(given) if raw.view is None else raw.view
        if number > len(given) or given[number - 1].pairs[0].video != video:
            return []
        view = given[number - 1]
    elif raw.box and raw.view:
        return []
    boxes = [FULL_BOX]
    if raw.box:
        boxes = history[-1].on_frame([raw.box], view, metadata, raw.box_unit)
    if not boxes or (metadata.is_image and not raw.box):
        return []  # an image is shown again in parts only
    if metadata.is_image:
        return [_Request(Region(TimeSpan(0.0, 0.0), boxes[0], video), raw, (0,))]
    spans: tuple[TimeSpan, ...] = ()
    times, frames = frame_times(metadata), list[int]()
    if raw.span:
        spans = usable_spans([raw.span], metadata.duration_seconds)
    elif raw.frames:
        first, last = max(raw.frames[0], 0), min(raw.frames[1], metadata.num_frames - 1)
        count = min(reply.max_frames, last - first + 1)
        frames = np.linspace(first, last, max(count, 0)).round().astype(int).tolist()
    elif raw.ordinals:
        pairs = [pair for segment in history[0].plan.segments for pair in segment.pairs]
        listed = [(pair.video, f) for pair in pairs for f in (pair.frame_a, pair.frame_b)]
        named = [listed[i - 1] for i in raw.ordinals if 1 <= i <= len(listed)]
        frames = [frame for owner, frame in named if owner == video]
    elif raw.frame_number_at_seconds is not None:
        seconds = raw.frame_number_at_seconds
        if 0.0 <= seconds < metadata.duration_seconds:
            frames = [_frame_at(times, seconds)]
    elif isinstance(view, Segment):
        frames = [view.pairs[0].frame_a]
    elif raw.box:
        spans = view.spans
    if frames:
        spans = (TimeSpan(float(times[min(frames)]), float(times[max(frames)])),)
    return [_Request(Region(span, boxes[0], video), raw, tuple(frames)) for span in spans]


def _frame_size(
    reply: Reply, config: ResolvedPerception, metadata: VideoMetadata, box: PixelBox
) -> tuple[int, int]:
    """(height, width) px of a frame that is seen through a box."""
    height, width = box.y1 - box.y0, box.x1 - box.x0
    if metadata.is_image:
        return image_size(config, height, width, is_crop=True)
    most_px = reply.max_frame_px or math.inf
    return view_size(config, height, width, reply.max_frames, most_px)


def _frame_at(times: np.ndarray, seconds: float) -> int:
    """The frame that is on screen; timestamps are rounded in the container."""
    return max(int(np.searchsorted(times, seconds + 1e-6, side="right")) - 1, 0)


def _frames(
    reply: Reply, request: _Request, metadata: VideoMetadata, seen: set[int], notes: list[str]
) -> tuple[list[int], float]:
    """Frames in ascending order, or as they are named, and the seconds between the first two.

    A request of n seconds at f frames a second gets floor(n f) of them, one at least, the first at
    its start; above max_frames, so many evenly spread. seen: what was shown of the video.
    """
    raw, span = request.raw, request.region.span
    seconds = span.end_seconds - span.start_seconds
    sample_fps = raw.sample_fps or reply.sample_fps
    wanted = raw.num_frames or len(request.frames) or int(seconds * sample_fps + 1e-6)
    count = min(max(wanted, 1) if wanted or sample_fps else reply.max_frames, reply.max_frames)
    if count < wanted:
        notes.append(f"{wanted} frames are asked for, {count} are shown")
    if raw.query:
        notes.append("frames are not searched by text: they are spread evenly")
    step = seconds / count
    frames = list(request.frames[:count])
    if not frames:
        times = frame_times(metadata)
        at = [span.start_seconds + step * i for i in range(count)]
        frames = [_frame_at(times, moment) for moment in at]
        if reply.only_new:
            last = _frame_at(times, span.end_seconds - 2e-6)
            new = [f for f in range(frames[0], last + 1) if f not in seen]
            spread = np.linspace(0, len(new) - 1, min(count, len(new))).round().astype(int)
            frames = [new[i] for i in spread]
    return list(dict.fromkeys(frames)), step
