"""The families, and the one place that makes, loads and saves models of any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtts_rt.models.adapter import merged_tensors
from vtts_rt.models.base import VideoLM
from vtts_rt.models.checkpoint import (
    adapter_in,
    base_folder,
    load_extras,
    model_config,
    read_hf_config,
    read_json,
    read_model_type,
    resolve_model,
    scopes,
    write_hf_config,
)
from vtts_rt.models.config import ModelConfig
from vtts_rt.models.preprocessor import read_geometry, write_geometry
from vtts_rt.models.qwen2_5_vl import Qwen2_5_VL
from vtts_rt.models.qwen2_vl import Qwen2_VL
from vtts_rt.models.qwen3_vl import Qwen3_VL
from vtts_rt.models.tensor_files import StoredTensor, open_tensors
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.models.weights import (
    check_depths,
    checkpoint_tensors,
    hf_views,
    load_tensors,
    resolve_head,
)
from vtts_rt.ops import native
from vtts_rt.types import require

__all__ = [
    "DTYPES",
    "FAMILIES",
    "checkpoint_dtype",
    "from_config",
    "load_extras",
    "load_model",
    "load_tokenizer",
    "read_model_config",
    "resolve_device",
    "resolve_model",
    "save_hf",
]

FAMILIES: dict[str, type[VideoLM]] = {f.model_type: f for f in (Qwen2_5_VL, Qwen2_VL, Qwen3_VL)}

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INIT_STD = 0.02  # transformers, initializer_range of every family's config


def family_of(model_type: object) -> type[VideoLM]:
    """ValueError for a family that is not here."""
    found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    rule = f"one of {', '.join(FAMILIES)}"
    require("load_model", "model_type", model_type, found is not None, rule)
    assert found is not None
    return found


def read_model_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. ValueError for a family that is not here and for what
    its family does not do."""
    family = family_of(read_model_type(folder))
    hf = read_hf_config(folder)
    vision = family.read_vision(hf)
    return model_config(folder, hf, family.geometry, vision, family.language_fields)


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """A checkpoint's tokenizer, in the chat format of its family; arguments as `resolve_model`.
    ValueError for a folder that holds none, and for a family that is not here."""
    folder = resolve_model(path_or_id)
    return Tokenizer.from_pretrained(folder, family_of(read_model_type(base_folder(folder))).chat)


def from_config(
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> VideoLM:
    """Random weights as transformers initialises them: matrices and embeddings normal with
    standard deviation 0.02, biases 0, norms 1. Equal for equal seeds, whatever the device."""
    model = empty_model(config)
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


def empty_model(config: ModelConfig) -> VideoLM:
    """Parameters on the meta device."""
    with torch.device("meta"):
        return family_of(config.model_type)(config)


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> VideoLM:
    """Load a checkpoint of a family in FAMILIES, in eval mode.

    path_or_id: as `resolve_model`. dtype: "float32", "bfloat16", "float16" or the torch dtype;
    "auto" takes what the recipe says (`dtype`, by type of device), else the checkpoint's own on an
    accelerator, and on the CPU bfloat16 of a bfloat16 checkpoint where the processor multiplies it
    (`native.bfloat16_isa`), else float32. What config.json says is compared with the
    names and shapes in the files before anything is built. An adapter in the folder is merged
    through peft in float32, which takes 4 bytes a parameter of host memory for the while.
    ValueError for anything in the folder that does not fit, RuntimeError for a model that cannot be
    had.
    """
    folder = resolve_model(path_or_id)
    base = base_folder(folder)
    adapter = adapter_in(folder)
    config = read_model_config(base)
    family, place = family_of(config.model_type), torch.device(device)
    own = read_geometry(base, config.geometry, bounds_clips=family.bounds_clips)
    config = replace(config, geometry=own)
    with open_tensors(base) as files:
        wanted = _auto_dtype(base, files, place) if dtype == "auto" else _as_dtype(dtype)
        stored = checkpoint_tensors(files)
        check_depths(config, stored)
        if adapter is not None:
            merged = merged_tensors(base, adapter, _hf_tensors(config, stored, torch.float32))
            stored = {name: StoredTensor.of(tensor) for name, tensor in merged.items()}
        model = build_model(config, stored, wanted, place)
    return model.eval()


def build_model(
    config: ModelConfig, stored: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> VideoLM:
    """A model of a checkpoint's tensors by new-style name."""
    config, stored = resolve_head(config, stored, dtype)
    model = empty_model(config)
    load_tensors(model, config, stored, dtype, device)
    return model


def _hf_tensors(
    config: ModelConfig, stored: dict[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All of a checkpoint's tensors, checked, on the CPU."""
    model = build_model(config, stored, dtype, torch.device("cpu"))
    return hf_views(model.named_parameters(), config)


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


def save_hf(
    model: VideoLM,
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    extras: dict[str, Any] | None = None,
) -> None:
    """Write a folder that transformers and `load_model` load: config and safetensors.

    dtype: None keeps the model's. extras: the recipe (see `load_extras`); None writes the model's
    perception settings if it has any. It stands in config.json, where transformers keeps it when
    it loads and saves the model. The mean and std go into the processor files of the folder, or a
    new one where they are not the family's; tokenizer files are not written.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    kind = model.dtype if dtype is None else _as_dtype(dtype)
    name = next(name for name, value in DTYPES.items() if value == kind)
    tied = model.language.lm_head is None
    language = replace(model.config.language, tie_word_embeddings=tied)
    write_hf_config(replace(model.config, language=language), folder, name, extras)
    write_geometry(folder, model.geometry, type(model).geometry)
    tensors = model.export(kind)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    ok = found in DTYPES.values()
    require("load_model", "dtype", dtype, ok, f"'auto' or one of {', '.join(DTYPES)}")
    assert found is not None
    return found


def checkpoint_dtype(path_or_id: str | Path) -> torch.dtype:
    """A checkpoint's own dtype."""
    folder = base_folder(resolve_model(path_or_id))
    with open_tensors(folder) as files:
        return _checkpoint_dtype(folder, files)


def _auto_dtype(
    folder: Path, stored: Mapping[str, StoredTensor], device: torch.device
) -> torch.dtype:
    own = _checkpoint_dtype(folder, stored)
    pinned = load_extras(folder).get("dtype", {}).get(device.type)
    if pinned is not None:
        what, names = f"dtype of the recipe on {device.type}", ", ".join(DTYPES)
        known = isinstance(pinned, str) and pinned in DTYPES
        require("load_model", what, pinned, known, f"one of {names}")
        return DTYPES[pinned]
    faster = own is torch.bfloat16 and native.bfloat16_isa() is not None
    return own if device.type != "cpu" or faster else torch.float32


def _checkpoint_dtype(folder: Path, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """What config.json says (`dtype`, formerly `torch_dtype`), else that of the first tensor."""
    raw = read_json(folder / "config.json")
    for scope in scopes(raw, "text_config"):
        name = scope.get("dtype") or scope.get("torch_dtype")
        if isinstance(name, str):
            return _as_dtype(name)
    return next((_as_dtype(tensor.dtype) for tensor in stored.values()), torch.float32)
