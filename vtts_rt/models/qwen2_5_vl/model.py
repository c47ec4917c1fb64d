"""Qwen2_5_VL: the family's tower beside the shared language model."""

from __future__ import annotations

from typing import Any

from vtts_rt.models.base import VideoLM
from vtts_rt.models.checkpoint import from_hf, positive
from vtts_rt.models.config import ModelConfig
from vtts_rt.models.mrope import MropePositions
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.qwen2_5_vl.vision import VisionConfig, VisionTransformer
from vtts_rt.models.vision import check_rope
from vtts_rt.types import Geometry, Parity, require

# The released models': OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers.
GEOMETRY = Geometry(
    patch_px=14,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    released=True,
)


class Qwen2_5_VL(VideoLM):
    model_type = "qwen2_5_vl"
    geometry = GEOMETRY
    chat = CHAT

    def __init__(self, config: ModelConfig) -> None:
        assert isinstance(config.vision, VisionConfig)
        super().__init__(config, VisionTransformer(config.vision, config.geometry))
        self._tokens_per_second = config.vision.tokens_per_second

    @classmethod
    def read_vision(cls, hf: Any) -> VisionConfig:
        def check(argument: str, value: object, ok: bool, rule: str) -> None:
            require("load_model", argument, value, ok, rule)

        for part in (hf.vision_config, hf.text_config):
            check("hidden_act", part.hidden_act, part.hidden_act == "silu", "'silu'")
        vision, speed = hf.vision_config, hf.vision_config.tokens_per_second
        check("tokens_per_second", speed, positive(speed), "a number > 0")
        check_rope(vision)
        side = cls.geometry.token_px
        check("window_size", vision.window_size, vision.window_size >= side, f">= {side}")
        return from_hf(VisionConfig, vision)

    def positions(self, parity: Parity) -> MropePositions:
        return MropePositions(parity, self._tokens_per_second)
