"""Which settings a run of GRPO on rollouts in rounds may have."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal, TypeAlias

from vtts_rt.config import STRATEGIES, ResolvedPerception
from vtts_rt.sampling import MAX_TOKENS
from vtts_rt.types import SamplingParams, require

WHAT = "train grpo"
TrainRound: TypeAlias = Literal["all", "last"]
# Settings of GRPOConfig that must stay as they are: those that change what is sampled, which the
# loss cannot replay, and those that hand generation, scoring or sharding to something else.
_NOT_REPLAYED = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
_NOT_REPLAYED["generation_kwargs"] = None
_NOT_OURS = (
    *("use_vllm", "use_transformers_continuous_batching", "use_liger_kernel"),
    *("cast_lm_head_to_fp32", "fsdp", "deepspeed"),
)
# Fields of peft's LoraConfig that may be given: what else changes a weight is neither pushed to the
# runtime nor in a checkpoint, and dropout cannot be replayed.
_LORA = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
)
# What SamplingParams may say: it changes no probability.
_SAMPLING = ("max_tokens", "stop", "stop_token_ids", "ignore_eos")


def check_settings(
    args: Any,
    perception: ResolvedPerception,
    sampling: SamplingParams,
    train_round: str,
    peft_config: Any,
    num_examples: int,
) -> None:
    """args: TRL's GRPOConfig. The others as VttsGRPOTrainer takes them. BadRequest names the first
    that is not allowed."""
    size, batch = args.num_generations, args.per_device_train_batch_size
    for name, neutral in _NOT_REPLAYED.items():
        value, rule = getattr(args, name), "left out, as the loss cannot replay it"
        require(WHAT, name, value, value == neutral, rule)
    for name in _NOT_OURS:
        value, rule = getattr(args, name), "left out: it has no place beside our rollouts"
        require(WHAT, name, value, not value, rule)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations"):
        require(WHAT, name, getattr(args, name), getattr(args, name) >= 1, ">= 1")
    rule = f"a multiple of num_generations ({size}), so that no group is split"
    require(WHAT, "per_device_train_batch_size", batch, batch % size == 0, rule)
    heat, rule = args.temperature, "> 0, or all members would say the same"
    require(WHAT, "temperature", heat, heat is not None and heat > 0, rule)
    rule = "left out: its scaled gradients overflow at first, which ends a run; bf16 has none"
    require(WHAT, "fp16", args.fp16, not args.fp16, rule)
    split = args.accelerator_config.split_batches
    require(WHAT, "split_batches", split, not split, "False, so that no group is split")
    for name in (f.name for f in fields(SamplingParams)):
        value = getattr(sampling, name)
        rule = f"left out: only {', '.join(_SAMPLING)} are the sampling's"
        require(WHAT, name, value, value is None or name in _SAMPLING, rule)
    grammar = perception.constrain_clues
    require(WHAT, "constrain_clues", grammar, not grammar, "False: the loss cannot replay it")
    require(WHAT, "train_round", train_round, train_round in ("all", "last"), "all or last")
    rounds, name = perception.max_rounds, perception.strategy
    whole = STRATEGIES[name].continues
    rule = f"1 with strategy {name}, whose rounds are prompts of their own, or train_round last"
    require(WHAT, "max_rounds", rounds, whole or rounds == 1 or train_round == "last", rule)
    rule = f"all with strategy {name}, whose rounds are one conversation"
    require(WHAT, "train_round", train_round, not whole or train_round == "all", rule)
    # In optimizer steps: batches made before a checkpoint are not in it.
    accumulated = args.gradient_accumulation_steps
    every = math.lcm(accumulated, args.steps_per_generation * args.num_iterations) // accumulated
    rule = f"a multiple of {every}, the steps of a generation, so that a run goes on exactly"
    ok = args.save_strategy != "steps" or args.save_steps % every == 0
    require(WHAT, "save_steps", args.save_steps, ok, rule)
    groups = args.generation_batch_size // size
    rule = f"at least {groups}, the groups of a generation"
    require(WHAT, "rows", num_examples, num_examples >= groups, rule)
    if peft_config is not None:
        _check_adapter(peft_config)


def longest_said(perception: ResolvedPerception, sampling: SamplingParams) -> int:
    """Most tokens of a row that a loss counts: max_tokens for each round that the row holds. What
    is added between turns is in the row, and not counted."""
    rounds = perception.max_rounds if STRATEGIES[perception.strategy].continues else 1
    return rounds * (sampling.max_tokens or MAX_TOKENS)


def _check_adapter(peft_config: Any) -> None:
    kind, neutral = getattr(peft_config, "peft_type", None), type(peft_config)()
    require(WHAT, "peft_config", kind, kind == "LORA", "a LoraConfig")
    names = (f.name for f in fields(peft_config) if f.name not in _LORA)
    given = [name for name in names if getattr(peft_config, name) != getattr(neutral, name)]
    rule = f"a LoraConfig without DoRA, biases, dropout and the like: only {', '.join(_LORA)}"
    require(WHAT, "peft_config", given, not given, rule)
    start = peft_config.init_lora_weights
    rule = "true, false or gaussian: what else there is changes the weights that it adapts"
    require(WHAT, "init_lora_weights", start, start in (True, False, "gaussian"), rule)
