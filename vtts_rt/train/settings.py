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
# Every field that TRL's GRPOConfig adds to transformers' TrainingArguments is in one of USED, FREE,
# NOT_REPLAYED and NOT_OURS, which a test compares with the fields that there are.
# What decides the numbers of a run. reward_weights and max_completion_length: set by the trainer.
USED = (
    *("num_generations", "generation_batch_size", "steps_per_generation", "shuffle_dataset"),
    *("temperature", "beta", "num_iterations", "epsilon", "epsilon_high", "delta", "loss_type"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos"),
    *("vespo_k_neg", "vespo_lambda_neg", "importance_sampling_level", "scale_rewards"),
    *("multi_objective_aggregation", "mask_truncated_completions", "disable_dropout"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "top_entropy_quantile"),
    *("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
    *("entropy_coef_delta", "entropy_target", "off_policy_mask_threshold"),
    *("use_bias_correction_kl", "vllm_importance_sampling_correction"),
    *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
    *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
    *("reward_weights", "max_completion_length"),
)
# What is told of a run.
FREE = (
    *("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
    "log_completions_hub_repo",
)
# What must stay as it is: what changes the tokens or the model's input, which the loss cannot
# replay; and what hands generation, scoring or sharding to something else, or has no effect here.
# The first and last of these have fields of TrainingArguments too.
NOT_REPLAYED = (
    *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "neftune_noise_alpha"),
)
NOT_OURS = (
    *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode"),
    *("vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host"),
    *("vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("use_transformers_paged", "cache_implementation", "chat_template_kwargs"),
    *("max_tool_calling_iterations", "model_init_kwargs", "trust_remote_code"),
    *("num_generations_eval", "pad_to_multiple_of", "ds3_gather_for_generation"),
    *("router_aux_loss_coef", "cast_lm_head_to_fp32", "fsdp", "deepspeed"),
    *("use_liger_kernel", "liger_kernel_config", "parallelism_config"),
    *("remove_unused_columns", "label_names", "label_smoothing_factor", "train_sampling_strategy"),
    *("data_seed", "resume_from_checkpoint", "auto_find_batch_size"),
)
# transformers': checkpoints without the optimizer, rows from the start again, folders that are
# filled in place.
NOT_RESUMED = ("save_only_model", "ignore_data_skip", "enable_jit_checkpoint")
# "auto" of pad_to_multiple_of is None once it is a GRPOConfig's.
_NEUTRAL = {"pad_to_multiple_of": None}
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
    neutral = {f.name: f.default for f in fields(args)} | _NEUTRAL
    for names, rule in (
        (NOT_REPLAYED, "left out, as the loss cannot replay it"),
        (NOT_OURS, "left out: it has no place, or no effect, beside our rollouts"),
        (NOT_RESUMED, "left out, as a run could not go on exactly from its checkpoints"),
    ):
        for name in names:
            value, kept = getattr(args, name), neutral[name]
            require(WHAT, name, value, value == kept or not (value or kept), rule)
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
