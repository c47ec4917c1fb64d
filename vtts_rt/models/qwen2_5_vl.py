"""A whole Qwen2.5-VL: vision tower and language model, loaded from Hugging Face checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtts_rt.config import ModelConfig
from vtts_rt.models.checkpoint import (
    EXTRAS,
    load_extras,
    read_json,
    read_model_config,
    resolve_model,
    write_hf_config,
)
from vtts_rt.models.language import LanguageModel
from vtts_rt.models.vision import VisionTransformer
from vtts_rt.models.weights import (
    load_tensors,
    open_tensors,
    tensor_writes,
    to_hf,
    write_tensors,
)
from vtts_rt.types import require

__all__ = [
    "Qwen2_5_VL",
    "export_state_dict",
    "from_config",
    "load_extras",
    "load_model",
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

    @property
    def weights_version(self) -> str:
        """Hash of both towers."""
        both = self.vision_version + self.language_version
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()

    def forget_versions(self) -> None:
        """To be called after weights were written in place."""
        self._versions.clear()

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
    "bfloat16", "float16" or the torch dtype. ValueError for anything in the folder that does not
    fit, RuntimeError for a model that cannot be had.
    """
    folder = resolve_model(path_or_id)
    config = read_model_config(folder)
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    with open_tensors(folder) as readers:
        wanted = checkpoint_dtype(folder) if dtype == "auto" else _as_dtype(dtype)
        load_tensors(model, readers, wanted, torch.device(device))
    return model.eval()


def export_state_dict(model: Qwen2_5_VL, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors under transformers' names, contiguous, on the CPU; dtype None keeps theirs.

    A tied head is left out, as transformers does. ValueError for a quantized model.
    """
    _require_unquantized("export_state_dict", model)
    return to_hf(model.named_parameters(), model.config.language, dtype)


def check_hf(model: Qwen2_5_VL, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless `write_hf` can write these."""
    _require_unquantized("update_weights", model)
    tensor_writes(model.named_parameters(), model.config.language, tensors)


def write_hf(model: Qwen2_5_VL, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors under transformers' names into a model, in place; any subset of them.

    ValueError for names or shapes that do not fit, and for a quantized model: nothing is changed
    then.
    """
    _require_unquantized("write_hf", model)
    write_tensors(model.named_parameters(), model.config.language, tensors)
    model.forget_versions()


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

    dtype: None keeps the model's. extras: contents of vtts.json (see `load_extras`); None writes
    the model's perception settings if it has any. Tokenizer files are not written.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    kind = model.dtype if dtype is None else _as_dtype(dtype)
    name = next(name for name, value in DTYPES.items() if value == kind)
    write_hf_config(model.config, folder, name)
    if extras is not None:
        (folder / EXTRAS).write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")
    tensors = export_state_dict(model, kind)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    ok = found in DTYPES.values()
    require("load_model", "dtype", dtype, ok, f"'auto' or one of {', '.join(DTYPES)}")
    assert found is not None
    return found


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """What config.json says (`dtype`, formerly `torch_dtype`); float32 where it says nothing."""
    raw = read_json(folder / "config.json")
    for scope in (raw, raw.get("text_config") or {}):
        name = scope.get("dtype") or scope.get("torch_dtype")
        if isinstance(name, str):
            return _as_dtype(name)
    return torch.float32
