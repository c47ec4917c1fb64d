"""Other families through what all share: checkpoints, rounds, groups, drafts, new weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_shim
from engine_tools import WHOLE, Frames, encode, make_engine, pair, run
from safetensors.torch import load_file
from utils import copy_config, request, tiny_checkpoint, tiny_qwen2_vl, tiny_qwen3_vl, tokens, told

from vtts_rt import EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.models import language, qwen2_vl, qwen3_vl
from vtts_rt.models.config import TowerConfig
from vtts_rt.models.registry import (
    FAMILIES,
    from_config,
    load_model,
    load_tokenizer,
    read_model_config,
    save_hf,
)
from vtts_rt.models.weights import new_style
from vtts_rt.types import Segment

ENGINE = EngineConfig(kv_bytes=1 << 24)


@dataclass(frozen=True)
class Family:
    """net: transformers' class of what `make` builds, vision: the shape of its tower."""

    make: Callable[..., Any]
    net: str
    vision: TowerConfig

    def checkpoint(self, folder: Path, **more: Any) -> Path:
        return tiny_checkpoint(folder, self.make, **more)


QWEN2_VL = Family(
    tiny_qwen2_vl,
    "Qwen2VLForConditionalGeneration",
    qwen2_vl.VisionConfig(3, 64, 2, 128, 64),
)
QWEN3_VL = Family(
    tiny_qwen3_vl,
    "Qwen3VLForConditionalGeneration",
    qwen3_vl.VisionConfig(3, 64, 2, 72, 64, 25, (0, 1)),
)


@pytest.fixture(scope="module", params=[QWEN2_VL, QWEN3_VL], ids=lambda family: family.net)
def family(request: Any) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: Any, family: Family, tmp_path_factory: Any) -> Path:
    return family.checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


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
    config["vision_config"]["model_type"] = config["model_type"]
    config["vision_config"].pop("rope_parameters", None)
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return {**text, **config}


def test_config_is_read(family: Family, folder: Path) -> None:
    assert read_model_config(folder).vision == family.vision


def test_config_of_before_nesting_is_read(tmp_path: Path) -> None:
    folder = QWEN2_VL.checkpoint(tmp_path / "nested")
    nested = read_model_config(folder)
    copy_config(folder, tmp_path, before_nesting)
    assert "text_config" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(
        (folder / "generation_config.json").read_text()
    )
    assert read_model_config(tmp_path) == nested


def test_saved_models_load_in_transformers(family: Family, folder: Path, tmp_path: Path) -> None:
    torchvision_shim.install()
    import transformers

    net, model = getattr(transformers, family.net), load_model(folder)
    assert type(model) is FAMILIES[model.config.model_type]
    save_hf(model, tmp_path)
    theirs, info = net.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, state = net.from_pretrained(folder).state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    names = load_file(folder / "model.safetensors")  # transformers may write older ones
    assert model.export().keys() == {new_style(name) for name in names}
    assert load_model(tmp_path).config == model.config
    ours = json.loads((tmp_path / "config.json").read_text())["text_config"]
    wanted = json.loads((folder / "config.json").read_text())["text_config"]
    assert ours.keys() - wanted.keys() <= {"dtype"}
    interleaved = ours["rope_parameters"].get("mrope_interleaved", False)  # vLLM asks for it
    assert interleaved is (family is QWEN3_VL)


VISION, TEXT = "vision_config", "text_config"
ROPE = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "axial"}}
MISTAKES = [
    (QWEN2_VL, VISION, {"hidden_act": "gelu"}, "hidden_act must be 'quick_gelu', got 'gelu'"),
    (QWEN2_VL, TEXT, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    (QWEN2_VL, VISION, {"mlp_ratio": 0}, "mlp_ratio must be in 1..4096, got 0"),
    (QWEN2_VL, VISION, {"embed_dim": -64}, "embed_dim must be in 1..16777216, got -64"),
    (QWEN2_VL, VISION, {"embed_dim": 60}, "hidden_size must be a multiple of 4"),
    (QWEN2_VL, VISION, {"hidden_size": 32}, "out_hidden_size must be hidden_size"),
    (QWEN2_VL, VISION, {"mlp_ratio": 3}, "mlp.fc1.weight"),
    (QWEN2_VL, VISION, ROPE, "10000"),
    (QWEN3_VL, VISION, {"hidden_act": "silu"}, "hidden_act must be 'gelu_pytorch_tanh'"),
    (QWEN3_VL, TEXT, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    (QWEN3_VL, TEXT, {"attention_bias": True}, "attention_bias must be False, got True"),
    (QWEN3_VL, TEXT, {"head_dim": 15}, "requires an even rotary dimension"),
    (QWEN3_VL, TEXT, {"head_dim": 0}, "head_dim must be in 1..16777216, got 0"),
    (QWEN3_VL, TEXT, {"head_dim": 8}, "mrope_section must be three numbers that sum to"),
    (QWEN3_VL, VISION, {"num_position_embeddings": 26}, "must be a square number, got 26"),
    (QWEN3_VL, VISION, {"num_position_embeddings": 36}, "pos_embed.weight"),
    (QWEN3_VL, VISION, {"deepstack_visual_indexes": [1, 0]}, r"ascending, in 0\.\.2, got \[1, 0\]"),
    (QWEN3_VL, VISION, {"deepstack_visual_indexes": [1, 3]}, r"ascending, in 0\.\.2, got \[1, 3\]"),
    (QWEN3_VL, VISION, {"deepstack_visual_indexes": [0, 1, 2]}, r"fewer than .* \(3\)"),
    (QWEN3_VL, VISION, {"deepstack_visual_indexes": [0]}, "1 unexpected|unexpected .*merger_list"),
    (QWEN3_VL, VISION, {"out_hidden_size": 32}, "out_hidden_size must be hidden_size"),
    (QWEN3_VL, VISION, ROPE, "10000"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    families = (QWEN2_VL, QWEN3_VL)
    return {family.net: family.checkpoint(tmp_path_factory.mktemp("m")) for family in families}


@pytest.mark.parametrize(("family", "part", "change", "message"), MISTAKES, scope="function")
def test_what_does_not_fit_is_named(
    family: Family,
    folders: dict[str, Path],
    tmp_path: Path,
    part: str,
    change: dict[str, Any],
    message: str,
) -> None:
    folder = folders[family.net]
    copy_config(folder, tmp_path, lambda config: config[part].update(change))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_width_that_no_ratio_gives_is_refused() -> None:
    with pytest.raises(ValueError, match="intermediate_size must be a multiple of 64, got 72"):
        qwen2_vl.VisionConfig(3, 64, 2, 72, 64)


def test_groups_drafts_and_one_call_a_step_change_no_token(
    folder: Path, runtime: Runtime, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = request(clip, sampling=SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    answer = runtime.ask(**greedy)
    assert answer.rounds[1].reuse.pairs_reused > 0
    expected = told(answer)
    group = runtime.ask_batch([greedy | {"member": member} for member in range(2)])
    assert [told(member) for member in group] == [expected] * 2
    monkeypatch.setattr(language, "usable", lambda x, head_dim: False)
    engine = EngineConfig(kv_bytes=1 << 24, draft_tokens=0, prefix_cache=False)
    with Runtime.from_pretrained(folder, engine=engine) as plain:
        assert told(plain.ask(**greedy)) == expected


def test_pairs_that_are_split_over_passes_change_no_token(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    size = (model.geometry.token_px * 2, model.geometry.token_px * 3)
    shown = [Segment((pair(i),), WHOLE, size, model.geometry) for i in (1, 2, 3)]
    prompt = encode(tokenizer, "look ", *shown, " say")
    whole, split = (
        run(make_engine(model, tokenizer, max_sequences=4, max_batch_tokens=most), prompt, Frames())
        for most in (1024, 5)
    )
    assert split.token_ids == whole.token_ids
    assert split.logprobs == whole.logprobs


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
    family: Family, runtime: Runtime, clip: Path, tmp_path: Path
) -> None:
    before = told(runtime.ask(**request(clip)))
    tied = runtime.engine.model.language.lm_head is None
    theirs = family.make(tie_word_embeddings=tied, seed=9)
    runtime.update_weights(theirs.state_dict())
    after = told(runtime.ask(**request(clip)))
    theirs.save_pretrained(tmp_path)
    with Runtime(load_model(tmp_path), runtime.engine.tokenizer, engine=ENGINE) as fresh:
        assert before != after == told(fresh.ask(**request(clip)))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_it_answers_in_eight_bits(
    folder: Path, runtime: Runtime, clip: Path, quantization: str
) -> None:
    transcript = runtime.ask(**request(clip)).rounds[-1].transcript
    expected = runtime.score(transcript)
    with Runtime.from_pretrained(folder, engine=ENGINE, quantization=quantization) as rounded:
        assert len(tokens(rounded.ask(**request(clip)))) == 3
        found = rounded.score(transcript, videos=clip)
    most = 0.1 if quantization == "int8" else 0.5
    assert 0 < max(abs(a - b) for a, b in zip(found, expected, strict=True)) < most


def test_random_weights_can_be_trained(folder: Path) -> None:
    model = from_config(read_model_config(folder), seed=1)
    rows = torch.randn(24, model.geometry.row_size)
    model.visual(rows, [(1, 4, 6)]).square().sum().backward()
    grads = [p.grad for p in model.visual.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in grads)


def test_later_rounds_compute_what_is_new(runtime: Runtime, clip: Path) -> None:
    answer = runtime.ask(**request(clip))
    first, *later = answer.rounds
    shown = first.plan.num_pairs
    assert (first.reuse.pairs_encoded, first.reuse.pairs_reused) == (shown, 0)
    for result, before in zip(later, answer.rounds, strict=False):
        reuse, new = result.reuse, result.plan.num_pairs
        # Of the round before all but the last token, which no step has read yet.
        done = before.prompt_tokens + len(before.token_ids) - 1
        assert reuse.tokens_reused == done
        assert reuse.tokens_prefilled == result.prompt_tokens - done
        assert (reuse.pairs_encoded, reuse.pairs_reused) == (new, shown)
        shown += new
    again = runtime.ask(**request(clip))
    assert told(again) == told(answer)
    assert sum(r.reuse.pairs_encoded for r in again.rounds) == 0


def test_parities_agree_where_the_release_says_nothing(runtime: Runtime, clip: Path) -> None:
    """Images too are resized as transformers does."""
    both = []
    for parity in ("release", "transformers"):
        looks = PerceptionConfig(strategy="official", parity=parity, sample_fps=1.0)  # type: ignore[arg-type]
        both.append(runtime.ask(**request(clip, perception=looks)))
        cost = runtime.plan(clip, "which?", options=["red", "blue"], perception=looks)
        assert cost["rounds"][0]["prompt_tokens"] == both[-1].rounds[0].prompt_tokens
    assert told(both[0]) == told(both[1])
    assert {s.resize for answer in both for r in answer.rounds for s in r.plan.segments} == {
        "fixed"
    }


def test_a_chat_writes_a_video_as_the_family_does(
    family: Family, runtime: Runtime, clip: Path
) -> None:
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "which?"}]
    looks = PerceptionConfig(sample_fps=1.0, min_pixels=3136, total_pixels=60_000)
    limits = SamplingParams(max_tokens=3, ignore_eos=True)
    messages = [{"role": "user", "content": content}]
    reply = runtime.chat(messages, perception=looks, sampling=limits)
    (segment,) = reply.plan.segments
    times = reply.prompt.count(" seconds>")
    assert times == (len(segment.pairs) if family is QWEN3_VL else 0)
    assert reply.prompt.count("<|vision_start|>") == times + 1
