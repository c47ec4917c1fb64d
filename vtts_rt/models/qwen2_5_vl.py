"""A whole Qwen2.5-VL: vision tower and language model, loaded from Hugging Face checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtts_rt.config import ModelConfig
from vtts_rt.models.adapter import merged_tensors
from vtts_rt.models.checkpoint import (
    adapter_in,
    base_folder,
    load_extras,
    read_json,
    read_model_config,
    resolve_model,
    scopes,
    write_hf_config,
)
from vtts_rt.models.language import LanguageModel
from vtts_rt.models.layers import Linear
from vtts_rt.models.preprocessor import check_preprocessor
from vtts_rt.models.qwen_chat import CHAT
from vtts_rt.models.tensor_files import StoredTensor, open_tensors
from vtts_rt.models.vision import VisionTransformer
from vtts_rt.models.weights import (
    EMBEDDING,
    LM_HEAD,
    PARTS,
    check_depths,
    checked_tensors,
    checkpoint_tensors,
    hf_views,
    load_tensors,
    part_of,
    resolve_head,
    to_hf,
)
from vtts_rt.types import require

__all__ = [
    "Qwen2_5_VL",
    "export_state_dict",
    "from_config",
    "load_extras",
    "load_model",
    "resolve_device",
    "resolve_model",
    "save_hf",
    "write_hf",
]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INIT_STD = 0.02  # transformers, initializer_range of Qwen2_5_VLConfig


class Qwen2_5_VL(nn.Module):
    """The two towers. `visual(rows, grid_thw)` gives features, `language` takes embeddings."""

    chat = CHAT

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        out, hidden = config.vision.out_hidden_size, config.language.hidden_size
        require("Qwen2_5_VL", "out_hidden_size", out, out == hidden, f"hidden_size ({hidden})")
        self.config = config
        self.visual = VisionTransformer(config.vision)
        self.language = LanguageModel(config.language)
        self.quantization: str | None = None  # see models/quantize.py
        self._versions: dict[str, str] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.language.dtype

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    @property
    def vision_version(self) -> str:
        """Hash of the vision tower's weights: names, shapes, dtypes and all bytes (128 bits).

        Taken on first use, about 1 ms a MB, and kept until `forget_versions`.
        """
        return self._hash("visual", self.visual)

    @property
    def language_version(self) -> str:
        """Hash of the language model's weights, as `vision_version`."""
        return self._hash("language", self.language)

    def forget_versions(self, parts: Iterable[str] = PARTS) -> None:
        """To be called after weights of these parts ("visual", "language") were written in
        place; the other part is not hashed again."""
        for part in parts:
            self._versions.pop(part, None)

    def _hash(self, name: str, tower: nn.Module) -> str:
        if name not in self._versions:
            digest = hashlib.blake2b(digest_size=16)
            for key, parameter in (*tower.named_parameters(), *tower.named_buffers()):
                digest.update(f"{key} {tuple(parameter.shape)} {parameter.dtype};".encode())
                raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
            self._versions[name] = digest.hexdigest()
        return self._versions[name]

    def merge_features(self, token_ids: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        """Put vision features in the place of pads, in order; differentiable.

        token_ids: (N,) int64; embeds: (N, C) of all tokens; features: (pads, C).
        Returns (N, C) in the dtype of `embeds`. ValueError if counts differ.
        """
        config = self.config
        pads = (token_ids == config.image_token_id) | (token_ids == config.video_token_id)
        num_pads = int(pads.sum())
        require(
            "merge_features",
            "features",
            features.shape[0],
            features.shape[0] == num_pads,
            f"one a pad ({num_pads})",
        )
        return embeds.masked_scatter(pads[:, None], features.to(embeds.dtype))


def from_config(
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Qwen2_5_VL:
    """Random weights as transformers initialises them: matrices and embeddings normal with
    standard deviation 0.02, biases 0, norms 1. Equal for equal seeds, whatever the device."""
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            tensor = torch.empty(parameter.shape).normal_(std=INIT_STD, generator=generator)
        else:
            tensor = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        state[name] = tensor.to(device, dtype)
    model.load_state_dict(state, assign=True)
    return model


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Qwen2_5_VL:
    """Load a Qwen2.5-VL-family checkpoint, in eval mode.

    path_or_id: as `resolve_model`. dtype: "auto" takes the checkpoint's own; else "float32",
    "bfloat16", "float16" or the torch dtype. What config.json says is compared with the names and
    shapes in the files before anything is built. An adapter in the folder is merged through peft
    in float32, which takes 4 bytes a parameter of host memory for the while. ValueError for
    anything in the folder that does not fit, RuntimeError for a model that cannot be had.
    """
    folder = resolve_model(path_or_id)
    base = base_folder(folder)
    adapter = adapter_in(folder)
    config = read_model_config(base)
    check_preprocessor(base)
    with open_tensors(base) as files:
        wanted = _checkpoint_dtype(base, files) if dtype == "auto" else _as_dtype(dtype)
        stored = checkpoint_tensors(files)
        check_depths(config, stored)
        if adapter is not None:
            merged = merged_tensors(base, adapter, _assembled(config, stored, torch.float32))
            stored = {name: StoredTensor.of(tensor) for name, tensor in merged.items()}
        model = _loaded(config, stored, wanted, torch.device(device))
    return model.eval()


def _loaded(
    config: ModelConfig, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> Qwen2_5_VL:
    config, stored = resolve_head(config, stored, dtype)
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    load_tensors(model, config.language, stored, dtype, device)
    return model


def _assembled(
    config: ModelConfig, stored: dict[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All of a checkpoint's tensors, checked, on the CPU."""
    model = _loaded(config, stored, dtype, torch.device("cpu"))
    return hf_views(model.named_parameters(), config.language)


def resolve_device(device: str) -> torch.device:
    """Of "auto" (cuda where there is one), "cpu" or "cuda[:n]". ValueError for another name,
    RuntimeError for CUDA where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place: torch.device | None = torch.device(device)
    except RuntimeError:
        place = None
    ok = place is not None and place.type in ("cpu", "cuda")
    require("Runtime", "device", device, ok, "auto, cpu or cuda[:n]")
    assert place is not None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("Runtime: no CUDA device is available; use device='cpu'")
    return place


def export_state_dict(model: Qwen2_5_VL, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors under transformers' names, contiguous, on the CPU; dtype None keeps theirs.

    A tied head is left out, as transformers does. ValueError for a quantized model.
    """
    _require_unquantized("export_state_dict", model)
    return to_hf(model.named_parameters(), model.config.language, dtype)


def check_hf(model: Qwen2_5_VL, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under transformers' names as `write_checked` takes them. ValueError for names,
    shapes, dtypes or values that do not fit (see `checked_tensors`) and for a quantized model."""
    _require_unquantized("update_weights", model)
    return checked_tensors(model.named_parameters(), model.config.language, tensors)


@torch.no_grad()
def write_checked(model: Qwen2_5_VL, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Write what `check_hf` gave into a model, in place. Returns the parts that have changed.

    A part whose tensors are all as they were counts as unchanged, so a trainer that sends a frozen
    vision tower along costs a comparison. A head given to a model whose config ties it is used as
    transformers 5 uses one in a file: equal to the embedding, it stays tied (or is tied again);
    different, it is the model's own from then on.
    """
    tensors = dict(tensors)
    language, tied = model.language, model.language.lm_head is None
    views = hf_views(model.named_parameters(), model.config.language)
    now = {LM_HEAD: views[EMBEDDING], **views}
    changed = {
        part
        for part in PARTS
        if not all(_same(t, now[name]) for name, t in tensors.items() if part_of(name) == part)
    }
    if language.config.tie_word_embeddings and (LM_HEAD in tensors or not tied):
        weight = views[EMBEDDING]
        head, embedding = tensors.get(LM_HEAD, now[LM_HEAD]), tensors.get(EMBEDDING, weight)
        if _same(head, embedding, weight.dtype):
            tensors.pop(LM_HEAD, None)
            language.lm_head = None
        elif tied:
            with torch.device("meta"):
                own = Linear(weight.shape[1], weight.shape[0], bias=False)
            language.lm_head = own.to_empty(device=weight.device).to(weight.dtype)
    if changed:
        views = hf_views(model.named_parameters(), model.config.language)
        for name, tensor in tensors.items():
            if part_of(name) in changed:
                views[name].copy_(tensor)
        model.forget_versions(changed)
    return frozenset(changed)


def _same(tensor: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Equal once both are of `dtype`, by default `other`'s."""
    dtype = dtype or other.dtype
    return torch.equal(tensor.to(other.device, dtype), other.to(dtype))


def write_hf(model: Qwen2_5_VL, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """`check_hf`, then `write_checked`. ValueError, and nothing changed, for what does not fit."""
    return write_checked(model, check_hf(model, tensors))


def _require_unquantized(what: str, model: Qwen2_5_VL) -> None:
    rule = "unquantized, for 8-bit layers keep no trained weights; load it without quantization"
    require(what, "model", model.quantization, model.quantization is None, rule)


def save_hf(
    model: Qwen2_5_VL,
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    extras: dict[str, Any] | None = None,
) -> None:
    """Write a folder that transformers and `load_model` load: config and safetensors.

    dtype: None keeps the model's. extras: the recipe (see `load_extras`); None writes the model's
    perception settings if it has any. It stands in config.json, where transformers keeps it when
    it loads and saves the model. Tokenizer files are not written.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    kind = model.dtype if dtype is None else _as_dtype(dtype)
    name = next(name for name, value in DTYPES.items() if value == kind)
    tied = model.language.lm_head is None
    language = replace(model.config.language, tie_word_embeddings=tied)
    write_hf_config(replace(model.config, language=language), folder, name, extras)
    tensors = export_state_dict(model, kind)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    ok = found in DTYPES.values()
    require("load_model", "dtype", dtype, ok, f"'auto' or one of {', '.join(DTYPES)}")
    assert found is not None
    return found


def checkpoint_dtype(path_or_id: str | Path) -> torch.dtype:
    """A checkpoint's own dtype, which `load_model` takes with "auto"."""
    folder = base_folder(resolve_model(path_or_id))
    with open_tensors(folder) as files:
        return _checkpoint_dtype(folder, files)


def _checkpoint_dtype(folder: Path, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """What config.json says (`dtype`, formerly `torch_dtype`), else that of the first tensor."""
    raw = read_json(folder / "config.json")
    for scope in scopes(raw, "text_config"):
        name = scope.get("dtype") or scope.get("torch_dtype")
        if isinstance(name, str):
            return _as_dtype(name)
    return next((_as_dtype(tensor.dtype) for tensor in stored.values()), torch.float32)
