"""The Qwen3-VL vision tower: whole pairs, learned positions, and DeepStack.

Beside what the last block leaves, features hold what some blocks before it leave, each through a
merger of its own, for the first layers of the language model (arXiv 2406.04334).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtts_rt.models import vision
from vtts_rt.models.config import TowerConfig
from vtts_rt.models.layers import LayerNorm, Linear
from vtts_rt.models.vision import MERGE_UNIT, NORM_EPS, GridTHW, VisionPlan
from vtts_rt.ops.gelu import gelu
from vtts_rt.types import MERGE_SIZE, Geometry


@dataclass(frozen=True, slots=True)
class VisionConfig(TowerConfig):
    """Shape of the tower; names follow transformers' `vision_config`.

    num_position_embeddings: of a square grid. deepstack_visual_indexes: ascending, of the blocks
    behind which features for layers 0, 1, .. of the language model are taken.
    """

    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = ()

    @property
    def feature_dim(self) -> int:
        return self.out_hidden_size * (1 + len(self.deepstack_visual_indexes))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), the gelu by tanh."""

    def __init__(self, num_channels: int, num_hidden: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(num_channels, num_hidden)
        self.linear_fc2 = Linear(num_hidden, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(self.linear_fc1(x), "tanh")
        return self.linear_fc2(x)  # type: ignore[no-any-return]


class PatchMerger(nn.Module):
    """(P, C) -> (P / 4, out): as `vision.PatchMerger`, or with a norm over the 4 patch rows of a
    token (`joint`)."""

    def __init__(self, config: TowerConfig, joint: bool) -> None:
        super().__init__()
        hidden = config.hidden_size * MERGE_UNIT
        self.norm = LayerNorm(hidden if joint else config.hidden_size, NORM_EPS)
        self.linear_fc1 = Linear(hidden, hidden)
        self.linear_fc2 = Linear(hidden, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, *self.norm.normalized_shape))
        x = gelu(self.linear_fc1(x.view(-1, self.linear_fc1.in_features)))
        return self.linear_fc2(x)  # type: ignore[no-any-return]


class VisionTransformer(vision.VisionTransformer):
    config: VisionConfig

    def __init__(self, config: VisionConfig, geometry: Geometry) -> None:
        merger = PatchMerger(config, joint=False)
        super().__init__(config, geometry, LayerNorm, VisionMLP, merger, embed_bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, joint=True) for _ in config.deepstack_visual_indexes
        )

    def _layers(self, x: Tensor, plan: VisionPlan, grids: Sequence[GridTHW]) -> Tensor:
        places = self._places(grids).to(x.dtype).view(-1, MERGE_UNIT, x.shape[1])
        x = x + places.index_select(0, plan.order).flatten(0, 1)
        levels: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, plan)
            if index in self.config.deepstack_visual_indexes:
                levels.append(self.deepstack_merger_list[len(levels)](x))
        return torch.cat([self.merger(x), *levels], dim=1).index_select(0, plan.restore)

    def _places(self, grids: Sequence[GridTHW]) -> Tensor:
        """(P, C) float32: the learned positions stretched over each grid, corners on corners."""
        side = math.isqrt(self.config.num_position_embeddings)
        learned = self.pos_embed.weight.float().T.view(1, -1, side, side)
        found: dict[tuple[int, int], Tensor] = {}
        for _, *grid in grids:
            h, w = grid
            if (h, w) not in found:
                every = F.interpolate(learned, (h, w), mode="bilinear", align_corners=True)
                tokens = every.view(-1, h // MERGE_SIZE, MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE)
                found[h, w] = tokens.permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        return torch.cat([found[h, w].repeat(t, 1) for t, h, w in grids])
