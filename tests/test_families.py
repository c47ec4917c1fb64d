"""Qwen2-VL through what all families share: checkpoints, rounds, groups, drafts, new weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim
from safetensors.torch import load_file
from utils import copy_config, request, tiny_checkpoint, tiny_qwen2_vl, tokens

from vtts_rt import EngineConfig, Runtime, SamplingParams
from vtts_rt.models import language
from vtts_rt.models.qwen2_vl import Qwen2_VL, VisionConfig
from vtts_rt.models.registry import from_config, load_model, read_model_config, save_hf
from vtts_rt.models.weights import new_style

ENGINE = EngineConfig(kv_bytes=1 << 24)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_checkpoint(path, tiny_qwen2_vl, tie_word_embeddings=request.param)


@pytest.fixture
def runtime(folder: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(folder, engine=ENGINE) as runtime:
        yield runtime


def before_nesting(config: dict[str, Any]) -> dict[str, Any]:
    """As released checkpoints have it: the language model's settings beside the others, another
    `model_type` of the tower, the rotary settings of transformers 4."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"]["model_type"] = "qwen2_vl"
    config["vision_config"].pop("rope_parameters", None)
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return {**text, **config}


def test_config_is_read_nested_and_flat(folder: Path, tmp_path: Path) -> None:
    nested = read_model_config(folder)
    assert nested.vision == VisionConfig(3, 64, 2, 128, 64)
    copy_config(folder, tmp_path, before_nesting)
    assert "text_config" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(
        (folder / "generation_config.json").read_text()
    )
    assert read_model_config(tmp_path) == nested


def test_saved_models_load_in_transformers(folder: Path, tmp_path: Path) -> None:
    torchvision_shim.install()
    from transformers import Qwen2VLForConditionalGeneration as Net

    model = load_model(folder)
    assert type(model) is Qwen2_VL
    save_hf(model, tmp_path)
    theirs, info = Net.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, state = Net.from_pretrained(folder).state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    names = load_file(folder / "model.safetensors")  # transformers writes its older ones
    assert model.export().keys() == {new_style(name) for name in names}
    assert load_model(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act must be 'quick_gelu', got 'gelu'"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ("vision_config", {"mlp_ratio": 0}, "mlp_ratio must be in 1..4096, got 0"),
        ("vision_config", {"embed_dim": -64}, "embed_dim must be in 1..16777216, got -64"),
        ("vision_config", {"embed_dim": 60}, "hidden_size must be a multiple of 4"),
        ("vision_config", {"hidden_size": 32}, "out_hidden_size must be hidden_size"),
        ("vision_config", {"mlp_ratio": 3}, "mlp.fc1.weight"),
        ("vision_config", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "axial"}}, "10000"),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    copy_config(folder, tmp_path, lambda config: config[part].update(change))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_width_that_no_ratio_gives_is_refused() -> None:
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 64, got 72"):
        VisionConfig(3, 64, 2, 72, 64)


def test_groups_drafts_and_one_call_a_step_change_no_token(
    folder: Path, runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = request(clip, sampling=SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    answer = runtime.ask(**greedy)
    assert answer.rounds[1].reuse.pairs_reused > 0
    expected = tokens(answer)
    group = runtime.ask_group(**greedy, num_answers=2)
    assert [tokens(member) for member in group] == [expected] * 2  # type: ignore[arg-type]
    monkeypatch.setattr(language, "usable", lambda x, head_dim: False)
    engine = EngineConfig(kv_bytes=1 << 24, draft_tokens=0, prefix_cache=False)
    with Runtime.from_pretrained(folder, engine=engine) as plain:
        assert tokens(plain.ask(**greedy)) == expected


def test_decoding_takes_the_native_call(
    runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vtts_rt._C", reason="built without the native extension")
    steps = []
    run = language.decode_step
    monkeypatch.setattr(language, "decode_step", lambda *a, **k: steps.append(1) or run(*a, **k))
    answer = runtime.ask(**request(clip))
    drafted = sum(r.reuse.tokens_accepted for r in answer.rounds)
    assert len(steps) >= sum(map(len, tokens(answer))) - drafted - len(answer.rounds)


def test_new_weights_are_those_of_a_runtime_that_loads_them(
    runtime: Runtime, clip: Path, tmp_path: Path
) -> None:
    before = tokens(runtime.ask(**request(clip)))
    theirs = tiny_qwen2_vl(
        tie_word_embeddings=runtime.engine.model.language.lm_head is None, seed=9
    )
    runtime.update_weights(theirs.state_dict())
    after = tokens(runtime.ask(**request(clip)))
    theirs.save_pretrained(tmp_path)
    with Runtime(load_model(tmp_path), runtime.engine.tokenizer, engine=ENGINE) as fresh:
        assert before != after == tokens(fresh.ask(**request(clip)))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_it_answers_in_eight_bits(folder: Path, clip: Path, quantization: str) -> None:
    with Runtime.from_pretrained(folder, engine=ENGINE, quantization=quantization) as runtime:
        assert len(tokens(runtime.ask(**request(clip)))) == 3


def test_random_weights_can_be_trained(folder: Path) -> None:
    model = from_config(read_model_config(folder), seed=1)
    rows = torch.randn(24, model.geometry.row_size)
    model.visual(rows, [(1, 4, 6)]).square().sum().backward()
    grads = [p.grad for p in model.visual.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in grads)
