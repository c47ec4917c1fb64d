"""Log-probs and gradients of a token tree against separate full sequences, all by transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tree_tools import (
    GROUPS,
    IMAGE_PAD,
    VIDEO_PAD,
    Video,
    flat_group,
    make_row,
    nested_group,
    outputs_of,
    pair_features,
    row_scores,
    said,
    separate,
)
from utils import CLUES, LOOK, tiny_qwen2_5_vl, tiny_qwen3_vl

from vtts_rt import Ask, EngineConfig, PerceptionConfig, Runtime, SamplingParams
from vtts_rt.rollout.rows import rows_of
from vtts_rt.rollout.tree import TokenTree
from vtts_rt.rollout.tree_attention import NAME, TreeAttention, flex, interval_mask, register
from vtts_rt.rollout.tree_step import TreeScores, base_model, tree_logprobs, use_tree_attention

TEMPERATURE = 0.7
FAMILIES = {"qwen2_5_vl": tiny_qwen2_5_vl, "qwen3_vl": tiny_qwen3_vl}
Scores = tuple[Tensor, Tensor]


@pytest.fixture(params=FAMILIES)
def model(request: Any) -> Any:
    return tiny(request.param)


def tiny(family: str = "qwen2_5_vl", **more: Any) -> Any:
    model = FAMILIES[family](**more)
    model.config.video_token_id, model.config.image_token_id = VIDEO_PAD, IMAGE_PAD
    use_tree_attention(model)
    return model


def no_tower(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the tower ran")


def width(base: Any) -> int:
    levels = getattr(base.config.vision_config, "deepstack_visual_indexes", ())
    return int(base.config.get_text_config().hidden_size) * (1 + len(levels))


def gradients(model: nn.Module, scores: Scores) -> dict[str, Tensor]:
    """Of a loss in which every scored token has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(scores[0])).sin() + 0.3
    (scores[0] @ weights + 0.2 * scores[1] @ weights.flip(0)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: Scores, theirs: Scores) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name, grad in theirs.items():
        error = (ours[name] - grad).norm()
        assert error <= 1e-4 * grad.norm(), (name, float(error), float(grad.norm()))


def both(
    model: nn.Module, rows: list[Any], **more: Any
) -> tuple[tuple[TreeScores, dict[str, Tensor]], tuple[Scores, dict[str, Tensor]]]:
    """Scores and gradients of the tree, and of rows by themselves through sdpa."""
    base = base_model(model)
    base.model.visual.forward = no_tower
    tree = TokenTree.of(rows)
    features = pair_features(tree, width(base))
    scores = tree_logprobs(model, tree, features, temperature=TEMPERATURE, chunk=6, **more)
    ours = scores, gradients(model, scores)
    base.set_attn_implementation({"text_config": "sdpa"})
    alone = separate(model, base, rows, tree, features, TEMPERATURE)
    return ours, (alone, gradients(model, alone))


@pytest.mark.parametrize("group", GROUPS)
def test_trees_equal_separate_rows(model: Any, group: str) -> None:
    (scores, grads), (alone, expected) = both(model, GROUPS[group]())
    assert_equal(scores, alone)
    assert_same_gradients(grads, expected)


@pytest.mark.parametrize("way", ["lora", "checkpointing", "both"])
def test_training_as_trainers_do_it(model: Any, way: str) -> None:
    if way != "checkpointing":
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    if way != "lora":
        model.gradient_checkpointing_enable()
        if way == "both":
            model.enable_input_require_grads()
    model.train()
    (scores, grads), (alone, expected) = both(model, nested_group())
    assert_equal(scores, alone)
    assert_same_gradients(grads, expected)
    assert way == "checkpointing" or all("lora" in name for name in grads)


def test_wrapped_for_several_processes(tmp_path: Any) -> None:
    model, rows = tiny(), flat_group()
    model.model.visual.requires_grad_(False)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        (scores, grads), (alone, expected) = both(wrapped, rows)
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(scores, alone)
    assert_same_gradients(grads, expected)


def test_positions_off_by_one_are_another_answer(model: Any) -> None:
    """The control of the tests above: they would see it."""
    rows = flat_group()
    tree = TokenTree.of(rows)
    features = pair_features(tree, width(model))
    expected = tree_logprobs(model, tree, features, temperature=TEMPERATURE).logprobs
    tree.position_ids[:, tree.places[0][9:]] += 1
    moved = tree_logprobs(model, tree, features, temperature=TEMPERATURE).logprobs
    assert float((moved - expected).detach().abs().max()) > 1e-2


def test_groups_do_not_touch_each_other(model: Any) -> None:
    rows = GROUPS["forest"]()
    parts = [rows[:8], rows[8:11], rows[11:]]
    whole = TokenTree.of(rows)
    together = tree_logprobs(model, whole, pair_features(whole, width(model)))
    trees = [TokenTree.of(part) for part in parts]
    alone = [tree_logprobs(model, t, pair_features(t, width(model))) for t in trees]
    assert len(whole) < sum(map(len, trees))  # they begin alike
    assert_equal(together, tuple(map(torch.cat, zip(*alone, strict=True))))


def test_chunks_of_the_vocabulary_change_nothing() -> None:
    model, tree = tiny(), TokenTree.of(flat_group())
    features = pair_features(tree, width(model))
    found = []
    for chunk in (1, 1024):
        scores = tree_logprobs(model, tree, features, chunk=chunk)
        found.append((scores, gradients(model, scores)))
    assert_equal(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])


def test_one_chunk_of_logits_is_kept() -> None:
    """And nothing that grows with the square of the tokens."""
    model = tiny()
    rows = [make_row([1] * 900, said(*range(50 * i, 50 * i + 40))) for i in range(5)]
    tree, kept = TokenTree.of(rows), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scores = tree_logprobs(model, tree, chunk=50)
    weight = model.lm_head.weight
    logits = [x for x in kept if len(weight) in x.shape and x.data_ptr() != weight.data_ptr()]
    assert [x.shape for x in logits] == [(50, len(weight))]
    assert max(x.numel() for x in kept) < len(tree) ** 2 / 4
    assert len(scores.logprobs) == 200


def test_bfloat16_is_as_near_as_separate_rows(model: Any) -> None:
    tree, rows = TokenTree.of(nested_group()), nested_group()
    features = pair_features(tree, width(model))
    with torch.no_grad():
        exact = tree_logprobs(model, tree, features).logprobs
        model.bfloat16()
        ours = tree_logprobs(model, tree, features).logprobs
        model.set_attn_implementation({"text_config": "sdpa"})
        theirs, _ = separate(model, model, rows, tree, features, 1.0)
    errors = [float((x - exact).pow(2).mean().sqrt()) for x in (ours, theirs)]
    assert ours.dtype == torch.float32 and errors[0] <= 1.3 * errors[1] > 0


def test_autocast(model: Any) -> None:
    tree = TokenTree.of(flat_group())
    features = pair_features(tree, width(model))
    exact = tree_logprobs(model, tree, features)
    with torch.autocast("cpu", torch.bfloat16):
        scores = tree_logprobs(model, tree, features)
    gradients(model, scores)
    assert 0 < float((scores.logprobs - exact.logprobs).detach().abs().max()) < 0.5


def encode(base: Any, pixels: Tensor, num_pairs: int) -> list[Tensor]:
    """(tokens of a pair, feature_dim) of each pair, by the tower."""
    grid = torch.tensor([[1, 4, 4]] * num_pairs)
    out = base.get_video_features(pixels, grid, return_dict=True)
    deep = getattr(out, "deepstack_features", None) or []
    return [torch.cat(parts, 1) for parts in zip(out.pooler_output, *deep, strict=True)]


def test_a_trained_tower_sees_each_pair_once(model: Any) -> None:
    """Against rows with all their pixels."""
    model.set_attn_implementation("sdpa")
    use_tree_attention(model)
    first: list[Any] = [[5], Video(("a", "b")), [6]]
    rows = [make_row(*first, said(i, 2), [7], Video((f"c{i // 2}",)), said(8)) for i in range(3)]
    tree = TokenTree.of(rows)
    vision = model.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = {pair.key: torch.randn(16, size) for pair in tree.pairs}
    runs = []
    hook = model.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )

    def features(tree: TokenTree) -> Tensor:
        whole = torch.cat([pixels[pair.key] for pair in tree.pairs])
        return torch.cat(encode(model, whole, len(tree.pairs)))

    scores = tree_logprobs(model, tree, features)
    grads = gradients(model, scores)
    hook.remove()
    assert runs == [4 * 16]
    found = []
    for row in rows:
        shown = [key for ref in row.vision for key in ref.keys]
        out = model(
            input_ids=torch.from_numpy(row.token_ids)[None],
            position_ids=torch.from_numpy(row.position_ids)[:, None],
            pixel_values_videos=torch.cat([pixels[key] for key in shown]),
            video_grid_thw=torch.tensor([[len(ref.keys), 4, 4] for ref in row.vision]),
            mm_token_type_ids=2 * torch.from_numpy(row.token_ids == VIDEO_PAD)[None].int(),
        )
        found.append(row_scores(out.logits[0], row, 1.0))
    alone = tuple(map(torch.cat, zip(*found, strict=True)))
    assert_equal(scores, alone)
    expected = gradients(model, alone)
    assert any("visual" in name for name in expected)
    assert_same_gradients(grads, expected)


def test_pads_that_the_model_wrote_are_text() -> None:
    model = tiny()
    row = make_row([5], Video(("a",)), [6], said(VIDEO_PAD, 3, IMAGE_PAD, 4))
    tree = TokenTree.of([row])
    features = pair_features(tree, width(model))
    ours = tree_logprobs(model, tree, features)
    embeds = model.get_input_embeddings()(torch.from_numpy(row.token_ids))
    embeds = embeds.index_copy(0, torch.from_numpy(tree.vision), features)
    positions = torch.from_numpy(row.position_ids)[:, None]
    out = model(inputs_embeds=embeds[None], position_ids=positions)
    assert_equal(ours, row_scores(out.logits[0], row, 1.0))


def test_flex_attention_gives_the_same() -> None:
    """Its values: on a CPU it has no backward pass (bench/bench_tree_step.py checks a GPU's)."""
    tree = TokenTree.of(nested_group())
    q, k, v = (torch.randn(1, heads, len(tree), 8) for heads in (6, 2, 2))
    plan = TreeAttention(tree.end, torch.device("cpu"))
    out = flex(q, k, v, interval_mask(tree.end, torch.device("cpu")), 0.4)
    torch.testing.assert_close(out, plan(q, k, v, 0.4), rtol=1e-5, atol=1e-5)


def test_without_a_tree_it_is_sdpa(model: Any) -> None:
    """Padded rows and generation too."""
    ids = torch.randint(0, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours = model(input_ids=ids, attention_mask=mask).logits
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation({"text_config": "sdpa"})
    theirs = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask > 0], theirs[mask > 0], rtol=0, atol=0)
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert said.tolist() == expected.tolist()


def test_a_tree_that_no_layer_saw_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, tree = tiny(), TokenTree.of([make_row([1], said(2))])
    AttentionInterface.register(NAME, sdpa_attention_forward)
    try:
        with pytest.raises(RuntimeError, match="0 of 3 layers attended by the tree"):
            tree_logprobs(model, tree)
    finally:
        register()
    assert tree_logprobs(model, tree).logprobs.shape == (1,)


def sliding(model: Any) -> None:
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]


def prompt_learning(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(model, config)


def dropout(model: Any) -> None:
    model.config.text_config.attention_dropout = 0.1
    model.train()


def lora_dropout(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    return peft.get_peft_model(model, config).train()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.set_attn_implementation({"text_config": "sdpa"}), "use_tree_attention"),
        (sliding, "sliding"),
        (dropout, "attention_dropout 0.1"),
        (lora_dropout, "without dropout"),
        (lambda m: setattr(m.config.text_config, "output_router_logits", True), "router"),
        (prompt_learning, "learned prompts"),
        (lambda m: nn.Linear(1, 1), "transformers"),
    ],
)
def test_models_that_a_tree_cannot_replay_are_refused(
    change: Callable[[Any], Any], says: str
) -> None:
    model = tiny(layers=2)
    changed = change(model)
    with pytest.raises(ValueError, match=says):
        tree_logprobs(changed or model, TokenTree.of([make_row([1], said(2))]))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0}, {"chunk": 0}, {"features": None}, {"features": torch.zeros(8, 63)}],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    model, tree = tiny(), TokenTree.of(flat_group())
    given = {"features": pair_features(tree, width(model))} | wrong
    with pytest.raises(ValueError, match=f"tree_logprobs: {next(iter(wrong))} must be"):
        tree_logprobs(model, tree, **given)


def test_positions_of_an_earlier_generation_are_forgotten(model: Any) -> None:
    model.model.rope_deltas = torch.tensor([[77], [3]])
    tree = TokenTree.of(flat_group())
    tree_logprobs(model, tree, pair_features(tree, width(model)))
    assert model.model.rope_deltas is None


def test_nothing_scored_and_nothing_learned(model: Any) -> None:
    """A rank may get rows of which nothing counts."""
    tree = TokenTree.of([make_row([1, 2, 3])])
    scores = tree_logprobs(model, tree)
    assert scores.logprobs.shape == scores.entropies.shape == (0,)
    assert np.array_equal(tree.offsets, [0, 0]) and outputs_of(make_row([1]), model, {}) == {}
    scores.logprobs.sum().backward()


@pytest.mark.parametrize("strategy", ["append", "official"])
def test_rollouts_of_the_runtime(checkpoint: Any, clip: Any, strategy: str) -> None:
    """What was drawn in rounds, scored again by transformers: features of the vision cache and
    positions of the transcripts, under the parity that generated them."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    perception = PerceptionConfig(strategy=strategy, max_rounds=3, **LOOK)  # type: ignore[arg-type]
    sampling = SamplingParams(temperature=1.3, max_tokens=5, ignore_eos=True)
    ask = Ask(str(clip), "which?", perception=perception, sampling=sampling, assume_clues=CLUES)
    with Runtime.from_pretrained(checkpoint, engine=EngineConfig(kv_bytes=1 << 24)) as runtime:
        answers = tuple(runtime.ask(replace(ask, member=member)) for member in range(3))
        rows = rows_of(SimpleNamespace(group_id="g", ask=ask, members=answers))
        tree = TokenTree.of(rows)
        features = tree.pick(lambda row: runtime.features(rows[row].transcript))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    use_tree_attention(model)
    model.model.visual.forward = no_tower
    scores = tree_logprobs(model, tree, features, temperature=1.3)
    drawn = np.concatenate([row.logprobs[row.mask] for row in rows])
    np.testing.assert_allclose(scores.logprobs.detach(), drawn, rtol=0, atol=1e-4)
    assert len(rows) == (3 if strategy == "append" else 9)
    assert len(tree) < 0.6 * sum(len(row.token_ids) for row in rows)
