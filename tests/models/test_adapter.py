"""Adapters: merged through peft as their own model computes, or refused, never passed over."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from utils import random_rows, tiny_checkpoint, tiny_qwen2_5_vl, tiny_qwen2_vl

from vtts_rt import Runtime, SamplingParams
from vtts_rt.models.base import ForwardBatch, VideoLM
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import load_extras, load_model, save_hf
from vtts_rt.models.tokenizer import Tokenizer

WEIGHTS = "adapter_model.safetensors"
IDS = [5, 17, 42, 8, 99, 3, 250]


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base"))
    save_hf(load_model(folder), folder, extras={"prompts": {"cue_look": "Hm?"}})
    return folder


def make_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """An adapter of random weights; returns peft's model, unmerged."""
    import peft

    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    torch.manual_seed(0)
    from transformers import AutoModelForImageTextToText

    net = AutoModelForImageTextToText.from_pretrained(base)
    config = peft.LoraConfig(init_lora_weights=False, **{**defaults, **settings})
    model = peft.get_peft_model(net, config)
    if settings.get("modules_to_save"):
        with torch.no_grad():
            head = dict(model.named_parameters())
            for name, parameter in head.items():
                if "modules_to_save" in name:
                    parameter.mul_(-1.0)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: VideoLM) -> torch.Tensor:
    positions = torch.arange(len(IDS)).expand(3, -1)
    return model.logits(model(ForwardBatch(torch.tensor(IDS), None, positions, [0, len(IDS)])))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "all-linear", "head"],
)
@torch.no_grad()
def test_it_computes_as_peft_unmerged(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = make_adapter(base, tmp_path, **settings)
    expected = theirs(input_ids=torch.tensor([IDS])).logits[0]
    model = load_model(tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert (logits(load_model(base)) - expected).abs().max() > 0.1
    assert (model.language.lm_head is not None) == ("modules_to_save" in settings)


def test_a_tower_of_qwen2_vl_is_adapted_too(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", tiny_qwen2_vl)
    theirs = make_adapter(base, tmp_path / "adapter", target_modules=["fc1", "qkv", "v_proj"])
    ours, rows = load_model(tmp_path / "adapter"), random_rows([(2, 4, 6)])
    with torch.no_grad():
        visual = theirs.base_model.model.model.visual
        expected = visual(rows, grid_thw=torch.tensor([[2, 4, 6]])).pooler_output
        found = ours.visual(rows, [(2, 4, 6)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - load_model(base).visual(rows, [(2, 4, 6)])).abs().max() > 0.1
        expected = theirs(input_ids=torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beside_the_weights_it_is_merged_into_these(base: Path, tmp_path: Path) -> None:
    """Whatever base its config names, as in transformers."""
    other, beside, alone = tmp_path / "other", tmp_path / "beside", tmp_path / "alone"
    tiny_qwen2_5_vl(seed=3).save_pretrained(other)
    make_adapter(base, alone)
    shutil.copytree(base, beside)
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(alone / name, beside / name)
    config = json.loads((beside / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (beside / "adapter_config.json").write_text(json.dumps(config))
    ours = logits(load_model(beside))
    assert torch.equal(ours, logits(load_model(alone)))
    from transformers import Qwen2_5_VLForConditionalGeneration

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(beside).eval()
    expected = theirs(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_with_nothing_else_takes_all_from_its_base(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path)
    assert load_extras(tmp_path) == load_extras(base) != {}
    assert len(Tokenizer.from_pretrained(tmp_path, CHAT)) == len(
        Tokenizer.from_pretrained(base, CHAT)
    )
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    texts = []
    for folder in (base, tmp_path):
        with Runtime.from_pretrained(folder) as runtime:
            texts.append(runtime.generate("hello", sampling).token_ids)
    assert texts[0] != texts[1]


def test_names_of_an_older_transformers_are_known(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path)
    expected = load_model(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {name.replace("model.language_model.", "model."): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(logits(load_model(tmp_path)), logits(expected))


def test_tensors_that_fit_nothing_are_named(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = next(iter(tensors))
    weight = tensors.pop(first)
    for change, message in (
        ({}, r"tensors must fit the model, got 1 missing \(base_model\.model\..*lora_A"),
        ({first: weight, first.replace("layers.0", "layers.9"): -weight}, "got 1 unexpected"),
        ({first: weight[:, :3].contiguous()}, "must be of an adapter that peft can merge"),
        ({first: weight * float("nan")}, "must be finite numbers of float32"),
    ):
        save_file({**tensors, **change}, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_what_cannot_be_merged_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    beside = tmp_path / "beside"
    shutil.copytree(base, beside)
    for name in (path.name, WEIGHTS):
        shutil.copy(tmp_path / name, beside)
    for change, message in (
        ({"peft_type": "PROMPT_TUNING"}, "must be of an adapter that peft can merge"),
        ({"target_modules": ["nothing"]}, "must be of an adapter that peft can merge"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path must be a model, got None"),
        ({"base_model_name_or_path": str(tmp_path)}, "must be a folder with config.json and no ad"),
        ({"base_model_name_or_path": str(beside)}, "config.json and no adapter of its own"),
        ({"base_model_name_or_path": "/no/such/folder"}, "must be 'tiny', a directory that exis"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    path.write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="must hold no adapter .* unless peft .*vtts_rt.adapters"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_half_of_an_adapter_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(ValueError, match="both adapter_config.json and adapter_model.safetensors"):
        load_model(tmp_path / "model")
