"""Quantized models: which layers change, what they answer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vtts_rt.models.base import ForwardBatch
from vtts_rt.models.quantize import QuantizedLinear, quantize
from vtts_rt.models.qwen2_5_vl import Qwen2_5_VL
from vtts_rt.models.registry import load_model
from vtts_rt.ops.quantized import dequantize
from vtts_rt.runtime import Runtime


def logits(model: Qwen2_5_VL, num_tokens: int = 9) -> torch.Tensor:
    ids, positions = torch.arange(num_tokens), torch.arange(num_tokens).expand(3, -1)
    with torch.inference_mode():
        return model.logits(model(ForwardBatch(ids, None, positions, [0, num_tokens])))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_with_its_rounded_weights(
    checkpoint: Path, quantization: str, dtype: str
) -> None:
    model, rounded = load_model(checkpoint, dtype), load_model(checkpoint, dtype).float()
    embedding = model.language.embed_tokens.weight.clone()
    quantize(model, quantization)
    replaced = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    layers = 4 * len(model.language.layers)
    assert len(replaced) == layers + (quantization == "int8")
    assert not any(isinstance(m, nn.Linear) for m in model.language.modules()) or (
        quantization == "fp8"
    )
    assert not any(name.startswith("visual.") for name in replaced)
    assert torch.equal(model.language.embed_tokens.weight, embedding)
    # The same model in float32 with the weights as they were rounded.
    for name, layer in replaced.items():
        wide = dequantize(layer.weight, layer.scale)
        if name != "language.lm_head":
            rounded.get_submodule(name).weight.data = wide
            continue
        head = rounded.language
        kept = nn.Linear(*wide.shape[::-1], bias=False)
        kept.weight.data = wide
        head.lm_head = kept
    exact = load_model(checkpoint, dtype)
    usual = (logits(exact).float() - logits(load_model(checkpoint, dtype).float())).abs().max()
    assert (logits(model).float() - logits(rounded)).abs().max() <= 2 * usual + 1e-4
    assert not torch.equal(logits(model), logits(exact))


def test_each_quantization_has_a_version_of_its_own(checkpoint: Path) -> None:
    versions, visions = set(), set()
    for quantization in (None, "int8", "fp8"):
        model = load_model(checkpoint, "float32")
        before = model.version("language")
        if quantization is not None:
            quantize(model, quantization)
            assert model.version("language") != before
        versions.add(model.version("language"))
        visions.add(model.version("visual"))
    assert len(versions) == 3 and len(visions) == 1
    scaled = load_model(checkpoint, "float32")
    scaled.language.layers[0].mlp.down_proj.weight.data *= 2.0  # the same bytes, other scales
    quantize(scaled, "int8")
    assert scaled.version("language") not in versions


def test_what_cannot_be_quantized_is_refused(checkpoint: Path) -> None:
    model = load_model(checkpoint, "float16")
    with pytest.raises(ValueError, match="quantize: quantization must be one of int8, fp8"):
        quantize(model, "int4")
    with pytest.raises(ValueError, match="float32 or bfloat16 on cpu for int8 .* got 'float16"):
        quantize(model, "int8")
    assert model.quantization is None
    quantize(model, "fp8")
    assert logits(model).dtype is torch.float16
    with pytest.raises(ValueError, match="quantize: model must be unquantized, got 'fp8'"):
        quantize(model, "fp8")


def test_a_quantized_model_is_neither_written_nor_exported(checkpoint: Path) -> None:
    model = load_model(checkpoint, "float32")
    tensors = model.export()
    quantize(model, "int8")
    with pytest.raises(ValueError, match="update_weights: model must be unquantized"):
        model.check(dict(list(tensors.items())[:1]))
    with pytest.raises(ValueError, match="export: model must be unquantized"):
        model.export()


def test_a_runtime_is_quantized_by_name_and_takes_no_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="quantization must be None or one of int8, fp8, got"):
        Runtime.from_pretrained(checkpoint, device="cpu", quantization="int4")
    with pytest.raises(ValueError, match="float32 or bfloat16 on cpu for int8"):
        Runtime.from_pretrained(checkpoint, device="cpu", dtype="float16", quantization="int8")
    for quantization in ("int8", "fp8"):
        with Runtime.from_pretrained(checkpoint, device="cpu", quantization=quantization) as made:
            assert made.engine.model.quantization == quantization
            assert len(made.generate("which?").token_ids) > 0
            monkeypatch.setattr(made._driver, "call_idle", lambda *_: pytest.fail("called"))
            with pytest.raises(ValueError, match="update_weights: model must be unquantized, for"):
                made.update_weights({}, in_flight="abort")
            monkeypatch.undo()
