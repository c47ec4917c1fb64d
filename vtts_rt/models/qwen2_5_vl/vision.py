"""The Qwen2.5-VL vision tower: windows in most blocks, RMS norms and gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vtts_rt.models import vision
from vtts_rt.models.config import TowerConfig
from vtts_rt.models.layers import GatedMLP, RMSNorm
from vtts_rt.types import Geometry


@dataclass(frozen=True, slots=True)
class VisionConfig(TowerConfig):
    """Shape of the tower; names follow transformers' `vision_config`."""

    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = ()
    tokens_per_second: int = 2


class VisionTransformer(vision.VisionTransformer):
    def __init__(self, config: VisionConfig, geometry: Geometry) -> None:
        super().__init__(
            config,
            geometry,
            RMSNorm,
            partial(GatedMLP, bias=True),
            vision.PatchMerger(config, RMSNorm),
            window_tokens=config.window_size // geometry.token_px,
            full_blocks=config.fullatt_block_indexes,
        )
