"""Frame policies: which frames, boxes and sizes a round shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vtts_rt.config import STRATEGIES, ResolvedPerception
from vtts_rt.perception.plan import FramePlan, RoundHistory, View
from vtts_rt.perception.policy_grid import grid_pairs, plan_focus, plan_grid
from vtts_rt.perception.policy_official import official_pairs, plan_official
from vtts_rt.types import Strategy, VideoMetadata, require

__all__ = ["FramePlan", "RoundHistory", "View", "first_pairs", "plan_round"]


def first_pairs(
    strategy: Strategy, config: ResolvedPerception, videos: Sequence[VideoMetadata]
) -> int:
    """Frame pairs of a first look, counted without making its plan; arguments as `plan_round`."""
    _check(strategy, videos)
    count = official_pairs if strategy == "official" else grid_pairs
    return sum(1 if video.is_image else count(config, video, videos) for video in videos)


def plan_round(
    strategy: Strategy,
    config: ResolvedPerception,
    videos: Sequence[VideoMetadata],
    history: Sequence[RoundHistory],
    round_index: int,
) -> FramePlan:
    """The frame plan of a round; the same arguments always give the same plan.

    videos: at least one, in the request's order. history: the finished rounds, oldest first;
    empty for the first look, and the last one's clue says where to look. round_index: from 0,
    recorded in the plan. `official` and `grid` always have something to show; a plan of
    `refresh` or `append` may be empty, and its notes say why.
    ValueError for an unknown strategy or a video without frames, size, rate or duration.
    """
    _check(strategy, videos)
    if strategy == "official":
        return plan_official(config, videos, history, round_index)
    if strategy == "grid":
        return plan_grid(config, videos, history, round_index)
    return plan_focus(strategy, config, videos, history, round_index)


def _check(strategy: Strategy, videos: Sequence[VideoMetadata]) -> None:
    require("plan_round", "strategy", strategy, strategy in STRATEGIES, f"one of {STRATEGIES}")
    require("plan_round", "videos", videos, len(videos) > 0, "at least one video")
    for metadata in videos:
        sides = (metadata.height, metadata.width)
        require("plan_round", "num_frames", metadata.num_frames, metadata.num_frames >= 1, ">= 1")
        require("plan_round", "height, width", sides, min(sides) >= 1, ">= 1")
        if not metadata.is_image:
            for name in ("source_fps", "duration_seconds"):
                value = getattr(metadata, name)
                positive = math.isfinite(value) and value > 0.0
                require("plan_round", name, value, positive, "a finite number > 0")
