"""Tensors of Hugging Face checkpoints to and from our modules.

Our names are `visual.*` and `language.*`. Where ours is one matrix and Hugging Face has several
(`qkv_proj`, `gate_up_proj`), rows are stacked in the order of `_FUSED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vtts_rt.config import LanguageConfig
from vtts_rt.models.checkpoint import read_json
from vtts_rt.types import PATCH_ROW, PATCH_SIZE, TEMPORAL_PATCH_SIZE, require

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PATCH_KERNEL = (3, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
# Names of checkpoints, old and new, to the names transformers 5 writes.
_RENAMES = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
)
_LM_HEAD = "lm_head.weight"
_NOT_WEIGHTS = re.compile(r"\.(inv_freq|original_inv_freq)$")  # buffers that old versions saved
_SHOWN = 3  # names quoted in an error

TensorReader = Callable[[], Tensor]


def hf_sources(name: str) -> list[str]:
    """Hugging Face names (new style) of the tensors that make up our parameter `name`."""
    tower, rest = name.split(".", 1)
    if tower == "visual":
        renamed = "model.visual." + rest.replace("patch_embed.", "patch_embed.proj.")
    elif rest == _LM_HEAD:
        renamed = rest
    else:
        renamed = "model.language_model." + rest
    for ours, theirs in _FUSED.items():
        if f".{ours}." in renamed:
            return [renamed.replace(ours, part) for part in theirs]
    return [renamed]


def hf_views(parameters: Iterable[tuple[str, Tensor]], config: LanguageConfig) -> dict[str, Tensor]:
    """Our named parameters as Hugging Face has them, by new-style name, sharing their memory."""
    heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
    views = {}
    for name, parameter in parameters:
        sources = hf_sources(name)
        # Three sources are queries, keys and values; two are halves.
        weights = heads if len(sources) == 3 else [1] * len(sources)
        unit = parameter.shape[0] // sum(weights)
        parts = torch.split(parameter.detach(), [unit * weight for weight in weights])
        for source, part in zip(sources, parts, strict=True):
            if source.endswith("patch_embed.proj.weight"):
                part = part.view(-1, *_PATCH_KERNEL)
            views[source] = part
    return views


def to_hf(
    parameters: Iterable[tuple[str, Tensor]], config: LanguageConfig, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Our named parameters as Hugging Face has them: new-style names, contiguous, on the CPU.

    dtype: None keeps theirs.
    """
    return {
        name: view.to("cpu", dtype or view.dtype).clone(memory_format=torch.contiguous_format)
        for name, view in hf_views(parameters, config).items()
    }


def tensor_writes(
    parameters: Iterable[tuple[str, Tensor]], config: LanguageConfig, tensors: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Tensors under Hugging Face names, old or new style, each behind the part of our parameters
    that it belongs into.

    Any subset; a head that is tied is left alone. ValueError names what does not fit.
    """
    views = hf_views(parameters, config)
    writes = []
    for name, tensor in tensors.items():
        renamed = _new_style(name)
        if renamed == _LM_HEAD and config.tie_word_embeddings:
            continue
        require("update_weights", "tensors", name, renamed in views, "named as in the checkpoint")
        shape, rule = tuple(tensor.shape), f"{tuple(views[renamed].shape)} for {name}"
        require("update_weights", "shape", shape, shape == tuple(views[renamed].shape), rule)
        writes.append((views[renamed], tensor))
    return writes


def write_tensors(
    parameters: Iterable[tuple[str, Tensor]], config: LanguageConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Write what `tensor_writes` finds. ValueError names what does not fit, and then nothing is
    written."""
    for view, tensor in tensor_writes(parameters, config, tensors):
        view.copy_(tensor)


def _new_style(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, TensorReader]]:
    """Readers of a checkpoint's tensors by new-style name; nothing is read before its turn.

    Safetensors or PyTorch files, single or sharded. ValueError if files are missing or broken.
    """
    with ExitStack() as stack:
        readers: dict[str, TensorReader] = {}
        for path in _tensor_files(folder):
            for name, reader in _open_file(path, stack).items():
                name = _new_style(name)
                if not _NOT_WEIGHTS.search(name):
                    readers[name] = reader
        yield readers


def _tensor_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            require("load_model", index.name, shards, isinstance(shards, dict), "with a weight_map")
            assert isinstance(shards, dict)
            paths = [folder / str(name) for name in sorted(set(shards.values()))]
            missing = [path.name for path in paths if not path.is_file()]
            require("load_model", "shards", missing, not missing, "all there, without a gap")
            return paths
        if (folder / stem).is_file():
            return [folder / stem]
    raise ValueError(
        f"load_model: model must be a folder with model.safetensors or its index, "
        f"got {str(folder)!r}"
    )


def _open_file(path: Path, stack: ExitStack) -> dict[str, TensorReader]:
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            file = stack.enter_context(safe_open(str(path), framework="pt"))

            def reader(name: str) -> TensorReader:
                return lambda: file.get_tensor(name)

            return {name: reader(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

        def held(tensor: Tensor) -> TensorReader:
            return lambda: tensor

        return {name: held(tensor) for name, tensor in state.items()}
    except Exception as error:  # each format has its own error types
        raise ValueError(
            f"load_model: {path.name} must be a complete checkpoint file, got {str(path)!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def load_tensors(
    model: nn.Module, readers: dict[str, TensorReader], dtype: torch.dtype, device: torch.device
) -> None:
    """Give every parameter of `model` (which may be on the meta device) its tensor.

    Reads one parameter at a time, so at most one is in memory twice. ValueError names the first
    missing, unexpected and wrongly shaped tensors.
    """
    unused = set(readers)
    missing: list[str] = []
    misshapen: list[str] = []
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        sources = hf_sources(name)
        absent = [source for source in sources if source not in readers]
        missing += absent
        unused.difference_update(sources)
        if absent:
            continue
        parts = [readers[source]() for source in sources]
        if name == "visual.patch_embed.weight" and parts[0].shape[1:] == _PATCH_KERNEL:
            parts[0] = parts[0].reshape(-1, PATCH_ROW)
        rows, rest = sum(part.shape[0] for part in parts), parts[0].shape[1:]
        same = all(part.shape[1:] == rest for part in parts)
        if not same or (rows, *rest) != tuple(parameter.shape):
            shapes = [tuple(part.shape) for part in parts]
            misshapen.append(f"{', '.join(sources)} {shapes} for {tuple(parameter.shape)}")
            continue
        tensor = torch.cat([part.to(device, dtype) for part in parts])
        state[name] = tensor
    if not any(name == f"language.{_LM_HEAD}" for name, _ in model.named_parameters()):
        unused.discard(_LM_HEAD)  # a copy of the embedding that the head is tied to
    problems = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", sorted(unused)),
            ("of wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"load_model: checkpoint tensors must fit config.json, got {'; '.join(problems)}"
        )
    model.load_state_dict(state, assign=True)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
