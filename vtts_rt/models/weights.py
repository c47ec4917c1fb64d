"""Tensors of Hugging Face checkpoints to and from our modules.

Our names are `visual.*` and `language.*`. Where ours is one matrix and Hugging Face has several
(`qkv_proj`, `gate_up_proj`), rows are stacked in the order of `_FUSED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vtts_rt.models.config import ModelConfig
from vtts_rt.models.tensor_files import DTYPES, StoredTensor
from vtts_rt.types import require

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Names of checkpoints, old and new, to the names transformers 5 writes.
_RENAMES = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    # A bare model without a head, as AutoModel saves it.
    (re.compile(r"^language_model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
    (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
)
LM_HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
# The parts of a model, as `VideoLM.version` knows them.
PARTS = frozenset({"visual", "language"})
_NOT_WEIGHTS = re.compile(r"\.(inv_freq|original_inv_freq)$")  # buffers that old versions saved
_SHOWN = 3  # names quoted in an error


def hf_sources(name: str) -> list[str]:
    """Hugging Face names (new style) of the tensors that make up our parameter `name`."""
    tower, rest = name.split(".", 1)
    if tower == "visual":
        renamed = "model.visual." + rest.replace("patch_embed.", "patch_embed.proj.")
    elif rest == LM_HEAD:
        renamed = rest
    else:
        renamed = "model.language_model." + rest
    for ours, theirs in _FUSED.items():
        if f".{ours}." in renamed:
            return [renamed.replace(ours, part) for part in theirs]
    return [renamed]


def hf_views(parameters: Iterable[tuple[str, Tensor]], config: ModelConfig) -> dict[str, Tensor]:
    """Our named parameters as Hugging Face has them, by new-style name, sharing their memory."""
    language, geometry = config.language, config.geometry
    heads = [language.num_attention_heads, *[language.num_key_value_heads] * 2]
    kernel = (3, geometry.frames_per_pair, geometry.patch_px, geometry.patch_px)
    views = {}
    for name, parameter in parameters:
        sources = hf_sources(name)
        # Three sources are queries, keys and values; two are halves.
        weights = heads if len(sources) == 3 else [1] * len(sources)
        unit = parameter.shape[0] // sum(weights)
        parts = torch.split(parameter.detach(), [unit * weight for weight in weights])
        for source, part in zip(sources, parts, strict=True):
            if source.endswith("patch_embed.proj.weight"):
                part = part.view(-1, *kernel)
            views[source] = part
    return views


def new_style(name: str) -> str:
    """The name that transformers 5 has for a tensor of a checkpoint, old or new."""
    for pattern, replacement in _RENAMES:
        renamed, count = pattern.subn(replacement, name, count=1)
        if count:
            return renamed
    return name


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are numbers, and none too large for `dtype`.

    One pass without a copy: 0.1 s a GB on one core (a copy takes 1 s).
    """
    if tensor.numel() == 0:
        return True
    low, high = (float(bound) for bound in tensor.detach().aminmax())
    most = torch.finfo(dtype).max
    return -most <= low and high <= most  # false for NaN


def checked_tensors(
    parameters: Iterable[tuple[str, Tensor]], config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors under Hugging Face names, old or new style, by their new-style names.

    Any subset; a head is taken whether the model's is tied or not. ValueError names what does not
    fit: a name, a shape, a dtype, a value that is no number of the parameter's dtype.
    """
    what = "update_weights"
    views = hf_views(parameters, config)
    views.setdefault(LM_HEAD, views[EMBEDDING])
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed = new_style(name) if isinstance(name, str) else ""
        require(what, "tensors", name, renamed in views, "named as in the checkpoint")
        require(what, "tensors", name, renamed not in found, "given once each")
        got = type(tensor).__name__
        require(what, name, got, isinstance(tensor, Tensor), "a tensor")
        plain = tensor.layout is torch.strided and tensor.dtype in DTYPES
        require(what, f"dtype of {name}", tensor.dtype, plain, "dense floating point")
        require(what, name, "a tensor on meta", not tensor.is_meta, "a tensor that holds values")
        shape, wanted = tuple(tensor.shape), tuple(views[renamed].shape)
        require(what, "shape", shape, shape == wanted, f"{wanted} for {name}")
        dtype = views[renamed].dtype
        finite = is_finite(tensor, dtype)
        require(what, name, "NaN or too large", finite, f"finite numbers of {_name(dtype)}")
        found[renamed] = tensor
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checkpoint_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The parameters among a checkpoint's tensors, by new-style name."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        renamed = new_style(name)
        if not _NOT_WEIGHTS.search(renamed):
            require("load_model", "tensors", name, renamed not in found, "given once each")
            found[renamed] = tensor
    return found


def check_depths(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """ValueError if config.json has more layers than there are tensors for: building them would
    take memory for what is not there."""
    for field, wanted, prefix in (
        ("depth", config.vision.depth, "model.visual.blocks."),
        ("num_hidden_layers", config.language.num_hidden_layers, "model.language_model.layers."),
    ):
        there = {name.split(".")[3] for name in stored if name.startswith(prefix)}
        rule = f"at most {len(there)} as in the checkpoint's tensors"
        require("load_model", field, wanted, wanted <= len(there), rule)


def resolve_head(
    config: ModelConfig, stored: dict[str, StoredTensor], dtype: torch.dtype
) -> tuple[ModelConfig, dict[str, StoredTensor]]:
    """Decide by the file about a head that config.json calls tied, as transformers 5 does.

    A head equal to the embedding (in `dtype`) is tied to it; one that differs is used and the
    returned config says untied; one without an embedding beside it is both.
    """
    if not config.language.tie_word_embeddings or LM_HEAD not in stored:
        return config, stored
    stored = dict(stored)
    if EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(LM_HEAD)
        return config, stored
    head, embedding = (stored[name].read().to(dtype) for name in (LM_HEAD, EMBEDDING))
    if torch.equal(head, embedding):
        del stored[LM_HEAD]
        return config, stored
    return replace(config, language=replace(config.language, tie_word_embeddings=False)), stored


def load_tensors(
    model: nn.Module,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every parameter of `model` (which may be on the meta device) its tensor.

    stored: by new-style name. All names and shapes are compared before anything is read; then one
    parameter is read at a time, so at most one is in memory twice. ValueError names the first
    missing, unexpected and wrongly shaped tensors, or one that holds NaN or infinite values.
    """
    parameters = dict(model.named_parameters())
    expected = {
        name: tuple(view.shape) for name, view in hf_views(parameters.items(), config).items()
    }
    misshapen = [
        f"{name} {stored[name].shape} for {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, names in (
            ("missing", [name for name in expected if name not in stored]),
            ("unexpected", sorted(stored.keys() - expected.keys())),
            ("of wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"load_model: checkpoint tensors must fit config.json, got {'; '.join(problems)}"
        )
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        parts = []
        for source in hf_sources(name):
            part = stored[source].read()
            finite = is_finite(part, dtype)
            require("load_model", source, "others", finite, f"finite numbers of {_name(dtype)}")
            parts.append(part.flatten(1) if part.dim() > 2 else part)
        state[name] = torch.cat([part.to(device, dtype) for part in parts]).view(parameter.shape)
    model.load_state_dict(state, assign=True)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
