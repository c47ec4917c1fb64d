"""Qwen3_VL: its tower, and the shared language model with norms of queries and keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from vtts_rt.models.base import VideoLM
from vtts_rt.models.checkpoint import check, from_hf
from vtts_rt.models.qwen2_5_vl.chat import CHAT as QWEN2_5_CHAT
from vtts_rt.models.qwen3_vl.vision import VisionConfig, VisionTransformer
from vtts_rt.models.vision import check_tower
from vtts_rt.types import Geometry

# transformers, Qwen3VLVideoProcessor.
GEOMETRY = Geometry(patch_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# Its processor writes the time of a frame pair so, its chat template no system turn; boxes as in
# its cookbooks.
CHAT = replace(
    QWEN2_5_CHAT,
    time_label="<{seconds} seconds>",
    system="",
    per_pair=True,
    box_unit="thousandth",
)


class Qwen3_VL(VideoLM):
    model_type = "qwen3_vl"
    geometry = GEOMETRY
    chat = CHAT
    language_fields = {
        "mrope_section": (24, 20, 20),  # transformers, Qwen3VLTextRotaryEmbedding
        "mrope_interleaved": True,
        "qk_norm": True,
        "qkv_bias": False,
    }
    bounds_clips = True

    tower = VisionTransformer

    @classmethod
    def read_vision(cls, hf: Any) -> VisionConfig:
        text, part = hf.text_config, check_tower(hf, "gelu_pytorch_tanh")
        check("attention_bias", text.attention_bias, not text.attention_bias, "False")
        places, levels = part.num_position_embeddings, list(part.deepstack_visual_indexes)
        square = math.isqrt(places) ** 2 == places
        check("num_position_embeddings", places, square, "a square number")
        ascending = levels == sorted(set(levels)) and all(0 <= i < part.depth for i in levels)
        check("deepstack_visual_indexes", levels, ascending, f"ascending, in 0..{part.depth - 1}")
        fits = len(levels) < text.num_hidden_layers
        rule = f"fewer than num_hidden_layers ({text.num_hidden_layers})"
        check("deepstack_visual_indexes", levels, fits, rule)
        return from_hf(VisionConfig, part)
