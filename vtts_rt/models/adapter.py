"""Adapters (LoRA and the like) in a checkpoint folder, merged into the weights they adapt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtts_rt.models.checkpoint import ADAPTER_CONFIG, architecture, read_hf_config
from vtts_rt.models.weights import LM_HEAD, new_style

_PREFIX = "base_model.model."  # of every name in an adapter's file (peft)


def merged_tensors(base: Path, adapter: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model with the adapter in folder `adapter` merged into them by peft.

    base: the folder of the model's config.json. tensors: the model's, by new-style name, float32;
    those that the adapter changes are written in place. Names of the adapter's tensors may be of
    an older transformers. ValueError without peft, and for an adapter that does not fit: of a kind
    that cannot be merged, or with tensors that are missing or belong nowhere.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise ValueError(
            f"load_model: model must hold no adapter ({ADAPTER_CONFIG} in {str(adapter)!r}) unless "
            f"peft can merge it, got {type(error).__name__}: {error}; pip install "
            f"'vtts_rt[adapters]', or merge the adapter and save the model"
        ) from error
    config = read_hf_config(base)
    config.tie_word_embeddings = LM_HEAD not in tensors
    with torch.device("meta"):
        net = getattr(transformers, architecture(config.model_type))(config)
    net.load_state_dict(dict(tensors), assign=True, strict=False)
    net.tie_weights()
    try:
        settings = peft.PeftConfig.from_pretrained(str(adapter))
        model = peft.PeftModel(net, settings)
        held = {_renamed(n): t for n, t in peft.load_peft_weights(str(adapter), "cpu").items()}
        wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        result: Any = peft.set_peft_model_state_dict(model, held)
        missing = sorted(wanted.keys() - held.keys())
        unfit = missing or sorted(result.unexpected_keys)
        merged = model.merge_and_unload().state_dict()
    except Exception as error:  # peft's own, of many types
        raise ValueError(
            f"load_model: {ADAPTER_CONFIG} must be of an adapter that peft can merge into the "
            f"model, got {type(error).__name__}: {error}"
        ) from error
    if unfit:
        kind = "missing" if missing else "unexpected"
        raise ValueError(
            f"load_model: the adapter's tensors must fit the model, got {len(unfit)} {kind} "
            f"({', '.join(unfit[:3])})"
        )
    return {name: tensor.detach() for name, tensor in merged.items()}


def _renamed(name: str) -> str:
    if not name.startswith(_PREFIX):
        return name
    return _PREFIX + new_style(name.removeprefix(_PREFIX))
