"""VttsGRPOTrainer: TRL's GRPO, with our rollouts and the tree step in place of its own.

TRL's sampler, advantages, loss, clipping, KL and logging stay. What is replaced: generation, by
`Runtime.rollouts` in its `rollout_func`; its passes for log-probabilities (old, reference,
current), by `rollout.tree_step`; its shuffle of rows, by one of whole groups; the push of weights,
by `Runtime.update_weights`; and a checkpoint is whole or not there at all. `HOOKS` is all that is
used of TRL's inside, which is why one version of it is required; a test compares.

Legend: B rows of a process, G answers of a group, C completion tokens.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import trl
from torch import Tensor, nn
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from vtts_rt.rollout.rewards import check_rewards
from vtts_rt.rollout.rows import RolloutRow
from vtts_rt.rollout.tree import TokenTree
from vtts_rt.rollout.tree_step import base_model, tree_logprobs, use_tree_attention
from vtts_rt.rounds.ask import Perception
from vtts_rt.runtime import Runtime
from vtts_rt.train.groups import Example, ScoredGroup, roll_out
from vtts_rt.train.settings import WHAT, TrainRound, check_settings, longest_said
from vtts_rt.train.weights import (
    check_adapter,
    complete_checkpoint,
    freeze_tower,
    load_training_model,
    put_in_place,
    trained_tensors,
)
from vtts_rt.types import SamplingParams, require

logger = logging.getLogger(__name__)

TRL_VERSION = "1.16.0"
# Method of GRPOTrainer -> first digits of the SHA-256 of its source in that version.
HOOKS = {
    "_generate": "2a27fdf8f5e6f356",
    "_generate_and_score_completions": "1fa48922792dcd5c",
    "_get_per_token_logps_and_entropies": "ea73c3909275851d",
    "_compute_loss": "80295546bbdbf6f7",
    "_prepare_inputs": "f824e7fb07147956",
    "_save_checkpoint": "ec91bde123649111",
    "training_step": "9e18632f7dd8e8d8",
    "log": "1e7772819cc8cf09",
}


@dataclass(frozen=True, slots=True)
class _Generation:
    """What came of one call of the rollouts, on this process.

    rows: (B,), None for a member that failed. features: of every frame pair, by its key.
    """

    rows: tuple[RolloutRow | None, ...]
    features: Mapping[Any, Tensor]

    def features_of(self, rows: Sequence[RolloutRow]) -> Callable[[int], Tensor]:
        """For `TokenTree.pick`."""

        def of_row(i: int) -> Tensor:
            return torch.cat([self.features[key] for ref in rows[i].vision for key in ref.keys])

        return of_row


class VttsGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPO on rollouts in rounds.

    model: transformers' model of the checkpoint that `runtime` runs, or its folder; its tower is
        frozen. runtime: of this process; it gets the new weights after every optimizer step.
    examples: what to ask. rewards: name (vtts_rt.rollout.rewards) -> weight; None: the published
        ones of each example's task. args: TRL's; reward_weights and max_completion_length, by which
        the loss "dr_grpo" divides, are set here, the latter to `settings.longest_said`.
    perception: how to look. sampling: max_tokens of a round, and what ends it; temperature is that
        of args, seeds follow from args.seed, step and row. train_round: "all" rounds of a
        conversation (`append`); where every round is a prompt of its own, "all" takes one round and
        "last" the last of several in which a member said anything (`groups.trained_rows`).
    processing_class: the tokenizer. peft_config: a LoraConfig for the language model.

    BadRequest (a ValueError) for settings that would split a group, that the loss cannot replay, or
    that do not fit otherwise; RuntimeError for another version of TRL and, while it trains, where a
    loss or gradient is not finite: the batch is in `nan-step-N-rank-R.pt` of args.output_dir then.
    """

    def __init__(
        self,
        model: Any,
        runtime: Runtime,
        examples: Sequence[Example],
        rewards: Mapping[str, float] | None,
        args: GRPOConfig,
        *,
        perception: Perception | None = None,
        sampling: SamplingParams | None = None,
        train_round: TrainRound = "all",
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if trl.__version__ != TRL_VERSION:
            raise RuntimeError(
                f"{WHAT}: trl {TRL_VERSION} is needed, got {trl.__version__}; "
                f"pip install 'vtts_rt[trl]'"
            )
        self.runtime, self.examples = runtime, list(examples)
        self.perception = runtime.perception(perception)
        self.sampling = replace(sampling or SamplingParams(), temperature=args.temperature)
        self._rewards = None if rewards is None else dict(rewards)
        require(WHAT, "rewards", rewards, rewards is None or len(rewards) > 0, "at least one")
        weights: dict[str, float] = {}
        for example in self.examples:
            own = example.weights(self._rewards)
            check_rewards(WHAT, own, example.row, is_sized=False)
            weights |= own
        told = sampling or SamplingParams()
        check_settings(*(args, self.perception, told, train_round, peft_config), len(self.examples))
        self._generation = _Generation((), {})
        self._asked: list[int] = []
        self._row_ids: list[int] = []
        self._staging: Path | None = None
        self._buffered_inputs: list[dict[str, Any]] | None = None
        if not isinstance(model, nn.Module):
            model = load_training_model(model)
        freeze_tower(model)
        self._source = Path(base_model(model).config._name_or_path)
        args.reward_weights = list(weights.values())
        args.max_completion_length = longest_said(self.perception, told)
        super().__init__(
            model=model,
            reward_funcs=[_reward(name) for name in weights],
            args=args,
            train_dataset=datasets.Dataset.from_dict(
                {
                    "prompt": [example.row.question for example in self.examples],
                    "example": list(range(len(self.examples))),
                }
            ),
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
            peft_config=peft_config,
            rollout_func=self._rollouts,
        )
        check_adapter(WHAT, self.model)
        for net in (self.model, self.ref_model):
            if net is not None:
                use_tree_attention(net)
        # TRL's hook for an engine beside the trainer: it then syncs weights where they have
        # changed, and corrects for how its log-probabilities differ from the engine's.
        self.use_vllm, self.vllm_generation, self._last_loaded_step = True, self, -1

    # -- rollouts ---------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = [given["example"] for given in inputs]
        self._row_ids = list(range(len(inputs)))
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # Rows go by their number, never by their tokens: two may be equal in all but their videos.
        output["vtts_row"] = torch.arange(len(inputs), device=self.accelerator.device)
        return output

    def _rollouts(self, prompts: list[str], _trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: G consecutive prompts are one group."""
        began, size, step = time.perf_counter(), self.num_generations, self.state.global_step
        wanted = self._asked[::size]
        assert self._asked == [index for index in wanted for _ in range(size)]

        def group(index: int) -> ScoredGroup:
            seed = np.random.SeedSequence([self.args.seed, step, index]).generate_state(1)[0]
            return roll_out(
                *(self.runtime, self.examples[index], size, self._rewards),
                perception=self.perception,
                sampling=replace(self.sampling, seed=int(seed)),
                group_id=f"{step}:{index}",
            )

        at_once = max(1, self.runtime.engine.config.max_sequences // size)
        with ThreadPoolExecutor(min(at_once, len(wanted))) as pool:
            done = list(pool.map(group, wanted))
        self._generation = _Generation(
            tuple(row for one in done for row in one.rows),
            {key: found for one in done for key, found in one.features.items()},
        )
        self._log_metric("seconds/rollout", time.perf_counter() - began)
        for one in done:
            for name, value in one.metrics().items():
                self._log_metric(name, value)
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        columns = zip(*(c for one in done for c in one.columns(ends)), strict=True)
        names = ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        made = {name: list(column) for name, column in zip(names, columns, strict=True)}
        return {**made, "parts": [parts for one in done for parts in one.parts]}

    # -- weights ----------------------------------------------------------------------------

    def sync_weights(self) -> None:
        """TRL calls it before rollouts, once a step."""
        began = time.perf_counter()
        self.runtime.update_weights(trained_tensors(self.accelerator.unwrap_model(self.model)))
        self._log_metric("seconds/weights", time.perf_counter() - began)

    # -- the step ---------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _EpochSampler(super()._get_train_sampler(dataset))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's, but that whole groups are permuted, and by seed and step alone."""
        if not self.model.training:
            prepared: dict[str, Any] = super()._prepare_inputs(generation_batch)
            return prepared
        began = time.perf_counter()
        steps, size = self.args.steps_per_generation, self.num_generations
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            seeds = np.random.SeedSequence([self.args.seed, self.state.global_step])
            groups = np.random.default_rng(seeds).permutation(len(self._row_ids) // size)
            order = torch.from_numpy((groups[:, None] * size + np.arange(size)).ravel())
            batch = {name: t if t.ndim == 0 else t[order.to(t.device)] for name, t in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, steps)
        self._prepare_seconds = time.perf_counter() - began
        inputs: dict[str, Any] = self._buffered_inputs[self._step % steps]
        return inputs

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._row_ids = inputs["vtts_row"].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_vision: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """(B, C), 0 where nothing counts; one forest of whole groups at a time."""
        require(WHAT, "router_aux_loss_coef", compute_aux_loss, not compute_aux_loss, "0")
        began, kept, num = time.perf_counter(), self._generation, len(self._row_ids)
        rows = [kept.rows[i] for i in self._row_ids]
        out: list[tuple[Tensor, ...]] = []
        for start in range(0, num, batch_size or num):
            chunk = rows[start : start + (batch_size or num)]
            there = [row for row in chunk if row is not None]
            if not there:
                zeros = input_ids.new_zeros((len(chunk), logits_to_keep), dtype=torch.float32)
                out.append((zeros, zeros))
                continue
            tree = TokenTree.of(there)
            features = tree.pick(kept.features_of(there))
            with self.accelerator.autocast():
                scores = tree_logprobs(model, tree, features, temperature=self.temperature)
            places = [
                (np.full(row.mask.sum(), at), np.flatnonzero(row.mask) - row.num_prompt)
                for at, row in enumerate(chunk)
                if row is not None
            ]
            at, column = (torch.from_numpy(np.concatenate(p)) for p in zip(*places, strict=True))
            self._same_tokens(input_ids[start : start + len(chunk)], logits_to_keep, chunk)
            index = at.to(scores.logprobs.device), column.to(scores.logprobs.device)
            empty = scores.logprobs.new_zeros(len(chunk), logits_to_keep)
            out.append(tuple(empty.index_put(index, values) for values in scores))
        if not torch.is_grad_enabled():
            self._metrics["train"]["seconds/scores"].append(time.perf_counter() - began)
        logprobs, entropies = (torch.cat(parts) for parts in zip(*out, strict=True))
        return logprobs, entropies if compute_entropy else None, None

    def _same_tokens(self, input_ids: Tensor, num: int, rows: list[RolloutRow | None]) -> None:
        for shown, row in zip(input_ids[:, -num:].cpu().numpy(), rows, strict=True):
            said = () if row is None else row.token_ids[row.num_prompt :]
            if not np.array_equal(shown[: len(said)], said):
                raise RuntimeError(f"{WHAT}: rows and their ids have come apart")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        began, step = time.perf_counter(), self._step
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._metrics["train"]["seconds/step"].append(
            time.perf_counter() - began - self._prepare_seconds
        )
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms = torch.stack([loss.detach().float(), *(g.norm().float() for g in grads)])
        bad = (~torch.isfinite(norms).all()).float()
        if self.accelerator.reduce(bad, reduction="sum") > 0:  # on all processes alike
            raise RuntimeError(
                f"{WHAT}: loss or gradient of step {self.state.global_step + 1} is not finite; "
                f"the batch is in {self._keep_batch(step)}"
            )
        return loss

    def _keep_batch(self, step: int) -> Path:
        assert self._buffered_inputs is not None
        inputs = self._buffered_inputs[step % self.args.steps_per_generation]
        kept = (self._generation.rows[i] for i in inputs["vtts_row"].tolist())
        rows = [None if row is None else row.as_dict() for row in kept]
        name = f"nan-step-{self.state.global_step + 1}-rank-{self.accelerator.process_index}.pt"
        path = Path(self.args.output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"inputs": inputs, "rows": rows}, path)
        return path

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without rewards that no row of these steps had, as those of other tasks."""
        found = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name, values in found.items() if all(map(math.isnan, values))]:
            del found[name]
        super().log(logs, start_time)

    # -- checkpoints ------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers' takes a step before it looks whether the run has had all of them."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written beside the others and moved there once it is whole. None inside a generation, as
        after the last step of a run may be: its batches are in no checkpoint."""
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            step = self.state.global_step
            logger.info("step %d is inside a generation: it has no checkpoint", step)
            return
        folder = Path(super()._get_output_dir(trial))
        staging, main = folder / "incomplete", self.accelerator.is_main_process
        if main:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if main:
            for made in staging.glob("checkpoint-*"):
                put_in_place(made, folder)
            shutil.rmtree(staging)
            rotate_checkpoints(str(folder), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            complete_checkpoint(self._source, Path(output_dir or self.args.output_dir))


class _EpochSampler(torch.utils.data.Sampler[int]):
    """TRL's sampler, whose order follows from seed and epoch, however many epochs came before it in
    this process."""

    def __init__(self, sampler: RepeatSampler) -> None:
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        if self._sampler.shuffle:
            self._sampler.generator.manual_seed((self._sampler.seed or 0) + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def _reward(name: str) -> Callable[..., list[float | None]]:
    """A reward of TRL's that tells what ours said; None for a member that failed, and for a task
    without it."""

    def told(parts: list[Mapping[str, float] | None], **_: Any) -> list[float | None]:
        return [None if part is None else part.get(name) for part in parts]

    told.__name__ = name
    return told
