"""The Qwen2.5-VL language model: packed embeddings -> hidden states -> logits.

One `forward(batch)` serves training (no cache, differentiable), prefill in chunks and decoding.

Shape letters: N packed tokens of all sequences, C channels, H query heads, K key/value heads,
D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtts_rt.config import LanguageConfig
from vtts_rt.models.attention import PackedAttention, PagedAttention, PagedKV
from vtts_rt.models.layers import GatedMLP, RMSNorm, inverse_frequencies, rotate
from vtts_rt.types import require

__all__ = ["ForwardBatch", "LanguageModel", "PagedKV"]


@dataclass(slots=True)
class ForwardBatch:
    """New tokens of B sequences, packed one after the other.

    inputs_embeds: (N, C) in the model's dtype. position_ids: (3, N) int64, M-RoPE time, height,
        width. cu_seqlens_q: (B + 1,) list or tensor, 0 .. N. kv: pages that hold earlier tokens
        and take these; None attends inside each sequence only, with gradients. last_only: no
        hidden states but those of each sequence's last token (with kv); the last layer then
        does for the others what their keys and values need.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    cu_seqlens_q: Sequence[int] | Tensor
    kv: PagedKV | None = None
    last_only: bool = False

    @property
    def seqlens(self) -> list[int]:
        bounds = self.cu_seqlens_q
        bounds = bounds.tolist() if isinstance(bounds, Tensor) else list(bounds)
        return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]


class Attention(nn.Module):
    """Grouped-query attention; rows of `qkv_proj` are [queries; keys; values]."""

    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, num_rows)
        self.o_proj = nn.Linear(self.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: PackedAttention | PagedAttention
    ) -> Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], self.num_heads + 2 * self.num_kv_heads, -1)
        qk = rotate(qkv[:, : -self.num_kv_heads], cos, sin)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        return self.o_proj(attend(self.layer, q, k, qkv[:, -self.num_kv_heads :]))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: PackedAttention | PagedAttention
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = (x if attend.rows is None else x[attend.rows]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Qwen2.5's decoder with multimodal rotary positions; head tied to the embedding or not."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        require(
            "LanguageModel",
            "num_key_value_heads",
            kv_heads,
            heads % kv_heads == 0,
            f"a divisor of num_attention_heads ({heads})",
        )
        require(
            "LanguageModel",
            "mrope_section",
            config.mrope_section,
            len(config.mrope_section) == 3 and sum(config.mrope_section) == config.head_dim // 2,
            f"three numbers that sum to head_dim / 2 ({config.head_dim // 2})",
        )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: (N,) int64 -> (N, C)."""
        return self.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states (N, C) after the final norm, in the model's dtype; with `last_only` one
        row for each sequence that has new tokens.

        With `batch.kv` the pages are written in place and no gradient is recorded.
        """
        x = batch.inputs_embeds
        seqlens = batch.seqlens
        total, shape = x.shape[0], tuple(batch.position_ids.shape)
        require("ForwardBatch", "cu_seqlens_q", sum(seqlens), sum(seqlens) == total, f"0..{total}")
        has_kv = batch.kv is not None
        require("ForwardBatch", "last_only", batch.last_only, has_kv >= batch.last_only, "with kv")
        require("ForwardBatch", "position_ids", shape, shape == (3, total), f"(3, {total})")
        if total == 0:
            return x
        with torch.set_grad_enabled(torch.is_grad_enabled() and batch.kv is None):
            cos, sin = self._rotary(batch.position_ids, x.dtype)
            attend = (
                PackedAttention(seqlens)
                if batch.kv is None
                else PagedAttention(batch.kv, seqlens, x.dtype)
            )
            *others, last = self.layers
            for layer in others:
                x = layer(x, cos, sin, attend)
            if batch.last_only and isinstance(attend, PagedAttention):
                attend = attend.of_last_rows()
            x = last(x, cos, sin, attend)
            return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (N, C) -> (N, vocab_size), in the model's dtype."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def store_wide_matrices_by_columns(self) -> None:
        """Lay matrices with more outputs than inputs out by columns; shapes and values stay.

        One token's product is then one sweep over memory. Measured in float32 on 2 cores of an
        AVX2 machine: the head, 151,936 x 512, 28 -> 15 ms; gate and up, 2,816 x 512, 0.50 ->
        0.30 ms; products of many rows and looking up embeddings cost what they did. For float32
        on the CPU only: elsewhere nothing is done (bfloat16 there: 11 -> 85 ms for the head).
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        linears = [module for module in self.layers.modules() if isinstance(module, nn.Linear)]
        for weight in (module.weight for module in (head, *linears)):
            wide = weight.shape[0] > weight.shape[1]
            if wide and weight.device.type == "cpu" and weight.dtype == torch.float32:
                weight.data = weight.data.t().contiguous().t()

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin: (N, 1, D/2). Angles are fp32; frequency i takes the axis of its section."""
        config, device = self.config, position_ids.device
        inv_freq = inverse_frequencies(config.head_dim, config.rope_theta).to(device)
        axis_of = [axis for axis, width in enumerate(config.mrope_section) for _ in range(width)]
        angles = position_ids[axis_of].T.float() * inv_freq
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype
