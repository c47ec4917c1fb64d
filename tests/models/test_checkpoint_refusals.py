"""Checkpoints that do not fit are refused by what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from utils import copy_config, tiny_qwen2_5_vl

from vtts_rt.models.registry import load_extras, load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    """New-style names, as modules of transformers 5 have them."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_qwen2_5_vl()
    model.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def broken(tensors: dict[str, Tensor], kind: str) -> None:
    prefix = "model.language_model.layers."
    if kind == "missing":
        for name in [n for n in tensors if n.startswith(prefix)][:5]:
            del tensors[name]
    elif kind == "unexpected":
        tensors["model.language_model.layers.9.input_layernorm.weight"] = torch.ones(3)
    else:
        tensors[f"{prefix}0.self_attn.q_proj.weight"] = torch.ones(8, 64)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"5 missing \(model\.language_model\.layers\.0\.\S+, \S+, \S+, \.\.\.\)"),
        (
            "unexpected",
            r"1 unexpected \(model\.language_model\.layers\.9\.input_layernorm\.weight\)",
        ),
        ("shape", r"1 of wrong shape \(.*q_proj\.weight.*\(8, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    saved: Path, tmp_path: Path, kind: str, message: str
) -> None:
    copy_config(saved, tmp_path)
    tensors = load_file(saved / "model.safetensors")
    broken(tensors, kind)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen3_5"},
            "model_type must be one of qwen2_5_vl, qwen2_vl, qwen3_vl, got 'qwen3_5'",
        ),
        (
            {"model_type": None},
            "model_type must be one of qwen2_5_vl, qwen2_vl, qwen3_vl, got None",
        ),
        ({"text_config.hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"vision_config.patch_size": 16}, r"temporal size must be \(14, 2, 2\), got \(16, 2, 2\)"),
        ({"text_config.layer_types": ["sliding_attention"] * 3}, "layer_types must be all full"),
        ({"text_config.hidden_size": "many"}, "hidden_size must be in 1..16777216, got 'many'"),
        ({"text_config.use_cache": "many"}, "config.json must be a valid qwen2_5_vl config"),
        ({"text_config.num_attention_heads": 0}, "num_attention_heads must be in 1..16777216"),
        ({"text_config.rms_norm_eps": -1.0}, "rms_norm_eps must be a number > 0, got -1.0"),
        ({"text_config.rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a number > 0"),
        ({"text_config.rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a number"),
        ({"text_config.head_dim": 8}, "head_dim must be hidden_size / heads, got 8"),
        ({"vision_config.window_size": 14}, "window_size must be >= 28, got 14"),
        ({"vision_config.rope_parameters": {"rope_theta": 5.0, "rope_type": "axial"}}, "10000.0"),
        ({"image_token_id": 400}, r"image_token_id must be in 0\.\.399, got 400"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent"),
    ],
)
def test_other_models_are_refused(
    saved: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    def apply(config: dict[str, Any]) -> None:
        for path, value in change.items():
            *scopes, name = path.split(".")
            target = config
            for scope in scopes:
                target = target[scope]
            target[name] = value

    copy_config(saved, tmp_path, apply)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 4000),
        ("text_config", "num_hidden_layers", 10**12),
        ("vision_config", "depth", 4096),
        ("text_config", "vocab_size", 1 << 24),
        ("text_config", "intermediate_size", 1 << 24),
        ("vision_config", "intermediate_size", 1 << 24),
    ],
)
def test_sizes_are_compared_with_the_files_before_anything_is_built(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    name: str,
    value: int,
) -> None:
    def lie(config: dict[str, Any]) -> None:
        config[part][name] = value
        if name == "num_hidden_layers":
            del config[part]["layer_types"]

    copy_config(saved, tmp_path, lie)
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    built: list[Any] = []
    monkeypatch.setattr(
        "vtts_rt.models.weights.is_finite", lambda *args: built.append(args)
    )  # the first thing done with a tensor
    rule = "hidden_layers|depth" if "hidden_layers" in name or name == "depth" else "wrong shape"
    with pytest.raises(ValueError, match=rule):
        load_model(tmp_path)
    assert not built


def test_rows_of_one_projection_do_not_count_for_another(saved: Path, tmp_path: Path) -> None:
    """Together queries, keys and values have the right number of rows, each has not."""
    copy_config(saved, tmp_path)
    tensors = load_file(saved / "model.safetensors")
    prefix = "model.language_model.layers.0.self_attn."
    for name, rows in (("q_proj", 32), ("k_proj", 64), ("v_proj", 32)):
        tensors[f"{prefix}{name}.weight"] = torch.zeros(rows, 64)
        tensors[f"{prefix}{name}.bias"] = torch.zeros(rows)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="4 of wrong shape"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e5])
@pytest.mark.parametrize(
    "name",
    ["model.visual.patch_embed.proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"],
)
def test_values_that_are_no_numbers_are_refused(
    saved: Path, tmp_path: Path, name: str, value: float
) -> None:
    copy_config(saved, tmp_path)
    tensors = load_file(saved / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    dtype = "float16" if value == 1e5 else "bfloat16"  # too large for one of them
    with pytest.raises(ValueError, match=f"{name} must be finite numbers of {dtype}"):
        load_model(tmp_path, dtype)
    if value == 1e5:
        load_model(tmp_path, "bfloat16")


def test_broken_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be a folder with config.json"):
        load_model(tmp_path)
    copy_config(saved, tmp_path)
    with pytest.raises(ValueError, match="a folder with model.safetensors or its index"):
        load_model(tmp_path)
    whole = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors must be a complete checkpoint file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must be a readable JSON file"):
        load_model(tmp_path)
    (tmp_path / "vtts.json").write_text('{"perception": 3}')
    with pytest.raises(ValueError, match="perception must be an object, got 'int'"):
        load_extras(tmp_path)


def test_bad_dtype_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of float32"):
        load_model(saved, dtype="int8")
