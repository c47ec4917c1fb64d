"""Shapes of models: what every family's have, for transformers' names and numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vtts_rt.types import Geometry, SamplingParams


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """What every vision tower has; a family adds fields. Names follow transformers'
    `vision_config` where `to_hf` does not say another."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int

    @property
    def feature_dim(self) -> int:
        """Values of a token's features: more than one hidden size where later layers get some."""
        return self.out_hidden_size

    def to_hf(self) -> dict[str, Any]:
        """The fields as transformers' `vision_config` has them."""
        values = asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values}


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Shape of a language model; names follow transformers' `text_config`, which lacks those with a
    default after `max_position_embeddings` where its family fixes them.

    head_dim: 0 is hidden_size / num_attention_heads. qkv_bias: of the projections. qk_norm: queries
    and keys of a head are normalised before they are turned. mrope_interleaved: frequencies of the
    three axes alternate as long as sections last, then all are of time; otherwise the sections
    follow one another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    head_dim: int = 0
    qkv_bias: bool = True
    qk_norm: bool = False
    mrope_interleaved: bool = False

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model: its family by transformers' `model_type`, geometry, towers, special token ids,
    stop tokens, default perception settings and what the checkpoint says of sampling."""

    model_type: str
    geometry: Geometry
    vision: TowerConfig
    language: LanguageConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    perception: dict[str, Any] = field(default_factory=dict, hash=False)
    sampling: SamplingParams = SamplingParams()
