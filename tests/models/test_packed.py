"""Models with packed weights: the same bits and the same weights as plain ones, and less time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from utils import random_rows, tiny_checkpoint, tiny_qwen3_vl

from vtts_rt.config import EngineConfig
from vtts_rt.engine.engine import Engine
from vtts_rt.models.base import ForwardBatch, VideoLM
from vtts_rt.models.layers import Packable
from vtts_rt.models.quantize import quantize
from vtts_rt.models.registry import load_model, load_tokenizer, save_hf
from vtts_rt.models.weights import EMBEDDING, LM_HEAD
from vtts_rt.ops.packed import unpack

pytest.importorskip("vtts_rt._C", reason="built without the native extension")

DTYPES = ["float32", "bfloat16"]
QUERY = "model.language_model.layers.1.self_attn.k_proj.weight"
VISION = "model.visual.blocks.0.mlp.up_proj.weight"


def batch(num_tokens: int = 9) -> ForwardBatch:
    ids = torch.arange(num_tokens)
    return ForwardBatch(ids, None, ids.expand(3, -1), [0, num_tokens])


def outputs(model: VideoLM) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.inference_mode():
        features = model.visual(random_rows([(1, 4, 6)], model.geometry), [(1, 4, 6)])
        return model.logits(model(batch())), features


def same(one: VideoLM, other: VideoLM) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


def versions(model: VideoLM) -> list[str]:
    return [model.version(part) for part in ("visual", "language")]


def is_packed(model: VideoLM) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Packable) and module.matrix.packed
    ]


def both(folder: Path, dtype: str) -> tuple[VideoLM, VideoLM]:
    """Plain and packed."""
    plain, packed = load_model(folder, dtype), load_model(folder, dtype)
    packed.pack()
    assert is_packed(packed) and not is_packed(plain)
    return plain, packed


@pytest.fixture(scope="module", params=["tied", "untied", "qwen3"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen3":
        return tiny_checkpoint(path, tiny_qwen3_vl)
    return tiny_checkpoint(path, tie_word_embeddings=request.param == "tied")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_give_the_same_bits_and_are_the_same_weights(
    folder: Path, dtype: str, tmp_path: Path
) -> None:
    plain, packed = both(folder, dtype)
    tied = packed.language.lm_head is None
    found = is_packed(packed)
    assert "visual.patch_embed" not in found
    assert ("language.embed_tokens" in found) == tied != ("language.lm_head" in found)
    layers = 4 * packed.config.language.num_hidden_layers
    assert sum(name.startswith("language.layers.") for name in found) == layers
    assert same(plain, packed) and versions(plain) == versions(packed)
    for one, other in (
        (plain.export(), packed.export()),
        (plain.state_dict(), packed.state_dict()),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    save_hf(packed, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in plain.export().items())
    packed.load_state_dict({name: -t for name, t in plain.state_dict().items()})
    assert is_packed(packed) == found
    packed.load_state_dict(plain.state_dict())
    assert same(plain, packed)


def test_memory_holds_the_weights_once(folder: Path) -> None:
    plain, packed = both(folder, "bfloat16")
    for (name, one), other in zip(plain.named_parameters(), packed.parameters(), strict=True):
        filled_up = -one.shape[0] % 16 * one[0].numel() if other.dim() == 4 else 0
        assert other.numel() == one.numel() + filled_up, name
        assert other.untyped_storage().nbytes() == other.numel() * other.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_weights_reach_packed_ones_in_place(folder: Path, dtype: str) -> None:
    plain, packed = both(folder, dtype)
    found = is_packed(packed)
    where = [p.data_ptr() for p in packed.parameters()]
    state = plain.export()
    names = [n for n in (QUERY, "model.language_model.norm.weight") if n in state]
    for new, parts in (
        ({n: -state[n] for n in names}, {"language"}),
        ({n: -state[n] for n in names}, set()),  # as they are
        ({n: t for n, t in state.items() if "visual" in n}, set()),
        ({n: -t for n, t in state.items() if "visual" in n}, {"visual"}),
        (state, {"visual", "language"}),
    ):
        assert plain.write(plain.check(new)) == packed.write(packed.check(new)) == parts
        assert versions(plain) == versions(packed) and same(plain, packed)
    assert where == [p.data_ptr() for p in packed.parameters()] and is_packed(packed) == found
    with pytest.raises(ValueError, match=r"shape must be \(.*\) for .*k_proj"):
        packed.check({QUERY: state[QUERY][:-1]})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_head_is_untied_and_tied_again(tmp_path: Path, dtype: str) -> None:
    plain, packed = both(tiny_checkpoint(tmp_path), dtype)
    embedding = plain.export()[EMBEDDING]
    for new, tied in (
        ({LM_HEAD: embedding.clone()}, True),
        ({LM_HEAD: -embedding}, False),
        ({EMBEDDING: embedding * 0.5}, False),
        ({LM_HEAD: embedding * 0.5}, True),
        ({LM_HEAD: embedding * 2, EMBEDDING: embedding}, False),
        ({EMBEDDING: embedding * 2}, True),
    ):
        for model in (plain, packed):
            model.write(model.check(new))
            assert (model.language.lm_head is None) == tied
        assert ("language.lm_head" in is_packed(packed)) != tied
        assert versions(plain) == versions(packed) and same(plain, packed)


def test_another_dtype_is_packed_anew_or_not_at_all(folder: Path) -> None:
    plain, packed = both(folder, "float32")
    found = is_packed(packed)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        plain.to(dtype)
        packed.to(dtype)
        assert is_packed(packed) == ([] if dtype is torch.float16 else found)
        assert versions(plain) == versions(packed) and same(plain, packed)


def test_a_packed_model_gives_the_gradients_of_a_plain_one(folder: Path) -> None:
    models = both(folder, "float32")
    for model in models:
        model.logits(model(batch())).logsumexp(1).sum().backward()
    for (name, one), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        if one.grad is not None:
            assert other.grad is not None
            grad = unpack(other.grad, len(one)) if other.dim() == 4 else other.grad
            assert torch.equal(grad, one.grad), name


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_model_is_packed_as_others_are(
    folder: Path, dtype: str, quantization: str
) -> None:
    plain, packed = load_model(folder, dtype), load_model(folder, dtype)
    packed.pack()
    for model in (plain, packed):  # before and after
        quantize(model, quantization)
    packed.pack()
    found = is_packed(packed)
    assert ("language.layers.0.mlp.down_proj" in found) == (quantization == "int8")
    assert ("language.lm_head" in found) == (
        quantization == "int8" or not packed.config.language.tie_word_embeddings
    )
    assert versions(plain) == versions(packed) and same(plain, packed)


def test_an_engine_packs_its_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    plain, packed = both(folder, "float32")
    monkeypatch.setenv("VTTS_RT_BACKEND", "linear=torch")
    Engine(model, tokenizer, EngineConfig(kv_bytes=1 << 20)).close()
    assert not is_packed(model)  # where torch multiplies
    monkeypatch.delenv("VTTS_RT_BACKEND")
    engine = Engine(model, tokenizer, EngineConfig(kv_bytes=1 << 20))
    assert is_packed(model) == is_packed(packed)
    engine.sleep()
    engine.wake()
    assert is_packed(model) == is_packed(packed) and same(model, plain)
    engine.close()
