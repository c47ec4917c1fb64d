"""Plans in tokens of a model: patches of 16 px instead of 14."""

from __future__ import annotations

import pytest
from utils import QWEN3_VL

from vtts_rt.config import STRATEGIES, PerceptionConfig
from vtts_rt.perception.clue import Clue
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.strategy import plan_round
from vtts_rt.types import StrategyName, VideoMetadata

VIDEOS = [
    VideoMetadata("v", 900, 30.0, 30.0, 360, 640, "test"),
    VideoMetadata("i", 1, 1.0, 0.0, 300, 400, "image", is_image=True),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_views_are_whole_tokens_within_the_budget(strategy: StrategyName) -> None:
    config = PerceptionConfig(strategy=strategy, parity="transformers").resolve(QWEN3_VL)
    first = plan_round(strategy, config, VIDEOS, [], 0)
    look = RoundHistory(first, Clue(spans=((3.0, 8.0),)))
    for plan in (first, plan_round(strategy, config, VIDEOS, [look], 1)):
        assert plan.segments
        for segment in plan.segments:
            height, width = segment.resized_hw
            assert segment.geometry == QWEN3_VL and height % 32 == width % 32 == 0
            assert segment.grid_thw == (len(segment.pairs), height // 16, width // 16)
            assert segment.num_tokens == len(segment.pairs) * (height // 32) * (width // 32)
            # Rounded down to whole tokens, a view may have a few less than 128.
            assert 112 * 32**2 <= height * width <= 768 * 32**2


def test_whole_frames_have_the_size_of_the_rule() -> None:
    config = PerceptionConfig(parity="transformers", max_frames=16).resolve(QWEN3_VL)
    (segment, _) = plan_round("official", config, VIDEOS, [], 0).segments
    # A frame gets at most 128 * 12 * 32^2 / 16 * 2 px, which leaves 18 of 20 columns.
    assert segment.resized_hw == (320, 576)
