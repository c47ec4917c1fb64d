"""The vision tower that families share: patch rows or frames -> merged features, pair by pair.

All attention stays inside a frame pair, so pairs of any sizes go through together and a pair's
features do not depend on its company. Inside a pair attention is local to windows except in full
blocks; the order of windows is free, so rows are laid out by window length and equal windows of
all pairs share one attention call. Without windows a pair is one window. On a CPU a few pairs at a
time go through the whole tower, so that what a layer leaves is still in the cache when the next one
reads it.

Shape letters: P patch rows, T merged tokens (P / 4), C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vtts_rt.models.config import TowerConfig
from vtts_rt.models.layers import LayerNorm, Linear, RMSNorm, inverse_frequencies
from vtts_rt.ops.gelu import gelu
from vtts_rt.ops.patch_embed import PatchEmbedWeight, numerics, patch_embed
from vtts_rt.ops.patch_jobs import PatchifyJob, check_size
from vtts_rt.ops.rotary import rotary
from vtts_rt.ops.segment_attention import Run, segment_attention
from vtts_rt.types import MERGE_SIZE, Geometry, require

# transformers, the default of towers' configs and the constant of their blocks.
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6

MERGE_UNIT = MERGE_SIZE * MERGE_SIZE  # patch rows of a merged token

WHOLE_PAIR = 1 << 30  # merged tokens along the side of a window that holds any pair

GridTHW = tuple[int, int, int]
Norm = type[RMSNorm] | type[LayerNorm]
MLP = Callable[[int, int], nn.Module]  # of (channels, hidden channels)

# Patch rows that go through the tower together on a CPU; a pair of more rows goes alone. What is
# no matrix product then stays in the cache, and memory is reused instead of fetched anew from the
# system (57,000 page faults in a pass of 3,360 rows, none in parts). Those 3,360 rows: 1.15 s of
# CPU time at 1,024, 1.16 at 512, 1.30 in one go (118 M model, one AVX2 core, a busy machine).
ROWS_AT_ONCE = 1024


def check_tower(hf: Any, activation: str) -> Any:
    """The `vision_config` of transformers' config. ValueError if it asks for another activation
    or other rotary angles than these, or the language model for another activation than SiLU."""
    part = hf.vision_config
    for act, rule in ((part.hidden_act, activation), (hf.text_config.hidden_act, "silu")):
        require("load_model", "hidden_act", act, act == rule, f"'{rule}'")
    rope = getattr(part, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", ROPE_THETA)
    require("load_model", "vision rope_theta", theta, theta == ROPE_THETA, str(ROPE_THETA))
    return part


@dataclass(frozen=True, slots=True)
class WindowClass:
    """The windows of one grid that have the same size.

    tokens: (num_windows * window_tokens,) int64, raster token indices inside the pair, window
        after window. cos, sin: (rows, D/2) float32, of the rotary angles of the patch rows of
        those tokens.
    """

    window_tokens: int
    tokens: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """Where everything is in one forward pass.

    order, restore: (T,) int64, tokens from processor order to layout order and back.
    cos, sin: (P, D/2) float32 in layout order. windows, pairs: attention runs; `pairs` count
    rows in pair order, which `to_pairs` (P,) makes of layout order and `from_pairs` undoes; both
    are None when the rows of each pair stand together anyway.
    """

    order: Tensor
    restore: Tensor
    cos: Tensor
    sin: Tensor
    windows: tuple[Run, ...]
    pairs: tuple[Run, ...]
    to_pairs: Tensor | None
    from_pairs: Tensor | None


@lru_cache(maxsize=256)
def window_classes(
    height: int, width: int, window_tokens: int, head_dim: int, device: torch.device
) -> tuple[WindowClass, ...]:
    """Window classes of a grid of height x width patches, largest windows first.

    window_tokens: merged tokens along a window's side. Windows at the right and lower edge are
    smaller when the side does not divide the grid.
    """
    # Cached tensors may serve training later: they must not be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        rows, columns = height // MERGE_SIZE, width // MERGE_SIZE
        raster = torch.arange(rows * columns).view(rows, columns)
        by_size: dict[int, list[Tensor]] = {}
        for top in range(0, rows, window_tokens):
            for left in range(0, columns, window_tokens):
                window = raster[top : top + window_tokens, left : left + window_tokens].flatten()
                by_size.setdefault(window.numel(), []).append(window)

        inv_freq = inverse_frequencies(head_dim // 2, ROPE_THETA)
        inside = torch.arange(MERGE_UNIT)
        classes = []
        for size, windows in sorted(by_size.items(), reverse=True):
            tokens = torch.cat(windows)
            y = (tokens // columns * MERGE_SIZE)[:, None] + inside // MERGE_SIZE
            x = (tokens % columns * MERGE_SIZE)[:, None] + inside % MERGE_SIZE
            angles = torch.stack((y, x), dim=-1).view(-1, 2, 1).float() * inv_freq
            angles = angles.flatten(1)  # (rows, D/2): [h, w]
            places = tokens, angles.cos(), angles.sin()
            classes.append(WindowClass(size, *(place.to(device) for place in places)))
    return tuple(classes)


def plan_vision(
    grids: Sequence[GridTHW], window_tokens: int, head_dim: int, device: torch.device
) -> VisionPlan:
    """Lay out the frame pairs of `grids`: by window size, then grid, pair and window."""
    # Pairs of equal size sit together whatever item they came from.
    offsets: dict[tuple[int, int], list[int]] = {}
    num_tokens = 0
    for t, h, w in grids:
        step = h * w // MERGE_UNIT
        offsets.setdefault((h, w), []).extend(range(num_tokens, num_tokens + t * step, step))
        num_tokens += t * step

    chunks: list[tuple[int, tuple[int, int], WindowClass]] = []
    for h, w in offsets:
        for cls in window_classes(h, w, window_tokens, head_dim, device):
            chunks.append((cls.window_tokens, (h, w), cls))
    chunks.sort(key=lambda chunk: -chunk[0])  # stable: grids keep their order inside a size

    order: list[Tensor] = []
    cos: list[Tensor] = []
    sin: list[Tensor] = []
    windows: list[Run] = []
    rows_of: dict[tuple[int, int], list[Tensor]] = {grid: [] for grid in offsets}
    start = 0
    for size, grid, cls in chunks:
        num_pairs = len(offsets[grid])
        first = torch.tensor(offsets[grid], device=device)
        order.append((first[:, None] + cls.tokens).flatten())
        cos.append(cls.cos.repeat(num_pairs, 1))
        sin.append(cls.sin.repeat(num_pairs, 1))
        num_rows = num_pairs * cls.tokens.numel() * MERGE_UNIT
        length = size * MERGE_UNIT
        if windows and windows[-1].length == length:
            last = windows.pop()
            windows.append(Run(last.start, last.num + num_rows // length, length))
        else:
            windows.append(Run(start, num_rows // length, length))
        rows = torch.arange(start, start + num_rows, device=device)
        rows_of[grid].append(rows.view(num_pairs, -1))
        start += num_rows

    pairs: list[Run] = []
    to_pairs: list[Tensor] = []
    start = 0
    for (h, w), parts in rows_of.items():
        pairs.append(Run(start, len(offsets[h, w]), h * w))
        to_pairs.append(torch.cat(parts, dim=1).flatten())
        start += len(offsets[h, w]) * h * w
    # Apart only if there are several, of more than one grid or window size; attention does not
    # ask for the order inside a pair.
    apart = sum(map(len, offsets.values())) > 1 and len(chunks) > 1
    forth = torch.cat(to_pairs) if apart else None
    all_tokens = torch.cat(order)
    return VisionPlan(
        order=all_tokens,
        restore=torch.argsort(all_tokens),
        cos=torch.cat(cos),
        sin=torch.cat(sin),
        windows=tuple(windows),
        pairs=tuple(pairs),
        to_pairs=forth,
        from_pairs=None if forth is None else torch.argsort(forth),
    )


def group_pairs(grids: Sequence[GridTHW], max_rows: int) -> Iterator[list[GridTHW]]:
    """The pairs of all items in parts of at most `max_rows` patch rows, but at least one pair."""
    part: list[GridTHW] = []
    num_rows = 0
    for t, h, w in grids:
        for _ in range(t):
            if part and num_rows + h * w > max_rows:
                yield part
                part, num_rows = [], 0
            part.append((1, h, w))
            num_rows += h * w
    yield part


class VisionAttention(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, plan: VisionPlan, full: bool) -> Tensor:
        heads = self.num_heads
        qkv = self.qkv(x).view(x.shape[0], 3 * heads, -1)
        qk = rotary(qkv[:, : 2 * heads], plan.cos, plan.sin)
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, 2 * heads :]
        if not full:
            out = segment_attention(q, k, v, plan.windows)
        elif plan.to_pairs is None or plan.from_pairs is None:
            out = segment_attention(q, k, v, plan.pairs)
        else:
            q, k, v = (t.index_select(0, plan.to_pairs) for t in (q, k, v))
            out = segment_attention(q, k, v, plan.pairs).index_select(0, plan.from_pairs)
        return self.proj(out)  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    def __init__(self, config: TowerConfig, full: bool, norm: Norm, mlp: MLP) -> None:
        super().__init__()
        self.full = full
        self.norm1 = norm(config.hidden_size, NORM_EPS)
        self.norm2 = norm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, plan: VisionPlan) -> Tensor:
        normed, x = self.norm2.of_sum(self.attn(self.norm1(x), plan, self.full), x)
        return x + self.mlp(normed)  # type: ignore[no-any-return]


class PatchMerger(nn.Module):
    """Norm, then a two-layer MLP over the 4 patch rows of each token: (P, C) -> (P/4, out)."""

    def __init__(self, config: TowerConfig, norm: Norm) -> None:
        super().__init__()
        hidden = config.hidden_size * MERGE_UNIT
        self.ln_q = norm(config.hidden_size, NORM_EPS)
        self.mlp = nn.Sequential(
            Linear(hidden, hidden), nn.GELU(), Linear(hidden, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        up, _, down = self.mlp
        return down(gelu(up(self.ln_q(x).view(-1, up.in_features))))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A ViT with merger. Differentiable; holds no state between calls.

    norm, mlp: of every block. merger: (P, C) in layout order -> (P / 4, out). window_tokens: merged
    tokens along a window's side; full_blocks: blocks whose attention reaches the whole pair anyway.
    embed_bias: of the product with patch rows.
    """

    def __init__(
        self,
        config: TowerConfig,
        geometry: Geometry,
        norm: Norm,
        mlp: MLP,
        merger: nn.Module,
        window_tokens: int = WHOLE_PAIR,
        full_blocks: Collection[int] = (),
        embed_bias: bool = False,
    ) -> None:
        super().__init__()
        require(
            "VisionTransformer",
            "hidden_size",
            config.hidden_size,
            config.hidden_size % (4 * config.num_heads) == 0,
            f"a multiple of 4 * num_heads ({4 * config.num_heads})",
        )
        self.config = config
        self.head_dim = config.hidden_size // config.num_heads
        self.geometry = geometry
        self.window_tokens = window_tokens
        # A convolution whose stride is its kernel is a matrix product over patch rows.
        self.patch_embed = Linear(geometry.row_size, config.hidden_size, bias=embed_bias)
        self.blocks = nn.ModuleList(
            VisionBlock(config, index in full_blocks, norm, mlp) for index in range(config.depth)
        )
        self.merger = merger
        self._embed: PatchEmbedWeight | None = None

    def forward(self, rows: Tensor, grid_thw: Sequence[GridTHW]) -> Tensor:
        """Features of frame pairs.

        rows: (P, row size) patch rows in the order of transformers' processor (each 4 rows are one
            merged token, tokens in raster order, pair after pair), any float dtype; cast to the
            tower's. grid_thw: per item (pairs, patch rows, patch columns), both even;
            P = sum of their products.
        Returns (P / 4, feature_dim) in the tower's dtype, tokens in the order of `rows`.
        """
        grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw]
        for grid in grids:
            even = grid[1] % MERGE_SIZE == 0 and grid[2] % MERGE_SIZE == 0
            ok = min(grid) >= 1 and even
            require("VisionTransformer", "grid_thw", grid, ok, "positive with even height, width")
        expected = (sum(t * h * w for t, h, w in grids), self.geometry.row_size)
        shape = tuple(rows.shape)
        require("VisionTransformer", "rows", shape, shape == expected, f"of shape {expected}")
        if not grids:
            return rows.new_empty(0, self.config.feature_dim, dtype=self.dtype)
        if rows.device.type != "cpu":
            return self._encode(rows, grids)
        parts = list(group_pairs(grids, ROWS_AT_ONCE))
        sizes = [sum(h * w for _, h, w in part) for part in parts]
        chunks = zip(torch.split(rows, sizes), parts, strict=True)
        return torch.cat([self._encode(chunk, part) for chunk, part in chunks])

    def _encode(self, rows: Tensor, grids: Sequence[GridTHW]) -> Tensor:
        """Everything through one layer before the next: (P, row size) -> (P / 4, feature_dim)."""
        plan = plan_vision(grids, self.window_tokens, self.head_dim, rows.device)
        x = self.patch_embed(rows.to(self.dtype))
        x = x.view(-1, MERGE_UNIT, x.shape[-1]).index_select(0, plan.order).flatten(0, 1)
        return self._layers(x, plan, grids)

    def _layers(self, x: Tensor, plan: VisionPlan, grids: Sequence[GridTHW]) -> Tensor:
        """Embedded rows (P, C) of `grids` in layout order -> features in processor order."""
        for block in self.blocks:
            x = block(x, plan)
        return self.merger(x).index_select(0, plan.restore)  # type: ignore[no-any-return]

    def encode_jobs(self, jobs: Sequence[PatchifyJob]) -> Tensor:
        """Features straight from frames: `patchify` and `forward` in one, rows that come out of
        `patch_embed` in the order of windows. On the device of the tower, where frames must be.

        jobs: a frame pair each. Returns as `forward`. Raises as `patch_embed`.
        """
        for job in jobs:
            check_size("VisionTransformer", job.resized_hw, self.geometry)
        weight, bias = self.patch_embed.weight, self.patch_embed.bias
        if not jobs:
            return weight.new_empty(0, self.config.feature_dim)
        embed = self._embed
        if embed is None or embed.weight is not weight or embed.bias is not bias:
            self._embed = embed = PatchEmbedWeight(weight, self.geometry, bias)
        grids = [(1, *self.geometry.grid_hw(job.resized_hw)) for job in jobs]
        parts = group_pairs(grids, ROWS_AT_ONCE) if weight.is_cpu else [grids]
        features, done = [], 0
        for part in parts:
            plan = plan_vision(part, self.window_tokens, self.head_dim, weight.device)
            batch, done = jobs[done : done + len(part)], done + len(part)
            x = patch_embed(batch, embed, places=plan.restore)
            features.append(self._layers(x, plan, part))
        return features[0] if len(features) == 1 else torch.cat(features)

    @property
    def embed_numerics(self) -> str:
        """Whether `encode_jobs` multiplies official rows, with the bits of `forward` at equal
        shapes, or may fold (`vtts_rt.ops.patch_embed.numerics`)."""
        return numerics(self.patch_embed.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.weight.dtype
