"""Qwen2.5-VL: a tower whose attention is local to windows in most blocks."""

from vtts_rt.models.qwen2_5_vl.model import GEOMETRY, Qwen2_5_VL
from vtts_rt.models.qwen2_5_vl.vision import VisionConfig

__all__ = ["GEOMETRY", "Qwen2_5_VL", "VisionConfig"]
