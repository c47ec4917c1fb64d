"""Qwen2_5_VL: the family's tower beside the shared language model."""

from __future__ import annotations

from typing import Any

from vtts_rt.models.base import VideoLM
from vtts_rt.models.checkpoint import check, from_hf, positive
from vtts_rt.models.mrope import MropePositions
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.qwen2_5_vl.vision import VisionConfig, VisionTransformer
from vtts_rt.models.vision import check_tower
from vtts_rt.types import Geometry, Parity

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

    tower = VisionTransformer

    @classmethod
    def read_vision(cls, hf: Any) -> VisionConfig:
        vision = check_tower(hf, "silu")
        speed = vision.tokens_per_second
        check("tokens_per_second", speed, positive(speed), "a number > 0")
        side = cls.geometry.token_px
        check("window_size", vision.window_size, vision.window_size >= side, f">= {side}")
        return from_hf(VisionConfig, vision)

    def positions(self, parity: Parity) -> MropePositions:
        assert isinstance(self.config.vision, VisionConfig)
        return MropePositions(parity, self.config.vision.tokens_per_second)
