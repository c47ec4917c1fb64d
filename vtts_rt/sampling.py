"""From what a request and a checkpoint say about sampling to what is done.

resolved = resolve(SamplingParams of the request, those of generation_config.json, room)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from vtts_rt.types import SamplingParams, require

# Tokens of a round unless set (VideoChat-R1.5's max_new_tokens).
MAX_TOKENS = 2048
# What transformers' generate takes for a checkpoint that samples and does not say.
_TOP_K, _TEMPERATURE = 50, 1.0


@dataclass(frozen=True, slots=True)
class ResolvedSampling:
    """SamplingParams in which every field has a value; the defaults are the neutral ones."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = MAX_TOKENS
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: Literal["processed", "raw"] = "processed"


def resolve(
    params: SamplingParams, defaults: SamplingParams | None = None, room: int = MAX_TOKENS
) -> ResolvedSampling:
    """`params` where they say something, else `defaults` (a checkpoint's), else neutral.

    room: tokens that fit behind the prompt, at least 1; max_tokens is cut to it unless `params`
    give it.
    """
    chosen: dict[str, Any] = {"max_tokens": min(MAX_TOKENS, room)}
    for source in (defaults, params):
        for f in fields(SamplingParams):
            if source is not None and getattr(source, f.name) is not None:
                chosen[f.name] = getattr(source, f.name)
    return ResolvedSampling(**chosen)


def rollout_sampling(params: SamplingParams) -> SamplingParams:
    """The sampling of a member of a rollout group: what it does not say is not taken from
    generation_config.json. Temperature 1 without filters and penalties, so that what is drawn, and
    its log-probabilities, are the policy's own; end tokens stay the checkpoint's."""
    neutral = {"temperature": 1.0}
    for f in fields(ResolvedSampling):
        if f.name not in ("temperature", "max_tokens", "logit_bias"):
            neutral[f.name] = f.default  # type: ignore[assignment]
    unset = {name: value for name, value in neutral.items() if getattr(params, name) is None}
    return replace(params, **unset)  # type: ignore[arg-type]


# Fields of transformers' GenerationConfig that change what is generated and are not known here,
# with their neutral values; None always is one. All others are taken or change no token.
_NOT_SET = (
    *("assistant_ensemble_weight", "constraints", "dola_layers", "max_time", "sequence_bias"),
    *("exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id"),
    *("forced_decoder_ids", "forced_eos_token_id", "top_h", "watermarking_config"),
)
_REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_NOT_SET, ()),
    **dict.fromkeys(("num_beam_groups", "num_beams", "num_return_sequences"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0.0, 1.0)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "typical_p"), (1.0,)),
    **dict.fromkeys(("diversity_penalty", "min_p", "penalty_alpha"), (0.0,)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length"), (0,)),
    **dict.fromkeys(("remove_invalid_values", "token_healing"), (False,)),
}
# By their names there, ours.
_TAKEN = {
    **{name: name for name in ("top_p", "top_k", "temperature", "repetition_penalty")},
    **{name: name for name in ("no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")},
    "begin_suppress_tokens": "begin_suppress_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}


def generation_defaults(config: Mapping[str, Any]) -> SamplingParams:
    """What a checkpoint's generation_config.json says of sampling, as transformers' `generate`
    takes it.

    `do_sample` decides whether the model samples by default, from the 50 likeliest tokens where the
    file gives no top_k; without it the temperature of the file counts for nothing, its filters for
    requests that sample. max_new_tokens and max_length count for nothing (design: 2,048).
    ValueError for values that are none and, by name, for what is not supported.
    """
    what = "load_model"
    for name, neutral in _REFUSED.items():
        value = config.get(name)
        rule = " or ".join(map(str, (*neutral, "left out")))
        require(what, f"generation_config.json {name}", value, value in (None, *neutral), rule)
    values = {ours: config.get(theirs) for theirs, ours in _TAKEN.items()}
    samples = config.get("do_sample")
    is_flag = samples is None or isinstance(samples, bool)
    require(what, "generation_config.json do_sample", samples, is_flag, "true, false or left out")
    if not samples:
        values["temperature"] = None
    else:
        for name, default in (("temperature", _TEMPERATURE), ("top_k", _TOP_K)):
            values[name] = default if values[name] is None else values[name]
    for theirs, ours in _TAKEN.items():
        try:
            SamplingParams(**{ours: values[ours]})
        except ValueError as error:
            told = str(error).removeprefix(f"SamplingParams: {ours}")
            raise ValueError(f"{what}: generation_config.json {theirs}{told}") from None
    return SamplingParams(**values)


def generation_config(params: SamplingParams) -> dict[str, Any]:
    """The fields of generation_config.json of which `generation_defaults` makes `params`."""
    config = {theirs: getattr(params, ours) for theirs, ours in _TAKEN.items()}
    config["do_sample"] = None if params.temperature is None else True
    return {name: value for name, value in config.items() if value is not None}
