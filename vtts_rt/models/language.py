"""The language model that families share: packed tokens and features -> hidden states -> logits.

One `forward(batch)` serves training (no cache, differentiable), prefill in chunks and decoding.

Shape letters: N packed tokens of all sequences, C channels, H query heads, K key/value heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vtts_rt.models.attention import Attend, PackedAttention, PagedKV
from vtts_rt.models.config import LanguageConfig
from vtts_rt.models.layers import (
    Embedding,
    GatedMLP,
    Linear,
    Packable,
    RMSNorm,
    inverse_frequencies,
)
from vtts_rt.ops.decode_step import (
    LayerWeights,
    StepWeights,
    decode_step,
    step_weights,
    usable,
)
from vtts_rt.ops.linear import linear
from vtts_rt.types import require

AttentionPlan = PackedAttention | PagedKV
# Rows of a step that nobody reads pass the last layer too: more of them, and what is not done for
# them by the layers one by one counts more than calls.
_MOST_UNWANTED = 16

__all__ = ["ForwardBatch", "LanguageModel", "PagedKV", "VisionRows"]


class VisionRows(NamedTuple):
    """Tokens of a batch that show vision.

    rows: (V,) int64, distinct rows of the batch, on the model's device. features: (V, feature_dim)
    of any float dtype, what the tower gave for each; gradients reach them. The first C values stand
    for the token's embedding, the next C are added behind layer 0, and so on (DeepStack).
    """

    rows: Tensor
    features: Tensor


@dataclass(slots=True)
class ForwardBatch:
    """New tokens of B sequences, packed one after the other.

    token_ids: (N,) int64. vision: which of them are pads of vision, with features; None for none.
    position_ids: (3, N) int64, M-RoPE time, height, width. cu_seqlens_q: (B + 1,) list or tensor,
        0 .. N. kv: pages that hold earlier tokens and take these; None attends inside each
        sequence only, with gradients. rows: (M,) int64, the packed rows whose hidden states are
        wanted; None for all. The last layer does for the others only what their keys and values
        need.
    """

    token_ids: Tensor
    vision: VisionRows | None
    position_ids: Tensor
    cu_seqlens_q: Sequence[int] | Tensor
    kv: PagedKV | None = None
    rows: Tensor | None = None

    @property
    def seqlens(self) -> list[int]:
        bounds = self.cu_seqlens_q
        bounds = bounds.tolist() if isinstance(bounds, Tensor) else list(bounds)
        return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]


class Attention(nn.Module):
    """Grouped-query attention; rows of `qkv_proj` are [queries; keys; values].

    q_norm, k_norm: of every head, or None.
    """

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, num_rows, bias=config.qkv_bias)
        self.o_proj = Linear(self.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttentionPlan, rows: Tensor | None
    ) -> Tensor:
        qkv = self.qkv_proj(x)
        qkv = qkv.view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, -1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        return self.o_proj(attend(self.layer, qkv, cos, sin, rows))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: AttentionPlan,
        rows: Tensor | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend, rows)
        x = x if rows is None else x.index_select(0, rows)
        normed, x = self.post_attention_layernorm.of_sum(attended, x)
        return x + self.mlp(normed)  # type: ignore[no-any-return]


class _Unchanged:
    """Tells whether a module still holds the same parts and tensors, each in the same place."""

    def __init__(self, module: nn.Module) -> None:
        tables = (t for m in module.modules() for t in (m._modules, m._parameters, m._buffers))
        self._tables = [table for table in tables if table]
        self._parts = [part for table in self._tables for part in table.values()]
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._places = [tensor.data_ptr() for tensor in self._tensors]

    def __bool__(self) -> bool:
        parts = chain.from_iterable(table.values() for table in self._tables)
        same = all(map(is_, parts, self._parts))
        return same and [tensor.data_ptr() for tensor in self._tensors] == self._places


class LanguageModel(nn.Module):
    """A decoder with multimodal rotary positions; head tied to the embedding or not.

    feature_dim: of the features it is given, a multiple of hidden_size; None is hidden_size.
    """

    def __init__(self, config: LanguageConfig, feature_dim: int | None = None) -> None:
        super().__init__()
        what, heads = "LanguageModel", config.num_attention_heads
        kv_heads = config.num_key_value_heads
        rule = f"a divisor of num_attention_heads ({heads})"
        require(what, "num_key_value_heads", kv_heads, heads % kv_heads == 0, rule)
        section, half = config.mrope_section, config.head_dim // 2
        fits = len(section) == 3 and sum(section) == half
        rule = f"three numbers that sum to head_dim / 2 ({half})"
        require(what, "mrope_section", section, fits, rule)
        self.config = config
        self._feature_dim = feature_dim or config.hidden_size
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._gathered: tuple[_Unchanged | None, StepWeights | None] = None, None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Packable | None = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def embed(self, batch: ForwardBatch) -> Tensor:
        """(N, C): embeddings of tokens, features in the place of pads; differentiable."""
        x: Tensor = self.embed_tokens(batch.token_ids)
        if batch.vision is None:
            return x
        rows, features = batch.vision
        shape, expected = tuple(features.shape), (len(rows), self._feature_dim)
        require("VisionRows", "features", shape, shape == expected, f"{expected}")
        return x.index_copy(0, rows, features[:, : x.shape[1]].to(x.dtype))

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states (N, C) after the final norm, in the model's dtype, or (M, C)
        for `batch.rows`.

        With `batch.kv` the pages are written in place and no gradient is recorded.
        """
        x = self.embed(batch)
        seqlens = batch.seqlens
        total, shape = x.shape[0], tuple(batch.position_ids.shape)
        require("ForwardBatch", "cu_seqlens_q", sum(seqlens), sum(seqlens) == total, f"0..{total}")
        require("ForwardBatch", "position_ids", shape, shape == (3, total), f"(3, {total})")
        rows, kv = batch.rows, batch.kv
        if rows is not None and rows.is_cpu and rows.numel():  # elsewhere the host would wait
            inside = int(rows.min()) >= 0 and int(rows.max()) < total
            require("ForwardBatch", "rows", rows.tolist(), inside, f"in [0, {total})")
        if total == 0:
            return x
        with torch.set_grad_enabled(torch.is_grad_enabled() and kv is None):
            cos, sin = self._rotary(batch.position_ids, x.dtype)
            vision = batch.vision
            levels: tuple[Tensor, ...] = ()
            if vision is not None:
                levels = torch.split(vision.features.to(x.dtype), x.shape[1], dim=1)[1:]
            if kv is not None and not levels:
                out = self._in_one_call(x, cos, sin, kv, total if rows is None else len(rows))
                if out is not None:
                    return out if rows is None else out[rows]
            kv_heads = self.config.num_key_value_heads
            attend = PackedAttention(seqlens, kv_heads) if kv is None else kv
            *others, last = self.layers
            for layer, level in zip_longest(others, levels):
                x = layer(x, cos, sin, attend)
                if vision is not None and level is not None:
                    x = x.index_add(0, vision.rows, level)
            x = last(x, cos, sin, attend, rows)
            return self.norm(x)  # type: ignore[no-any-return]

    def _in_one_call(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv: PagedKV, num_wanted: int
    ) -> Tensor | None:
        """Few rows on the CPU: the same bits from one native call. None where that cannot be."""
        call = kv.only_call
        if call is None or not usable(x, self.config.head_dim) or not self._fits(x, kv, call):
            return None  # a prefill, other types, a backend that was asked for, or a mistake
        if len(x) - num_wanted > _MOST_UNWANTED:
            return None
        weights = self._step_weights()
        if weights is None:
            return None
        return decode_step(
            x.contiguous(),
            weights,
            pages=kv.pages,
            cos=cos,
            sin=sin,
            slots=kv.slot_mapping.contiguous(),
            page_table=call.page_table,
            cu_seqlens_q=call.cu_seqlens_q,
            seqlens_k=call.seqlens_k,
            eps=self.config.rms_norm_eps,
        )

    def _step_weights(self) -> StepWeights | None:
        """Gathered once and again whenever a weight was replaced or moved."""
        unchanged, weights = self._gathered
        if not unchanged:
            layers, config = [], self.config
            for layer in self.layers:
                assert isinstance(layer, DecoderLayer)
                attention, mlp = layer.self_attn, layer.mlp
                products = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
                qkv, output, gate_up, down = (product.matrix for product in products)
                norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
                q_norm, k_norm = (
                    None if n is None else n.weight for n in (attention.q_norm, attention.k_norm)
                )
                bias = attention.qkv_proj.bias
                own = norms[0], qkv, bias, q_norm, k_norm, output, norms[1], gate_up, down
                layers.append(LayerWeights(*own))
            weights = step_weights(
                layers,
                self.norm.weight,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
            )
            self._gathered = _Unchanged(self), weights
        return weights

    def _fits(self, x: Tensor, kv: PagedKV, call: Attend) -> bool:
        """Whether addresses are enough: what does not fit goes to ops that say what is wrong."""
        config, pages, slots = self.config, kv.pages, kv.slot_mapping
        sides = pages.dim() == 6 and (*pages.shape[:2], *pages.shape[4:])
        return (
            x.shape == (x.shape[0], config.hidden_size)
            and sides == (config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
            and pages.dtype is x.dtype
            and pages.is_cpu
            and pages.is_contiguous()
            and slots.dtype is torch.int64
            and slots.is_cpu
            and slots.shape == x.shape[:1]
            and call.page_table.dtype is torch.int64
            and call.stop == len(slots)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (N, C) -> (N, vocab_size), in the model's dtype."""
        if self.lm_head is None:
            return linear(hidden, self.embed_tokens.matrix)
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin: (N, D/2), rounded to dtype as transformers does, on the CPU held in float32 or
        wider. Angles are fp32, each of the axis of its frequency."""
        inv_freq, axis_of = self._frequencies(position_ids.device)
        angles = position_ids.index_select(0, axis_of).T.float().contiguous() * inv_freq
        held = torch.promote_types(dtype, torch.float32) if angles.is_cpu else dtype
        return angles.cos().to(dtype).to(held), angles.sin().to(dtype).to(held)

    def _frequencies(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(D/2,) fp32 frequencies and the axis of each, moved to a device once."""
        if device not in self._on_device:
            config = self.config
            with torch.inference_mode(False):  # training may take them later
                section = config.mrope_section
                axis_of = torch.arange(3).repeat_interleave(torch.tensor(section))
                if config.mrope_interleaved:
                    axis_of.zero_()
                    for axis in (1, 2):
                        axis_of[axis : 3 * section[axis] : 3] = axis
                axis_of = axis_of.to(device)
                inv_freq = inverse_frequencies(config.head_dim, config.rope_theta).to(device)
            self._on_device[device] = inv_freq, axis_of
        return self._on_device[device]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype
