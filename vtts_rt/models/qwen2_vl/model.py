"""Qwen2_VL: its tower beside the shared language model; the chat format is Qwen2.5-VL's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vtts_rt.models import vision
from vtts_rt.models.base import VideoLM
from vtts_rt.models.config import TowerConfig
from vtts_rt.models.layers import LayerNorm, Linear
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.ops.gelu import gelu
from vtts_rt.types import Geometry, require


@dataclass(frozen=True, slots=True)
class VisionConfig(TowerConfig):
    """Shape of the tower; ValueError unless intermediate_size is a multiple of hidden_size."""

    def __post_init__(self) -> None:
        hidden, inner = self.hidden_size, self.intermediate_size
        fits = inner >= hidden and inner % hidden == 0
        require("VisionConfig", "intermediate_size", inner, fits, f"a multiple of {hidden}")

    def to_hf(self) -> dict[str, Any]:
        return {
            "depth": self.depth,
            "num_heads": self.num_heads,
            "embed_dim": self.hidden_size,
            "mlp_ratio": self.intermediate_size // self.hidden_size,
            "hidden_size": self.out_hidden_size,
        }


class VisionMLP(nn.Module):
    """fc2(quick_gelu(fc1(x)))."""

    def __init__(self, num_channels: int, num_hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(num_channels, num_hidden)
        self.fc2 = Linear(num_hidden, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), "sigmoid"))  # type: ignore[no-any-return]


class VisionTransformer(vision.VisionTransformer):
    """The Qwen2-VL vision tower: attention over whole frame pairs, layer norms and plain MLPs."""

    def __init__(self, config: VisionConfig, geometry: Geometry) -> None:
        merger = vision.PatchMerger(config, LayerNorm)
        super().__init__(config, geometry, LayerNorm, VisionMLP, merger)


class Qwen2_VL(VideoLM):
    model_type = "qwen2_vl"
    geometry = replace(GEOMETRY, released=False)
    chat = CHAT

    tower = VisionTransformer

    @classmethod
    def read_vision(cls, hf: Any) -> VisionConfig:
        part = vision.check_tower(hf, "quick_gelu")
        width = part.embed_dim
        return VisionConfig(
            part.depth, width, part.num_heads, width * part.mlp_ratio, part.hidden_size
        )
