"""Qwen3-VL: features for several layers of the language model, and times as text."""

from vtts_rt.models.qwen3_vl.model import GEOMETRY, Qwen3_VL
from vtts_rt.models.qwen3_vl.vision import VisionConfig, VisionTransformer

__all__ = ["GEOMETRY", "Qwen3_VL", "VisionConfig", "VisionTransformer"]
