"""What bench/bench_decode.py takes for its numbers: shapes, bytes, steps that are timed."""

from __future__ import annotations

from dataclasses import replace

import engine_decode as decode
import pytest
import torch
from shapes import bytes_per_step, model_config, random_model

from vtts_rt.models.config import ModelConfig
from vtts_rt.models.registry import empty_model


@pytest.mark.parametrize(("shape", "gigabytes"), [("3b", 6.17), ("7b", 14.14)])
def test_a_step_reads_the_published_number_of_bytes(shape: str, gigabytes: float) -> None:
    with torch.device("meta"):
        model = empty_model(model_config(shape)).bfloat16()
    assert bytes_per_step(model) / 1e9 == pytest.approx(gigabytes, abs=0.005)
    # Parameters of the checkpoints: 3.75 and 8.29 milliards.
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx({"3b": 3.75, "7b": 8.29}[shape], abs=0.01)


@pytest.fixture(scope="module")
def small() -> ModelConfig:
    config = model_config("7b")
    language = replace(
        config.language,
        **{"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        head_dim=8,
        mrope_section=(2, 1, 1),
    )
    vision = replace(config.vision, depth=1, hidden_size=32, num_heads=2, out_hidden_size=32)
    return replace(config, language=language, vision=vision)


def test_random_weights_repeat(small: ModelConfig) -> None:
    one, two = (random_model(small, "cpu", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    spread = torch.cat([p.flatten() for p in one.parameters() if p.ndim == 2]).std()
    assert float(spread) == pytest.approx(0.02, rel=0.05)
    assert not any(p.requires_grad for p in one.parameters())


def test_steps_are_the_engines_own(small: ModelConfig) -> None:
    model = random_model(small, "cpu", torch.float32)
    result = decode.decode_seconds(model, "eager", num_sequences=3, num_keys=40, num_steps=5)
    # The prompts in one pass, then a token for each in every step.
    assert sum(result["passes"]["eager_steps"].values()) == 1 + 8 + 5
    assert result["median_seconds"] > 0
    told = decode.with_floor({**result, "median_seconds": 1e-3}, model, 1e9)
    language = model.language
    weights = 4 * sum(
        p.numel() for name, p in language.named_parameters() if name != "embed_tokens.weight"
    )
    assert told["weight_bytes"] == weights
    assert told["kv_bytes"] == 3 * 42 * 2 * 2 * 2 * 8 * 4  # keys, layers, k and v, heads, dim
    assert told["share_of_floor"] == pytest.approx(weights / 1e6, abs=1e-3)
    assert told["ms_per_step"] == 1.0
