"""New weights in a running Runtime: in buckets, all at once or not at all, forgetting only what
depends on what was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_shim
from torch import Tensor
from utils import request, tiny_checkpoint, tiny_qwen2_5_vl, told

from vtts_rt import Runtime, SamplingParams
from vtts_rt.models.base import VideoLM
from vtts_rt.models.registry import from_config, load_model, save_hf

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
LANGUAGE = "model.language_model.layers.0.mlp.down_proj.weight"
VISION = "model.visual.blocks.0.mlp.down_proj.weight"
TEXT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.fixture
def runtime(folder: Path) -> Iterator[Runtime]:
    with Runtime.from_pretrained(folder) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def video() -> dict[str, Any]:
    frames = np.random.default_rng(0).integers(0, 256, (16, 56, 84, 3), dtype=np.uint8)
    return request(frames, source_fps=2.0)


def others(runtime: Runtime, seed: int = 7) -> dict[str, Tensor]:
    """All tensors of another model of the same shape."""
    return from_config(runtime.engine.model.config, seed).export()


def said(runtime: Runtime) -> list[int]:
    return runtime.generate("hello there", TEXT).token_ids


def held(runtime: Runtime) -> dict[str, Tensor]:
    return runtime.engine.model.export()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_buckets_are_applied_at_once(
    runtime: Runtime, video: dict[str, Any], tmp_path: Path
) -> None:
    old, before = held(runtime), told(runtime.ask(**video))
    new = others(runtime)
    names = list(new)
    buckets = [{name: new[name].clone() for name in names[start::3]} for start in range(3)]
    for bucket in buckets[:2]:
        runtime.update_weights(bucket, finish=False)
        for tensor in bucket.values():
            tensor.zero_()  # the caller's memory is its own again
        assert same(held(runtime), old) and runtime.weights_version == 0
        assert told(runtime.ask(**video)) == before
    kept = runtime.stats()["staged_weights"]
    assert kept["tensors"] == len(buckets[0]) + len(buckets[1])
    assert kept["bytes"] == sum(t.nbytes for bucket in buckets[:2] for t in bucket.values())
    runtime.update_weights(buckets[2])
    assert same(held(runtime), new) and runtime.weights_version == 1
    assert runtime.stats()["staged_weights"] == {"tensors": 0, "bytes": 0}
    # As a runtime that was loaded with them.
    save_hf(runtime.engine.model, tmp_path)
    expected = Runtime(load_model(tmp_path), runtime.engine.tokenizer)
    with expected:
        assert told(runtime.ask(**video)) == told(expected.ask(**video)) != before


def test_a_bucket_that_is_refused_loses_nothing(runtime: Runtime) -> None:
    old, new = held(runtime), others(runtime)
    first, second = dict(list(new.items())[:9]), dict(list(new.items())[9:])
    name = next(iter(second))
    runtime.update_weights(first, finish=False)
    nan = new[name].clone()
    nan.view(-1)[-1] = float("nan")
    for bad, message in (
        ({name: nan}, f"{name} must be finite numbers of float32"),
        (
            {name: torch.full_like(nan, 1e300, dtype=torch.float64)},
            "must be finite numbers of float32",
        ),
        ({name: new[name][:1]}, "shape must be"),
        ({name: new[name].to(torch.int8)}, "dtype of .* must be dense floating point, got torch.i"),
        (
            {name: new[name].to(torch.float8_e4m3fn)},
            "must be dense floating point, got torch.float8",
        ),
        (
            {name: new[name].to("meta")},
            "must be a tensor that holds values, got 'a tensor on meta'",
        ),
        ({name: [1.0]}, f"{name} must be a tensor, got 'list'"),
        ({"nothing.weight": nan}, "tensors must be named as in the checkpoint, got 'nothing.weig"),
        ({3: nan}, "tensors must be named as in the checkpoint, got 3"),
        ({name.replace("model.", "", 1): new[name]}, "tensors must be given once each"),
    ):
        for finish in (False, True):
            with pytest.raises(ValueError, match=message):
                runtime.update_weights({**second, **bad}, finish=finish)  # type: ignore[dict-item]
    assert same(held(runtime), old) and runtime.weights_version == 0
    assert runtime.stats()["staged_weights"]["tensors"] == 9
    runtime.update_weights(second)
    assert same(held(runtime), new)
    runtime.update_weights(first, finish=False)
    runtime.discard_staged_weights()
    runtime.update_weights({})
    assert runtime.stats()["staged_weights"]["tensors"] == 0
    assert same(held(runtime), new) and runtime.weights_version == 1


def test_only_what_depends_on_a_changed_part_is_forgotten(
    runtime: Runtime, video: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    version = VideoLM.version

    def counted(self: VideoLM, part: str) -> str:
        if part not in self._versions:
            hashed.append(part)
        return version(self, part)

    monkeypatch.setattr(VideoLM, "version", counted)
    state = held(runtime)
    runtime.ask(**video)
    pairs = runtime.stats()["vision_cache"]["pairs"]
    assert hashed == ["visual"] and pairs > 0

    def first_round(tensors: dict[str, Tensor]) -> tuple[bool, bool]:
        """Whether features and KV of the answer before serve the next."""
        runtime.update_weights(tensors)
        reuse = runtime.ask(**video).rounds[0].reuse
        assert reuse.pairs_encoded == 0 or reuse.pairs_reused == 0
        return reuse.pairs_encoded == 0, reuse.tokens_reused > 0

    # The whole model with a frozen tower, as trainers send it.
    assert first_round({**state, LANGUAGE: -state[LANGUAGE]}) == (True, False)
    assert first_round({LANGUAGE: state[LANGUAGE]}) == (True, False)
    assert first_round(state) == (True, True)  # nothing new
    assert hashed == ["visual"]
    assert first_round({VISION: -state[VISION]}) == (False, False)
    assert hashed == ["visual"] * 2
    assert runtime.stats()["vision_cache"]["pairs"] == pairs  # the old ones are gone
    assert runtime.weights_version == 4


def test_answers_say_which_weights_gave_them(runtime: Runtime, video: dict[str, Any]) -> None:
    state = held(runtime)
    for version in range(3):
        answer = runtime.ask(**video)
        assert answer.weights_version == answer.as_dict()["weights_version"] == version
        assert runtime.generate("hello", TEXT).weights_version == version
        assert runtime.weights_version == version
        runtime.update_weights({LANGUAGE: -state[LANGUAGE]}, finish=False)
        assert runtime.weights_version == version
        runtime.update_weights({})


def transformers_says(folder: Path, state: dict[str, Tensor]) -> list[int]:
    """Greedy tokens of transformers with these weights in a file beside the folder's config."""
    torchvision_shim.install()
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    new = folder / "new"
    new.mkdir(exist_ok=True)
    (new / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, new / "model.safetensors", metadata={"format": "pt"})
    net = Qwen2_5_VLForConditionalGeneration.from_pretrained(new).eval()
    ids = AutoTokenizer.from_pretrained(folder)("hello there", return_tensors="pt")
    with torch.no_grad():
        found = net.generate(
            **ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
    return list(found[0, ids["input_ids"].shape[1] :].tolist())


def test_a_head_is_taken_as_transformers_takes_one_in_a_file(
    runtime: Runtime, folder: Path
) -> None:
    state = held(runtime)
    embedding = state[EMBEDDING]
    tied = HEAD not in state
    model = runtime.engine.model
    cases: list[tuple[dict[str, Tensor], bool]] = [
        ({HEAD: embedding.clone()}, not tied),  # equal: stays tied
        ({HEAD: -embedding}, True),
        ({EMBEDDING: embedding * 0.5}, True),  # the head stays as it was
        ({HEAD: embedding * 0.5}, not tied),  # equal again
        ({EMBEDDING: embedding, HEAD: embedding.clone()}, not tied),
        ({EMBEDDING: embedding * 2}, not tied),
    ]
    now = dict(state)
    for tensors, own in cases:
        runtime.update_weights(tensors)
        assert (model.language.lm_head is not None) == own
        now |= tensors
        if tied and not own:  # the head moves with the embedding
            now.pop(HEAD, None)
        assert said(runtime) == transformers_says(folder, now)


def test_a_quantized_runtime_takes_none(folder: Path) -> None:
    with Runtime.from_pretrained(folder, quantization="int8") as runtime:
        for finish in (False, True):
            with pytest.raises(ValueError, match="update_weights: model must be unquantized"):
                runtime.update_weights({}, finish=finish)


def test_half_precision_takes_float32_and_refuses_what_it_cannot_hold(folder: Path) -> None:
    with Runtime.from_pretrained(folder, dtype="float16") as runtime:
        new = {name: tensor.float() for name, tensor in others(runtime).items()}
        large = {LANGUAGE: new[LANGUAGE] + 1e5}
        with pytest.raises(ValueError, match=f"{LANGUAGE} must be finite numbers of float16"):
            runtime.update_weights(large, finish=False)
        for name, tensor in new.items():
            runtime.update_weights({name: tensor}, finish=False)
        assert runtime.stats()["staged_weights"]["bytes"] == sum(
            2 * t.numel() for t in new.values()
        )
        runtime.update_weights({})
        assert same(held(runtime), {name: tensor.half() for name, tensor in new.items()})


def test_weights_of_a_transformers_model_are_taken_as_they_are(runtime: Runtime) -> None:
    """state_dict() holds tied heads twice; named_parameters() once; both are one model."""
    tied = runtime.engine.model.language.lm_head is None
    net = tiny_qwen2_5_vl(tie_word_embeddings=tied, seed=5)
    runtime.update_weights(net.state_dict())
    first = said(runtime)
    assert (runtime.engine.model.language.lm_head is None) == tied
    runtime.update_weights({name: -p for name, p in net.named_parameters()})
    assert said(runtime) != first
    runtime.update_weights(dict(net.named_parameters()))
    assert said(runtime) == first
