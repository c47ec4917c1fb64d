"""What requests and checkpoints may say about sampling, and what it comes to."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from vtts_rt.models.checkpoint import read_generation_defaults, resolve_model
from vtts_rt.sampling import (
    _REFUSED,
    _TAKEN,
    ResolvedSampling,
    generation_config,
    generation_defaults,
    resolve,
    rollout_sampling,
)
from vtts_rt.types import SamplingParams

QWEN = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "top_p": 0.9}


def test_values_are_kept_as_plain_python() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        stop="</answer>",
        stop_token_ids=np.array([1, 2]),
        logit_bias={"5": 1, 6: -2.5},
        bad_words_ids=[[1, 2], (3,)],
    )
    assert (params.stop, params.stop_token_ids) == (("</answer>",), (1, 2))
    assert (params.logit_bias, params.bad_words_ids) == ({5: 1.0, 6: -2.5}, ((1, 2), (3,)))
    assert json.dumps([params.temperature, params.top_k]) == "[0.5, 3]"
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), replace(params)):
        assert other == params and hash(other) == hash(params)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("temperature", (-1.0, float("nan"), float("inf"), 1e-30, "1", True)),
        ("top_p", (0.0, 1.1)),
        ("top_k", (-1, 1.0, "5")),
        ("max_tokens", (0, 2.5)),
        ("seed", (-1, 2**63)),
        ("stop", ("", ("a", ""), 5, [5])),
        ("ignore_eos", (1, "no")),
        ("repetition_penalty", (0.0, -1, float("inf"))),
        ("presence_penalty", (2.1, -2.1)),
        ("frequency_penalty", (2.1, "a")),
        ("min_tokens", (-1,)),
        ("stop_token_ids", ("12", [-1], [1.5], 3)),
        ("logit_bias", ([1], {"a": 1}, {1: 101}, {-1: 1}, {1: "1"}, {"1": 1, 1: 2}, {"²": 1})),
        ("no_repeat_ngram_size", (-1,)),
        ("suppress_tokens", (["1"],)),
        ("begin_suppress_tokens", ([None],)),
        ("bad_words_ids", ([[]], [1], [[-1]], "ab")),
        ("logprobs", ("none", 5)),
    ],
)
def test_what_is_none_is_refused_by_name(argument: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^SamplingParams: {argument} must be .*, got"):
            SamplingParams(**{argument: value})


def test_explicit_then_the_checkpoints_then_neutral() -> None:
    defaults = generation_defaults(QWEN)
    found = resolve(SamplingParams(top_p=1.0, seed=4), defaults, room=100)
    assert (found.temperature, found.repetition_penalty) == (1e-6, 1.05)
    assert (found.top_p, found.seed, found.max_tokens) == (1.0, 4, 100)
    assert found.top_k == 50  # transformers' own, for a checkpoint that samples
    assert resolve(SamplingParams(temperature=0.0), defaults).temperature == 0.0
    assert resolve(SamplingParams()) == ResolvedSampling(max_tokens=2048)
    assert resolve(SamplingParams(max_tokens=5000), room=10).max_tokens == 5000
    names = [f.name for f in fields(SamplingParams)]
    assert names == [f.name for f in fields(ResolvedSampling)]


def test_a_config_is_written_as_it_was_read() -> None:
    for config in (QWEN, QWEN | {"do_sample": False, "stop_strings": ["x"]}, {"min_new_tokens": 2}):
        defaults = generation_defaults(config)
        assert generation_defaults(json.loads(json.dumps(generation_config(defaults)))) == defaults


def test_without_do_sample_the_files_temperature_counts_for_nothing() -> None:
    defaults = generation_defaults(QWEN | {"do_sample": False})
    assert resolve(SamplingParams(), defaults).temperature == 0.0
    asked = resolve(SamplingParams(temperature=1.0), defaults)
    assert (asked.temperature, asked.top_p, asked.top_k) == (1.0, 0.9, 0)


def test_rollouts_ignore_the_checkpoints_settings() -> None:
    defaults = generation_defaults(QWEN | {"min_new_tokens": 3, "stop_strings": ["x"]})
    drawn = resolve(rollout_sampling(SamplingParams(seed=3)), defaults)
    assert drawn == ResolvedSampling(temperature=1.0, seed=3)
    asked = rollout_sampling(SamplingParams(temperature=0.7, repetition_penalty=1.2, top_k=5))
    expected = ResolvedSampling(temperature=0.7, repetition_penalty=1.2, top_k=5)
    assert resolve(asked, defaults) == expected


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^load_model: generation_config.json {name} must be"):
        generation_defaults({name: 7})
    for neutral in (*_REFUSED[name], None):
        assert generation_defaults({name: neutral}) == SamplingParams()


def test_every_setting_of_transformers_is_known() -> None:
    """A release that adds one fails here: is it taken, refused, or does it change no token?"""
    harmless = {
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
        *("bos_token_id", "cache_config", "cache_implementation", "compile_config"),
        *("continuous_batching_config", "decoder_start_token_id", "disable_compile", "do_sample"),
        *("early_stopping", "eos_token_id", "is_assistant", "length_penalty"),
        *("low_memory", "max_cache_len", "max_length", "max_matching_ngram_size"),
        *("max_new_tokens", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens", "renormalize_logits"),
        *("return_dict_in_generate", "speculation_type", "target_lookbehind"),
        *("transformers_version", "use_cache", "use_mtp"),
    }
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert theirs - harmless - set(_REFUSED) - set(_TAKEN) == set()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"repetition_penalty": -1}, r"repetition_penalty must be in \(0, 1e4\), got -1"),
        ({"min_new_tokens": "a"}, "min_new_tokens must be a whole number >= 0, got 'a'"),
        ({"do_sample": 1}, "do_sample must be true, false or left out, got 1"),
        ({"stop_strings": [""]}, "stop_strings must be a text or a list"),
    ],
)
def test_a_value_that_is_none_names_the_file(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^load_model: generation_config.json {message}"):
        generation_defaults(config)


def test_without_the_file_config_json_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"repetition_penalty": 1.5}')
    assert read_generation_defaults(tmp_path) == SamplingParams(repetition_penalty=1.5)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_generation_defaults(tmp_path) == SamplingParams()
    assert read_generation_defaults(resolve_model("tiny")) == SamplingParams()
