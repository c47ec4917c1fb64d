"""Which files of a folder hold the weights, where they may lie and what may be in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim
from safetensors.torch import load_file, save_file
from utils import tiny_qwen2_5_vl

from vtts_rt.models.registry import checkpoint_dtype, load_model
from vtts_rt.models.tensor_files import open_tensors

NORM = "model.language_model.norm.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BINARY, BINARY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EXPLICIT = "mine.safetensors"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    state = tiny_qwen2_5_vl(layers=1, vision_depth=2).state_dict()
    return {n: t.clone() for n, t in state.items() if n != "lm_head.weight"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_qwen2_5_vl(layers=1, vision_depth=2).config.save_pretrained(tmp_path)
    return tmp_path


def marked(tensors: dict[str, torch.Tensor], mark: float) -> dict[str, torch.Tensor]:
    return {**tensors, NORM: torch.full_like(tensors[NORM], mark)}


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], mark: float) -> None:
    """A file, or an index and its two shards, whose last norm is `mark`."""
    tensors = marked(tensors, mark)
    save: Any = save_file if "safetensors" in name else torch.save
    extra: Any = {"metadata": {"format": "pt"}} if save is save_file else {}
    if not name.endswith(".json"):
        save(tensors, folder / name, **extra)
        return
    suffix = ".safetensors" if save is save_file else ".bin"
    half = len(tensors) // 2
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"part-{mark}-{number}{suffix}"
        save({n: tensors[n] for n in part}, folder / file, **extra)
        weight_map |= dict.fromkeys(part, file)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "names",
    [
        (SINGLE, INDEX, BINARY, BINARY_INDEX),
        (INDEX, BINARY, BINARY_INDEX),
        (BINARY, BINARY_INDEX),
        (BINARY_INDEX,),
        (SINGLE, EXPLICIT),
        (INDEX, SINGLE),
    ],
)
def test_the_file_that_transformers_takes_counts(
    folder: Path, tensors: dict[str, torch.Tensor], names: tuple[str, ...]
) -> None:
    for mark, name in enumerate(names, 2):
        write(folder, name, tensors, float(mark))
    if EXPLICIT in names:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "transformers_weights": EXPLICIT})
        )
    torchvision_shim.install()
    from transformers import Qwen2_5_VLForConditionalGeneration

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    mark = float(theirs.state_dict()[NORM][0])
    ours = load_model(folder).language.norm.weight.detach()
    assert torch.all(ours == mark) and mark >= 2


def test_other_names_are_named(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"or its index, got '.*' with model\.fp16\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "link_folder", "loop", "explicit"])
def test_an_index_does_not_leave_its_folder(
    folder: Path, tensors: dict[str, torch.Tensor], tmp_path_factory: Any, kind: str
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    save_file(tensors, outside / "w.safetensors")
    name = "w.safetensors"
    if kind in ("parent", "explicit"):
        name = f"../{outside.name}/w.safetensors"
        assert (folder / name).is_file()
    elif kind == "absolute":
        name = str(outside / name)
    elif kind == "link":
        (folder / name).symlink_to(outside / name)
    elif kind == "link_folder":
        (folder / "in").symlink_to(outside)
        name = "in/w.safetensors"
    else:
        (folder / name).symlink_to(folder / name)
    if kind == "explicit":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a file named by \S+ must be inside the checkpoint's"):
        load_model(folder)


def test_links_of_a_hub_cache_and_subfolders_are_followed(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b/blobs"
    (folder / "sub").mkdir(parents=True)
    blobs.mkdir()
    tiny_qwen2_5_vl(layers=1, vision_depth=2).config.save_pretrained(folder)
    save_file(tensors, blobs / "abc")
    (folder / "sub" / "w.safetensors").symlink_to("../../../blobs/abc")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "sub/w.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    model = load_model(folder)
    assert torch.equal(model.language.norm.weight.detach(), tensors[NORM])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "must be with a weight_map of file names, got 'NoneType'"),
        ({}, "must be with a weight_map of file names"),
        ({"a": 3}, "must be with a weight_map of file names"),
        ({"a": ""}, "must be inside the checkpoint's folder"),
        ({"a": "a\0b"}, "must be inside the checkpoint's folder"),
        ({"a": "none.safetensors"}, r"shards must be all there.*none\.safetensors"),
    ],
)
def test_an_index_that_names_no_files(folder: Path, weight_map: Any, message: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_tensors_of_other_kinds_are_refused(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    wide = tensors[NORM][:1].expand(1 << 40)
    cases: list[tuple[Any, str]] = [
        ({**tensors, NORM: wide}, rf"bytes of {NORM} must be >= {1 << 42}"),
        ({**tensors, NORM: tensors[NORM].to(torch.int8)}, r"must be a dense float tensor, got 'T"),
        ({**tensors, NORM: tensors[NORM].to_sparse()}, "must be a dense float tensor"),
        ({"state_dict": tensors}, "state_dict must be a dense float tensor, got 'dict'"),
        ([tensors], "contents must be a dict of tensors, got 'list'"),
    ]
    for state, message in cases:
        torch.save(state, folder / BINARY)
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    (folder / BINARY).unlink()
    save_file({**tensors, NORM: tensors[NORM].to(torch.int8)}, folder / SINGLE)
    with pytest.raises(ValueError, match=rf"dtype of {NORM} must be a float dtype, got 'I8'"):
        load_model(folder)
    again = {"language_model.model.norm.weight": tensors[NORM].clone(), **tensors}
    save_file(again, folder / SINGLE)
    with pytest.raises(ValueError, match="must be given once each"):
        load_model(folder)


def test_headers_are_read_without_their_tensors(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, folder / SINGLE)
    with open_tensors(folder) as stored:
        assert {n: s.shape for n, s in stored.items()} == {n: t.shape for n, t in tensors.items()}
        assert all(s.dtype is torch.float32 for s in stored.values())
        assert torch.equal(stored[NORM].read(), load_file(folder / SINGLE)[NORM])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_files_where_the_config_says_none(
    folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    config = json.loads((folder / "config.json").read_text())
    for scope in (config, config["text_config"], config["vision_config"]):
        scope.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    torchvision_shim.install()
    from transformers import Qwen2_5_VLForConditionalGeneration

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert checkpoint_dtype(folder) == theirs.dtype == dtype
