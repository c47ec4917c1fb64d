"""Every layout of checkpoint loads, ours loads in transformers, broken ones are named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from utils import copy_config, tiny_qwen2_5_vl

from vtts_rt.models.base import ForwardBatch, VisionRows
from vtts_rt.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VL
from vtts_rt.models.registry import (
    checkpoint_dtype,
    from_config,
    load_extras,
    load_model,
    read_model_config,
    resolve_model,
    save_hf,
)
from vtts_rt.ops import native
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PixelBox

Rename = Callable[[str], str]


def old_name(name: str) -> str:
    """As transformers 4.49 wrote it."""
    name = name.replace("model.visual.", "visual.")
    return name.replace("model.language_model.", "model.")


def older_wrapper_name(name: str) -> str:
    """As composite checkpoints with an inner causal model have it."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = name.replace("lm_head.", "language_model.lm_head.")
    return name.replace("model.visual.", "visual.")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request: Any, tmp_path_factory: Any) -> Path:
    """New-style names, as modules of transformers 5 have them (its save_pretrained writes the
    old ones)."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_qwen2_5_vl(tie_word_embeddings=request.param)
    model.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if request.param:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(model: Qwen2_5_VL, other: Qwen2_5_VL) -> bool:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("rename", [old_name, older_wrapper_name])
def test_old_names_load(saved: Path, tmp_path: Path, rename: Rename) -> None:
    copy_config(saved, tmp_path)
    tensors = {rename(n): t for n, t in load_file(saved / "model.safetensors").items()}
    assert any(name.startswith("visual.") for name in tensors)
    # Old versions saved these buffers, and tied heads as copies.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(load_model(tmp_path), load_model(saved))


def test_sharded_and_pytorch_files_load(saved: Path, tmp_path: Path) -> None:
    tied = json.loads((saved / "config.json").read_text())["tie_word_embeddings"]
    model = tiny_qwen2_5_vl(tie_word_embeddings=tied)
    shards, binary = tmp_path / "shards", tmp_path / "binary"
    model.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert same(load_model(shards), load_model(saved))
    binary.mkdir()
    copy_config(saved, binary)
    for archive in (True, False):  # False is the format before PyTorch 1.6
        tensors = load_file(saved / "model.safetensors")
        path = binary / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=archive)
        assert same(load_model(binary), load_model(saved))
    next(shards.glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"shards must be all there.*model-00002"):
        load_model(shards)


def a_copy(embedding: Tensor) -> dict[str, Tensor]:
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}


def its_own(embedding: Tensor) -> dict[str, Tensor]:
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": -embedding}


def head_alone(embedding: Tensor) -> dict[str, Tensor]:
    return {"lm_head.weight": -embedding}


@pytest.mark.parametrize("held", [a_copy, its_own, head_alone])
@pytest.mark.parametrize("tied_in", ["both", "text_config"])
def test_a_head_in_a_tied_file_is_used_as_by_transformers(
    tmp_path: Path, held: Callable[[Tensor], dict[str, Tensor]], tied_in: str
) -> None:
    tiny_qwen2_5_vl(tie_word_embeddings=True).save_pretrained(tmp_path)
    if tied_in == "text_config":
        config = json.loads((tmp_path / "config.json").read_text())
        del config["tie_word_embeddings"]
        config["text_config"]["tie_word_embeddings"] = True
        (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= held(tensors.pop("model.embed_tokens.weight"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    import torchvision_shim

    torchvision_shim.install()
    from transformers import Qwen2_5_VLForConditionalGeneration

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for path in (tmp_path, tmp_path / "again"):  # what is saved is the same model
        model = load_model(path)
        language = model.language
        assert (language.lm_head is not None) == (held is its_own)
        head = language.embed_tokens if language.lm_head is None else language.lm_head
        embedding = theirs["model.language_model.embed_tokens.weight"]
        assert torch.equal(language.embed_tokens.weight, embedding)
        assert torch.equal(head.weight, theirs["lm_head.weight"])  # type: ignore[arg-type]
        save_hf(model, tmp_path / "again")


def test_heads_that_differ_by_less_than_the_dtype_are_tied(tmp_path: Path) -> None:
    tiny_qwen2_5_vl(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path, "float32").language.lm_head is not None
    assert load_model(tmp_path, "bfloat16").language.lm_head is None


def test_what_auto_model_saves_loads(tmp_path: Path) -> None:
    """A bare Qwen2_5_VLModel: other names, no head."""
    tiny_qwen2_5_vl(tie_word_embeddings=True).save_pretrained(tmp_path / "whole")
    from transformers import AutoModel

    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "bare")
    names = load_file(tmp_path / "bare" / "model.safetensors")
    assert "language_model.embed_tokens.weight" in names
    assert same(load_model(tmp_path / "bare"), load_model(tmp_path / "whole"))


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The one-level layout of 4.49, rope in `rope_scaling` and `rope_theta`."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    section = rope["mrope_section"]
    text.pop("model_type")
    text.pop("layer_types", None)
    text.pop("tie_word_embeddings", None)
    config.pop("dtype", None)
    return {
        **text,
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "torch_dtype": "float32",
    }


def test_flat_config_of_old_versions(saved: Path, tmp_path: Path) -> None:
    copy_config(saved, tmp_path, flat_config)
    assert "text_config" not in json.loads((tmp_path / "config.json").read_text())
    found, expected = read_model_config(tmp_path), read_model_config(saved)
    assert found.vision == expected.vision
    assert found.language == expected.language


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.float32, "auto"])
def test_dtype(saved: Path, tmp_path: Path, dtype: Any) -> None:
    model = load_model(saved, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).split(".")[-1])
    assert {p.dtype for p in model.parameters()} == {wanted} == {model.dtype}
    save_hf(model, tmp_path)
    assert checkpoint_dtype(tmp_path) == wanted


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", None])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    saved: Path, tmp_path: Path, isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bfloat16_isa", lambda: isa)
    for own in ("bfloat16", "float16", "float32"):
        save_hf(load_model(saved), tmp_path, own)
        faster = own == "bfloat16" and isa is not None
        assert load_model(tmp_path).dtype is (torch.bfloat16 if faster else torch.float32)
        assert load_model(tmp_path, own).dtype is getattr(torch, own)
        assert load_model(tmp_path, device="meta").dtype is getattr(torch, own)  # no CPU


def test_a_recipe_says_what_auto_is(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hf(load_model(saved), tmp_path, "bfloat16", {"dtype": {"cpu": "float16", "cuda": 3}})
    for isa in ("amx", None):
        monkeypatch.setattr(native, "bfloat16_isa", lambda isa=isa: isa)
        assert load_model(tmp_path).dtype is torch.float16
        assert load_model(tmp_path, "float32").dtype is torch.float32
        assert load_model("tiny").dtype is torch.float32
    for bad in ("int8", 16, ["float32"]):
        (tmp_path / "vtts.json").write_text(json.dumps({"dtype": {"cpu": bad}}))
        with pytest.raises(ValueError, match="dtype of the recipe on cpu must be one of float32"):
            load_model(tmp_path)


def test_saved_models_load_in_transformers(saved: Path, tmp_path: Path) -> None:
    import torchvision_shim

    torchvision_shim.install()
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = load_model(saved)
    extras = {"perception": {"max_rounds": 2}, "prompts": {"cue": "Look again."}}
    save_hf(model, tmp_path, extras=extras)
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load_file(saved / "model.safetensors")
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert model.export().keys() == expected.keys()
    assert load_extras(tmp_path) == extras
    again = load_model(tmp_path)
    assert again.config.perception == {"max_rounds": 2}
    assert replace(again.config, perception={}) == model.config
    assert theirs.config.vision_config.tokens_per_second == model.config.vision.tokens_per_second


def test_perception_settings_travel_with_the_model(saved: Path, tmp_path: Path) -> None:
    config = replace(load_model(saved).config, perception={"strategy": "append"})
    save_hf(from_config(config), tmp_path)
    assert load_model(tmp_path).config.perception == {"strategy": "append"}
    assert load_extras(saved) == {}


def test_a_checkpoints_own_mean_and_std_are_used(saved: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(saved, own)
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": 0.5}
    (own / "preprocessor_config.json").write_text(json.dumps(said))
    usual, model = load_model(saved), load_model(own)
    assert usual.geometry == GEOMETRY
    assert model.geometry == replace(GEOMETRY, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))
    assert model.version("visual") != usual.version("visual"), "features of one are not the other's"
    assert model.version("language") == usual.version("language")
    save_hf(model, tmp_path / "again")
    assert load_model(tmp_path / "again").geometry == model.geometry
    frame = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    jobs = [PatchifyJob(frame, frame, PixelBox(0, 0, 28, 28), (28, 28))]
    with torch.inference_mode():
        features = model.visual.encode_jobs(jobs)
        expected = model.visual(patchify(jobs, model.geometry), [(1, 2, 2)])
        assert torch.allclose(features, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(features, usual.visual.encode_jobs(jobs))


def test_random_models_depend_on_the_seed_alone(saved: Path) -> None:
    config = read_model_config(saved)
    torch.manual_seed(5)
    first = from_config(config, seed=1)
    assert same(first, from_config(config, seed=1))
    assert not same(first, from_config(config, seed=2))
    weight = first.language.embed_tokens.weight.detach()
    assert abs(float(weight.std()) - 0.02) < 1e-3
    assert float(first.language.layers[0].self_attn.qkv_proj.bias.detach().abs().max()) == 0.0
    assert float(first.visual.blocks[0].norm1.weight.detach().min()) == 1.0


def test_versions_follow_the_weights_of_their_tower(saved: Path) -> None:
    model, again = load_model(saved), load_model(saved)
    vision, language = model.version("visual"), model.version("language")
    assert (again.version("visual"), again.version("language")) == (vision, language)
    assert vision != language
    with torch.no_grad():
        again.visual.merger.mlp[2].bias[0] += 1e-3
    again.forget_versions({"language"})
    assert again.version("visual") == vision  # not hashed again
    again.forget_versions()
    assert again.version("visual") != vision
    assert again.version("language") == language
    assert load_model(saved, dtype="bfloat16").version("visual") != vision


def test_the_recipe_survives_transformers(saved: Path, tmp_path: Path) -> None:
    """A trainer loads the embedded model, changes it and saves it: it stays the same model."""
    import torchvision_shim

    torchvision_shim.install()
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    source = resolve_model("tiny")
    extras = load_extras(source)
    assert extras["perception"]["strategy"] == "append" and extras["prompts"]
    AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    assert load_extras(tmp_path) == extras
    again, model = load_model(tmp_path), load_model(source)
    assert again.config == model.config and same(again, model)


def test_a_file_beside_the_config_counts_before_its_field(saved: Path, tmp_path: Path) -> None:
    save_hf(load_model(saved), tmp_path, extras={"prompts": {"cue": "a"}})
    assert load_extras(tmp_path) == {"prompts": {"cue": "a"}}
    (tmp_path / "vtts.json").write_text('{"prompts": {"cue": "b"}}')
    assert load_extras(tmp_path) == {"prompts": {"cue": "b"}}
    save_hf(load_model(tmp_path), tmp_path)
    assert load_extras(tmp_path) == {"prompts": {"cue": "b"}}
    assert not (tmp_path / "vtts.json").exists()
    copy_config(tmp_path, tmp_path, lambda config: {**config, "vtts_rt": [1]})
    with pytest.raises(ValueError, match="config.json vtts_rt must be an object, got 'list'"):
        load_extras(tmp_path)


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "a/b/c", "bad name/x"])
def test_names_that_are_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"model must be 'tiny'.*{re.escape(repr(name))}"):
        resolve_model(name)


def test_hub_models_come_from_the_cache_or_fail_at_once(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append(options)
        if name == "owner/cached":
            return str(saved)
        raise FileNotFoundError("not cached")

    def unreachable(self: Any, name: str, **options: Any) -> None:
        assert options["timeout"] <= 10
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    assert resolve_model("owner/cached") == saved
    with pytest.raises(RuntimeError, match="neither a directory nor in the hub cache.*hf download"):
        resolve_model("owner/unknown")
    assert [options.get("local_files_only") for options in asked] == [True, True]


@pytest.mark.parametrize(("weights", "binaries"), [("model.safetensors", False), ("w.bin", True)])
def test_pytorch_files_are_downloaded_only_where_there_are_no_others(
    saved: Path, monkeypatch: pytest.MonkeyPatch, weights: str, binaries: bool
) -> None:
    import huggingface_hub

    patterns: list[str] = []

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError("not cached")
        patterns.extend(options["allow_patterns"])
        return str(saved)

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", weights, "w.bin")]
    info = SimpleNamespace(siblings=files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    assert resolve_model("owner/name") == saved
    assert ("*.bin" in patterns) == binaries and "*.safetensors" in patterns


def test_features_must_match_pads(saved: Path) -> None:
    model = load_model(saved)
    ids = torch.tensor([1, model.config.video_token_id, model.config.image_token_id])
    vision = model.vision_rows(ids, torch.full((2, 64), 7.0))
    batch = ForwardBatch(ids, vision, torch.zeros(3, 3, dtype=torch.long), [0, 3])
    merged = model.language.embed(batch)
    assert torch.equal(merged[0], model.language.embed_tokens.weight[1])
    assert torch.all(merged[1:] == 7.0)
    with pytest.raises(ValueError, match=r"features must be one a pad \(2\), got 3"):
        model.vision_rows(ids, torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"VisionRows: features must be \(2, 64\), got \(2, 63\)"):
        model(replace(batch, vision=VisionRows(vision.rows, torch.zeros(2, 63))))
