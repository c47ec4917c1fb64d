"""VideoLM: what the engine, the runtime and training know of a model, whatever its family.

A family is a folder beside this file with a subclass of `VideoLM`; models/registry.py lists them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vtts_rt.models.config import ModelConfig, TowerConfig
from vtts_rt.models.language import ForwardBatch, LanguageModel, VisionRows
from vtts_rt.models.layers import Linear, Packable, plain_tensors
from vtts_rt.models.mrope import MropePositions
from vtts_rt.models.vision import VisionTransformer
from vtts_rt.models.weights import (
    EMBEDDING,
    LM_HEAD,
    PARTS,
    checked_tensors,
    hf_sources,
    hf_views,
)
from vtts_rt.ops.packed import pack
from vtts_rt.ops.patch_jobs import PatchifyJob
from vtts_rt.perception.chat import ChatFormat
from vtts_rt.types import Geometry, Parity, require

__all__ = ["PARTS", "ForwardBatch", "KVShape", "VideoLM", "VisionRows"]


class KVShape(NamedTuple):
    """What a token leaves in the KV cache: keys and values of num_layers x num_heads x head_dim."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    def bytes_of(self, num_tokens: int) -> int:
        per_token = 2 * self.num_layers * self.num_heads * self.head_dim
        return num_tokens * per_token * self.dtype.itemsize


class VideoLM(nn.Module, ABC):
    """A vision tower and a language model. The parts of a model are "visual" and "language".

    model_type: of the family, as in config.json. language_fields: what the family fixes of its
    `LanguageConfig`, and the mrope_section of a config.json that does not say. geometry: of the
    family, and of a model its own: a checkpoint may say another mean and std. chat: of all the
    family's checkpoints. bounds_clips: whether the sizes that its video processor allows are of all
    frames of a clip together. tower: of (config.vision, geometry). quantization: see
    models/quantize.py.
    """

    model_type: ClassVar[str]
    geometry: Geometry
    chat: ClassVar[ChatFormat]
    # transformers, the default of Qwen2-VL's and Qwen2.5-VL's rotary embeddings.
    language_fields: ClassVar[Mapping[str, Any]] = {"mrope_section": (16, 24, 24)}
    bounds_clips: ClassVar[bool] = False
    tower: ClassVar[type[VisionTransformer]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        out, hidden = config.vision.out_hidden_size, config.language.hidden_size
        name = type(self).__name__
        require(name, "out_hidden_size", out, out == hidden, f"hidden_size ({hidden})")
        self.config = config
        self.geometry = config.geometry
        self.visual = self.tower(config.vision, config.geometry)  # type: ignore[call-arg]
        self.language = LanguageModel(config.language, self.feature_dim)
        self.quantization: str | None = None
        self._versions: dict[str, str] = {}

    # -- a family's own ---------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def read_vision(cls, hf: Any) -> TowerConfig:
        """The tower's shape, of transformers' config. ValueError for what the family lacks."""

    def positions(self, parity: Parity) -> MropePositions:
        """What gives the positions of a new sequence: transformers', of pairs counted, where the
        family does not say."""
        return MropePositions("transformers", None)

    def encode(self, jobs: Sequence[PatchifyJob], rows: Tensor | None = None) -> Tensor:
        """Features of frame pairs, a job each: (tokens of all, feature_dim), in order.

        rows: (P, geometry.row_size) patch rows of the jobs as `patchify` gives them; None: made
        on the way, on the device of the model, where the frames are.
        """
        if rows is None:
            return self.visual.encode_jobs(jobs)
        grids = [(1, *self.geometry.grid_hw(job.resized_hw)) for job in jobs]
        features: Tensor = self.visual(rows, grids)
        return features

    @property
    def numerics(self) -> str:
        """How pixels become the tower's inputs on this device: part of what features depend on."""
        return "rows" if self.device.type == "cpu" else self.visual.embed_numerics

    # -- sizes ------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.language.dtype

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    @property
    def kv(self) -> KVShape:
        language = self.config.language
        heads, layers = language.num_key_value_heads, language.num_hidden_layers
        return KVShape(layers, heads, language.head_dim, self.dtype)

    @property
    def feature_dim(self) -> int:
        """Values that the tower gives for a token."""
        return self.config.vision.feature_dim

    # -- computing --------------------------------------------------------------------------

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states (N, C), see `LanguageModel.forward`."""
        hidden: Tensor = self.language(batch)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (N, C) -> (N, vocab_size), in the model's dtype."""
        return self.language.logits(hidden)

    def vision_rows(self, token_ids: Tensor, features: Tensor) -> VisionRows:
        """Features for the pads among the ids of prompts, in order. (What a model generated may
        hold a pad that is text: name the rows there.)

        token_ids: (N,) int64; features: (pads, feature_dim). ValueError if counts differ.
        """
        config = self.config
        pads = (token_ids == config.image_token_id) | (token_ids == config.video_token_id)
        rows = pads.nonzero()[:, 0]
        fits = len(features) == len(rows)
        require("vision_rows", "features", len(features), fits, f"one a pad ({len(rows)})")
        return VisionRows(rows, features)

    # -- weights ----------------------------------------------------------------------------

    def pack(self) -> None:
        """Keep the matrices of products as native kernels read them, where those run: the same
        values in the same order of sums, without the time that packing takes in every product.

        What only looks up rows stays plain, and `patch_embed`, whose op takes a plain one.
        """
        lookup = None if self.language.lm_head is None else self.language.embed_tokens
        for module in self.modules():
            if isinstance(module, Packable) and module not in (lookup, self.visual.patch_embed):
                module.pack()

    def version(self, part: str) -> str:
        """Hash of a part's weights: names, shapes, dtypes and all bytes (128 bits). Of the tower's
        also its config and geometry, mean and std among it.

        Taken on first use, about 1 ms a MB, and kept until `forget_versions`.
        """
        if part not in self._versions:
            tower, digest = self.get_submodule(part), hashlib.blake2b(digest_size=16)
            if part == "visual":
                digest.update(repr((self.config.vision, self.geometry)).encode())
            for key, tensor in plain_tensors(tower):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype};".encode())
                raw = tensor.cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
            self._versions[part] = digest.hexdigest()
        return self._versions[part]

    def weights_hash(self) -> str:
        """The versions of all parts in one text: equal weights, equal text."""
        return " ".join(self.version(part) for part in sorted(PARTS))

    def forget_versions(self, parts: Iterable[str] = PARTS) -> None:
        """To be called after weights of these parts were written in place; the other part is not
        hashed again."""
        for part in parts:
            self._versions.pop(part, None)

    def export(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors under transformers' names, contiguous, on the CPU; dtype None keeps theirs.

        A tied head is left out, as transformers does. ValueError for a quantized model.
        """
        self._require_unquantized("export")
        return {
            name: view.to("cpu", dtype or view.dtype).clone(memory_format=torch.contiguous_format)
            for tensor in plain_tensors(self)
            for name, view in hf_views([tensor], self.config).items()
        }

    def check(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under transformers' names as `write` takes them. ValueError for names, shapes,
        dtypes or values that do not fit (see `checked_tensors`) and for a quantized model."""
        self._require_unquantized("update_weights")
        return checked_tensors(plain_tensors(self, "meta"), self.config, tensors)

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> frozenset[str]:
        """Write what `check` gave into the model, in place. Returns the parts that have changed.

        A part whose tensors are all as they were counts as unchanged, so a trainer that sends a
        frozen vision tower along costs a comparison. A head given to a model whose config ties it
        is used as transformers 5 uses one in a file: equal to the embedding, it stays tied (or is
        tied again); different, it is the model's own from then on.
        """
        tensors, changed = dict(tensors), set[str]()
        language, tied = self.language, self.language.lm_head is None
        if language.config.tie_word_embeddings and (LM_HEAD in tensors or not tied):
            embedding = language.embed_tokens.matrix.plain()
            now = embedding if language.lm_head is None else language.lm_head.matrix.plain()
            head = tensors.get(LM_HEAD, now)
            if _same(head, tensors.get(EMBEDDING, embedding), self.dtype):
                tensors.pop(LM_HEAD, None)
                language.lm_head = None
                changed |= set[str]() if tied else {"language"}
            elif tied:
                with torch.device("meta"):
                    own = Linear(embedding.shape[1], embedding.shape[0], bias=False)
                own.weight = nn.Parameter(language.embed_tokens.weight.detach().clone())
                language.lm_head = own
        for name, parameter in self.named_parameters():
            given = [source for source in hf_sources(name) if source in tensors]
            if not given:
                continue
            owner = self.get_submodule(name.rpartition(".")[0])
            packed = owner if isinstance(owner, Packable) and parameter.dim() == 4 else None
            plain = parameter if packed is None else packed.matrix.plain()
            views = hf_views([(name, plain)], self.config)
            if not all(_same(tensors[source], views[source]) for source in given):
                for source in given:
                    views[source].copy_(tensors[source])
                if packed is not None:
                    parameter.copy_(pack(plain))
                changed.add(name.partition(".")[0])
        self.forget_versions(changed)
        return frozenset(changed)

    def _require_unquantized(self, what: str) -> None:
        rule = "unquantized, for 8-bit layers keep no trained weights; load it without quantization"
        require(what, "model", self.quantization, self.quantization is None, rule)


def _same(tensor: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Equal once both are of `dtype`, by default `other`'s."""
    dtype = dtype or other.dtype
    return torch.equal(tensor.to(other.device, dtype), other.to(dtype))
