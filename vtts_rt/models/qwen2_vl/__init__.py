"""Qwen2-VL: a tower whose attention reaches the whole frame pair, positions that count pairs."""

from vtts_rt.models.qwen2_vl.model import Qwen2_VL, VisionConfig, VisionTransformer

__all__ = ["Qwen2_VL", "VisionConfig", "VisionTransformer"]
