"""The files that hold a checkpoint's tensors: which of them count, and what their headers say."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from vtts_rt.models.checkpoint import read_json
from vtts_rt.types import require

# In the order in which transformers takes them (5.24, _get_resolved_checkpoint_files).
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A whole file of the user's own naming in config.json, as transformers reads it.
_EXPLICIT = "transformers_weights"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPES = frozenset(_SAFETENSORS_DTYPES.values())  # of weights


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint: its shape and float dtype, of a file as its header says, and
    how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """A checkpoint's tensors by the names in its files; nothing is read before its turn.

    Safetensors or PyTorch files, single or sharded; of several the one that transformers takes.
    ValueError if files are missing or broken, or a shard lies outside the folder.
    """
    with ExitStack() as stack:
        stored: dict[str, StoredTensor] = {}
        for path in _tensor_files(folder):
            stored |= _open_file(path, stack)
        yield stored


def _tensor_files(folder: Path) -> list[Path]:
    explicit = read_json(folder / "config.json").get(_EXPLICIT)
    if explicit is not None:
        suffixes = (".safetensors", ".safetensors.index.json")
        known = isinstance(explicit, str) and explicit.endswith(suffixes)
        require("load_model", _EXPLICIT, explicit, known, f"a name that ends in {suffixes}")
        path = _inside(folder, explicit, _EXPLICIT)
        require("load_model", _EXPLICIT, explicit, path.is_file(), "a file of the folder")
        return _shards(folder, path) if explicit.endswith(".index.json") else [path]
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return _shards(folder, folder / name) if name.endswith(".json") else [folder / name]
    raise ValueError(
        f"load_model: model must be a folder with model.safetensors or its index, "
        f"got {str(folder)!r}{_others(folder)}"
    )


def _others(folder: Path) -> str:
    """Files that look like weights, for an error."""
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    return f" with {', '.join(found[:3])}" if found else ""


def _shards(folder: Path, index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    named = isinstance(shards, dict) and shards and all(isinstance(n, str) for n in shards.values())
    got = type(shards).__name__
    require("load_model", index.name, got, bool(named), "with a weight_map of file names")
    assert isinstance(shards, dict)
    paths = [_inside(folder, name, index.name) for name in sorted(set(shards.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    require("load_model", "shards", missing, not missing, "all there, without a gap")
    return paths


def _inside(folder: Path, name: str, named_by: str) -> Path:
    """A file of the folder. ValueError for a name, or a link behind it, that leads elsewhere; the
    links of a hub cache lead to its blobs."""
    parts = PurePosixPath(name)
    plain = not parts.is_absolute() and ".." not in parts.parts and "\\" not in name
    plain = plain and bool(parts.parts) and "\0" not in name
    path = folder / name if plain else folder
    rule = "inside the checkpoint's folder"
    require("load_model", f"a file named by {named_by}", name, plain, rule)
    home = folder.resolve()
    repository = home.parent.parent if home.parent.name == "snapshots" else home
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        real = Path("/")
    stays = real.is_relative_to(home) or real.is_relative_to(repository)
    require("load_model", f"a file named by {named_by}", name, stays, rule)
    return path


def _open_file(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    def refuse(error: Exception) -> ValueError:
        return ValueError(
            f"load_model: {path.name} must be a complete checkpoint file, got {str(path)!r} "
            f"({type(error).__name__}: {error})"
        )

    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            file = stack.enter_context(safe_open(str(path), framework="pt"))
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {
                name: (tuple(header.get_shape()), header.get_dtype())
                for name, header in headers.items()
            }
        else:
            # Files of PyTorch before 1.6 are no archives and are read whole.
            mmap = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            found = _of_pytorch(state)
    except Exception as error:  # each format has its own error types
        raise refuse(error) from error
    if path.suffix != ".safetensors":
        return found

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:
                tensor: Tensor = file.get_tensor(name)
            except Exception as error:
                raise refuse(error) from error
            return tensor

        return read

    tensors = {}
    for name, (shape, kind) in shapes.items():
        dtype = _SAFETENSORS_DTYPES.get(kind)
        require("load_model", f"dtype of {name}", kind, dtype is not None, "a float dtype")
        assert dtype is not None
        tensors[name] = StoredTensor(shape, dtype, reader(name))
    return tensors


def _of_pytorch(state: object) -> dict[str, StoredTensor]:
    """What a pickled state dict holds. ValueError for anything but plain float tensors, each
    backed by memory of its size."""
    got = type(state).__name__
    require("load_model", "contents", got, isinstance(state, dict), "a dict of tensors")
    assert isinstance(state, dict)
    for name, tensor in state.items():
        plain = isinstance(name, str) and isinstance(tensor, Tensor)
        plain = plain and tensor.layout is torch.strided and not tensor.is_quantized
        got = f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')}".strip()
        plain = plain and tensor.dtype in DTYPES
        require("load_model", str(name)[:80], got, plain, "a dense float tensor")
        held, needed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        require("load_model", f"bytes of {name}", held, held >= needed, f">= {needed}")
    return {name: StoredTensor.of(tensor) for name, tensor in state.items()}
