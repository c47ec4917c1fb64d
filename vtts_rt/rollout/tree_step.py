"""tree_logprobs: what a trainer's loss needs of a token tree, by transformers' own model.

The model is called once, with its wrappers (LoRA, DDP, accelerate) around it. Its head is replaced
during the call: hidden states before the scored tokens go in, log-probabilities and entropies come
out, and no more than a chunk of them is ever multiplied with the vocabulary.

Legend: M nodes, S scored nodes, T scored tokens of all rows, P tokens of all distinct pairs, V
vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtts_rt.rollout.tree import TokenTree
from vtts_rt.rollout.tree_attention import NAME, TreeAttention, register
from vtts_rt.types import require

Features = Tensor | Callable[[TokenTree], Tensor]
# Logits that softmax works on at a time: a part of the cache on a CPU, few kernels on a GPU.
_VALUES = {"cpu": 1 << 21}
_VALUES_ELSEWHERE = 1 << 27


class TreeScores(NamedTuple):
    """Both (T,) float32, of the scored tokens of all rows, row after row (`TokenTree.offsets`);
    natural logarithms; differentiable."""

    logprobs: Tensor
    entropies: Tensor


def use_tree_attention(model: nn.Module) -> None:
    """Let the language model of a Qwen-VL of transformers, wrapped or not, attend by "vtts_tree",
    which without a tree is sdpa. (`attn_implementation="vtts_tree"` of `from_pretrained` does the
    same once `vtts_rt.rollout.tree_attention.register` was called.)"""
    register()
    base_model(model).set_attn_implementation({"text_config": NAME})


def base_model(model: nn.Module) -> Any:
    """transformers' model inside wrappers (DDP, PEFT). ValueError if there is none with a head."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ValueError(
        f"tree_logprobs: model must be a language model of transformers, got {type(model).__name__}"
    )


def tree_logprobs(
    model: nn.Module,
    tree: TokenTree,
    features: Features | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> TreeScores:
    """Log-probabilities and entropies of all scored tokens, of the softmax of logits / temperature.

    model: transformers' Qwen2.5-VL or Qwen3-VL (`...ForConditionalGeneration`), plain or wrapped,
        after `use_tree_attention`. features: (P, feature_dim) of `tree.pairs`, one pair after the
        other (`tree.pick`), or what gives them for a tree, with gradients where the tower is
        trained; None where the tree shows none. chunk: scored tokens that are multiplied with the
        vocabulary at a time. All but the last chunk are multiplied again in the backward pass, so
        that at most two exist.

    ValueError for a model that the tree cannot replay: another attention implementation, dropout
    in training, sliding windows, a loss of the router, prompt learning.
    """
    require("tree_logprobs", "temperature", temperature, temperature > 0, "> 0")
    require("tree_logprobs", "chunk", chunk, chunk >= 1, ">= 1")
    base = base_model(model)
    text = base.config.get_text_config()
    _check(model, base, text)
    device = base.get_input_embeddings().weight.device
    plan = TreeAttention(tree.end, device)
    token_ids = torch.from_numpy(tree.token_ids).to(device)
    score = ScoringHead(token_ids[torch.from_numpy(tree.scored).to(device)], temperature, chunk)
    base.model.rope_deltas = None  # of an earlier generation
    with score.instead_of(base.get_output_embeddings()):
        out = model(
            input_ids=token_ids[None],
            attention_mask=None,
            position_ids=torch.from_numpy(tree.position_ids).to(device)[:, None],
            use_cache=False,
            mm_encoder_outputs=_encoder_outputs(base, tree, token_ids, features),
            logits_to_keep=torch.from_numpy(tree.predicting).to(device),
            vtts_tree=plan,
        )
    if plan.num_calls != text.num_hidden_layers or score.num_calls != 1:
        raise RuntimeError(
            f"tree_logprobs: {plan.num_calls} of {text.num_hidden_layers} layers attended by the "
            f"tree, and the head was called {score.num_calls} times: use the model's own forward"
        )
    index = torch.from_numpy(tree.index).to(device)
    logprobs, entropies = out.logits[0].index_select(0, index).unbind(1)
    return TreeScores(logprobs, entropies)


def _check(model: nn.Module, base: Any, text: Any) -> None:
    what, kind = "tree_logprobs", text._attn_implementation
    require(what, "model", kind, kind == NAME, f'one that attends by "{NAME}" (use_tree_attention)')
    windows = [kind for kind in getattr(text, "layer_types", None) or () if "sliding" in kind]
    require(what, "model", windows, not windows, "without sliding windows")
    router = getattr(text, "output_router_logits", False)
    require(what, "model", "output_router_logits", not router, "without a loss of its router")
    for module in model.modules():
        peft = getattr(module, "active_peft_config", None)
        learned = getattr(peft, "is_prompt_learning", False)
        require(what, "model", type(peft).__name__, not learned, "without learned prompts")
        p = module.p if isinstance(module, nn.Dropout) and module.training else 0.0
        require(what, "model", f"dropout {p}", not p, "without dropout while it trains")
    p = getattr(text, "attention_dropout", 0.0) if base.training else 0.0
    require(what, "model", f"attention_dropout {p}", not p, "without dropout while it trains")


def _encoder_outputs(
    base: Any, tree: TokenTree, token_ids: Tensor, features: Features | None
) -> dict[str, Any] | None:
    """What transformers puts in the place of pads, in order, with no pixels and no tower.

    A pad that a model wrote as text gets what its embedding says.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    config, hidden = base.config, base.config.get_text_config().hidden_size
    given = features(tree) if callable(features) else features
    levels = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    expected = (tree.num_features, hidden * (1 + levels))
    shape = (0, expected[1]) if given is None else tuple(given.shape)
    require("tree_logprobs", "features", shape, shape == expected, f"{expected}")
    embed = base.get_input_embeddings()
    device, outputs = token_ids.device, {}
    source = token_ids.new_full((len(tree),), -1)  # rows of features
    source[torch.from_numpy(tree.vision).to(device)] = torch.from_numpy(tree.features).to(device)
    for kind, pad in (("image", config.image_token_id), ("video", config.video_token_id)):
        chosen = source[token_ids == pad]
        if not len(chosen):
            continue
        rows = embed.weight.new_empty(expected) if given is None else given.to(device)
        if bool((chosen < 0).any()):  # the last row
            text = embed(token_ids.new_tensor([pad]))
            rows = torch.cat((rows, nn.functional.pad(text, (0, expected[1] - hidden)).to(rows)))
            chosen = chosen % len(rows)
        pooled, *deep = rows.index_select(0, chosen).split(hidden, dim=1)
        outputs[kind] = BaseModelOutputWithPooling(pooler_output=(pooled,))
        outputs[kind].deepstack_features = [(level,) for level in deep]
    return outputs or None


class ScoringHead:
    """Stands for a model's head: (1, S, C) -> (1, S, 2) float32, of each row the log-probability of
    its target and the entropy, both of the softmax of logits / temperature.

    targets: (S,) int64 token ids. chunk: rows that are multiplied with the vocabulary at a time;
    all but the last are multiplied again in the backward pass. num_calls: of `score`.
    """

    def __init__(self, targets: Tensor, temperature: float, chunk: int) -> None:
        self._targets, self._temperature, self._chunk = targets, temperature, chunk
        self.num_calls = 0

    @contextmanager
    def instead_of(self, head: nn.Module) -> Iterator[None]:
        """Whatever hooks the head has go on; only its `forward` is replaced."""
        wrapped, original = head.__dict__.get("forward"), head.forward
        head.forward = partial(self.score, original)
        try:
            yield
        finally:
            if wrapped is None:
                del head.forward
            else:
                head.forward = wrapped

    def score(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """head: rows (S, C) -> logits (S, V); hidden: (1, S, C)."""
        self.num_calls += 1

        def of_chunk(rows: Tensor, targets: Tensor) -> Tensor:
            logits = head(rows)
            found: Tensor = _Scores.apply(logits, targets, self._temperature)  # type: ignore[no-untyped-call]
            return found

        chunks = (torch.split(x, self._chunk) for x in (hidden[0], self._targets))
        *others, last = zip(*chunks, strict=True)
        again: Callable[[Tensor, Tensor], Tensor] = of_chunk
        if torch.is_grad_enabled():
            again = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([*(again(*part) for part in others), of_chunk(*last)])[None]


class _Scores(torch.autograd.Function):
    """logits (S, V), targets (S,), temperature -> (S, 2) float32, see `ScoringHead`.

    Nothing of the logits' size is kept but them; sums are in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        scores = logits.new_empty((len(logits), 3), dtype=torch.float32)
        for rows, x in _parts(logits, temperature):
            lse = x.logsumexp(1)
            chosen = x.gather(1, targets[rows, None])[:, 0]
            mean = torch.linalg.vecdot(x.sub(lse[:, None]).exp_(), x)
            scores[rows] = torch.stack((chosen - lse, lse - mean, lse), dim=1)
        ctx.save_for_backward(logits, targets, scores)
        ctx.temperature = temperature
        return scores[:, :2].clone()

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, scores = ctx.saved_tensors
        grad = torch.empty_like(logits)
        of_logprob, of_entropy = (grads / ctx.temperature).unbind(1)
        wanted = bool(of_entropy.any())
        for rows, x in _parts(logits, ctx.temperature):
            # log p, and d entropy / d x = -p (log p + entropy)
            x.sub_(scores[rows, 2:])
            factor = -of_logprob[rows, None]
            if wanted:
                factor = factor - of_entropy[rows, None] * (x + scores[rows, 1:2])
            x.exp_().mul_(factor).scatter_add_(1, targets[rows, None], of_logprob[rows, None])
            grad[rows] = x
        return grad, None, None


def _parts(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and a float32 copy of their logits / temperature."""
    values = _VALUES.get(logits.device.type, _VALUES_ELSEWHERE)
    step = max(1, values // max(logits.shape[1], 1))
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        yield rows, logits[rows].to(torch.float32, copy=True).div_(temperature)
