"""The weights of a training run: transformers' own model beside the runtime that rolls out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtts_rt.models.checkpoint import EXTRAS_FILE, resolve_model
from vtts_rt.rollout.tree_step import base_model
from vtts_rt.types import require

_TOWER = "model.visual."  # of transformers' names
# What stands beside the tensors of a checkpoint and transformers does not write, or writes anew.
_SIDECARS = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("generation_config.json", "chat_template.json", "chat_template.jinja", EXTRAS_FILE),
)


def load_training_model(model: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a checkpoint, its tower frozen; `model` as
    `Runtime.from_pretrained`."""
    from transformers import AutoModelForImageTextToText

    folder = resolve_model(model)
    loaded = AutoModelForImageTextToText.from_pretrained(str(folder), dtype=dtype)
    return freeze_tower(loaded)


def freeze_tower(model: nn.Module) -> nn.Module:
    """What the tower says of a frame pair is then computed once, by the runtime."""
    for name, parameter in base_model(model).named_parameters():
        if name.startswith(_TOWER):
            parameter.requires_grad_(False)
    return model


def check_adapter(what: str, model: nn.Module) -> None:
    """ValueError for an adapter of the tower, which has no gradients."""
    names = base_model(model).named_parameters()
    tower = [name for name, p in names if p.requires_grad and name.startswith(_TOWER)]
    rule = "modules of the language model: the tower is frozen"
    require(what, "target_modules", tower[:1], not tower, rule)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, as `Runtime.update_weights` takes them: by transformers'
    names, without the tower, each LoRA added to what it adapts. The model stays as it is."""
    base, tensors = base_model(model), {}
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            tensors[name] = parameter.detach()
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_base_layer().weight.detach()
            with torch.no_grad():
                for active in module.active_adapters:
                    weight = weight + module.get_delta_weight(active)
            tensors[f"{name}.weight"] = weight
    return tensors


def complete_checkpoint(source: Path, folder: Path) -> None:
    """Copy to a folder that transformers wrote what makes it a checkpoint of ours. The recipe is in
    config.json, which transformers keeps, or in a file beside it; an adapter has its base's."""
    if (folder / "config.json").is_file():
        for name in _SIDECARS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def put_in_place(made: Path, folder: Path) -> None:
    """Move a whole checkpoint, `checkpoint-12` say, from a folder in `folder` there, in place of
    one of that name. Whenever the process is killed, a whole one of the step is there: the old one
    is `checkpoint-012`, which resumes at the same step, until the new one has its name."""
    target, old = folder / made.name, folder / made.name.replace("-", "-0")
    gone = made.with_name(f"old-{made.name}")
    if target.exists():
        if old.exists():  # of a killed process
            old.rename(gone)
            shutil.rmtree(gone)
        target.rename(old)
    made.rename(target)
    if old.exists():
        old.rename(gone)
        shutil.rmtree(gone)
