"""The stages that make the embedded model, each resumable, each from the files of the one before.

`vision` trains tower and merger on single frame pairs; `sketch` the language model on features
made from labels; `language` the language model on features of the trained tower. `export`
writes the checkpoint.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tiny.datasets import (
    BankDataset,
    EpisodeFactory,
    PixelDataset,
    SketchDataset,
    ViewDataset,
)
from tiny.episodes import MAX_ROUNDS
from tiny.features import encode_views, sketch_matrix
from tiny.language_stage import EpisodeBatch, Probes, language_loss
from tiny.loop import WHAT, LoopConfig, train
from tiny.recipe import (
    DTYPE,
    LANGUAGE_STEPS,
    NUM_CLIPS,
    PERCEPTION,
    PREPROCESSOR,
    PROMPTS,
    SKETCH_STEPS,
    VISION_STEPS,
    make_tokenizer,
    model_config,
    perception_fields,
    wide_recipe,
)
from tiny.tokenizer import save_tokenizer
from tiny.views import ViewBatch
from tiny.vision_stage import SketchHeads, forward_views, sketch_loss
from vtts_rt.checks import check_same
from vtts_rt.data.backgrounds import footage_available
from vtts_rt.data.needle import write_needle
from vtts_rt.data.rows import DataSet, write_manifest
from vtts_rt.files import replacing
from vtts_rt.models.base import VideoLM
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.registry import from_config, save_hf
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import prompts_from_dict
from vtts_rt.types import require

logger = logging.getLogger(__name__)

Stage = Literal["vision", "sketch", "language"]
STAGES: tuple[Stage, ...] = ("vision", "sketch", "language")
DEFAULT_STEPS: dict[Stage, int] = {
    "vision": VISION_STEPS,
    "sketch": SKETCH_STEPS,
    "language": LANGUAGE_STEPS,
}
_LEARNING_RATES: dict[Stage, float] = {"vision": 1.5e-3, "sketch": 2.2e-3, "language": 2e-3}


@dataclass(frozen=True)
class Recipe:
    """One run. folder: checkpoints and log; seed: of weights and data; num_clips: episodes in
    the bank of the last stage; workers: processes that make batches; wide: the last stage is the
    baseline's, one round with so many times the frame pairs."""

    folder: Path
    seed: int = 0
    num_clips: int = NUM_CLIPS
    workers: int = 1
    batch_views: int = 96
    batch_tokens: int = 7000
    wide: int = 1

    @property
    def suffix(self) -> str:
        """Of files that are the baseline's own."""
        return "" if self.wide == 1 else f"_wide{self.wide}"


def initial_model(recipe: Recipe) -> tuple[VideoLM, Tokenizer]:
    """Random weights and the tokenizer; the tokenizer's files are written to the folder."""
    raw = make_tokenizer()
    folder = recipe.folder / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(raw, folder)
    model = from_config(model_config(raw), seed=recipe.seed)
    with torch.no_grad():
        # A head tied to embeddings that are as large as vision features (about 0.5) needs a
        # small final norm, or the first losses are a hundred times the entropy.
        for parameter in model.language.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
        model.language.embed_tokens.weight.mul_(10.0)
        model.language.norm.weight.fill_(0.15)
        for parameter in model.visual.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
    return model, Tokenizer.from_pretrained(folder, model.chat)


def factory(tokenizer: Tokenizer, wide: int = 1) -> EpisodeFactory:
    """Episodes in the embedded model's settings and wording, or in the baseline's."""
    perception = replace(PERCEPTION, max_rounds=MAX_ROUNDS)
    if wide > 1:
        perception = wide_recipe(wide).resolve(GEOMETRY)
    return EpisodeFactory(tokenizer, perception, prompts_from_dict(PROMPTS))


def _config(stage: Stage, recipe: Recipe, steps: int | None) -> LoopConfig:
    return LoopConfig(
        steps=DEFAULT_STEPS[stage] if steps is None else steps,
        learning_rate=_LEARNING_RATES[stage],
        workers=recipe.workers,
    )


def _load(module: nn.Module, path: Path, prefix: str, **made_with: Any) -> None:
    """Weights of one part of a stage's checkpoint. ValueError for one that was made with others of
    these settings, or whose stage has steps to go; one that does not say is taken as it is."""
    if not path.is_file():
        raise RuntimeError(f"{WHAT}: {path} is missing; run the stage {path.stem} first")
    state = torch.load(path, weights_only=True)
    kept = state.get("made_with", {})
    check_same(WHAT, path, kept, made_with)
    if "steps" in kept and "step" in state:
        done, rule = state["step"], f"{kept['steps']}, all of stage {path.stem}: go on with that"
        require(WHAT, f"steps of {path}", done, done >= kept["steps"], rule)
    modules = state["modules"]
    part = {k.removeprefix(prefix): v for k, v in modules.items() if k.startswith(prefix)}
    module.load_state_dict(part)


def run_vision(
    recipe: Recipe, steps: int | None = None, stop_after: int | None = None
) -> dict[str, float]:
    """Stage `vision`; returns the last mean skills."""
    model, _ = initial_model(recipe)
    heads = SketchHeads(sketch_matrix(model.config.language.hidden_size))

    def loss_of(batch: ViewBatch, _progress: float) -> tuple[Tensor, dict[str, float]]:
        return sketch_loss(heads, forward_views(model, batch.pixels), batch)

    return train(
        "vision",
        nn.ModuleDict({"visual": model.visual}),
        ViewDataset(recipe.seed, recipe.batch_views),
        loss_of,
        _config("vision", recipe, steps),
        recipe.folder,
        stop_after,
        {"seed": recipe.seed, "batch_views": recipe.batch_views, "footage": footage_available()},
    )


def _train_language(
    stage: Stage,
    recipe: Recipe,
    model: VideoLM,
    probes: Probes,
    dataset: Any,
    steps: int | None,
    stop_after: int | None,
    made_with: dict[str, Any],
) -> dict[str, float]:
    def loss_of(batch: EpisodeBatch, progress: float) -> tuple[Tensor, dict[str, float]]:
        text, probing, skills = language_loss(model, probes, batch)
        return 4 * text + max(0.15, 1 - progress / 0.8) * probing, skills

    modules = nn.ModuleDict({"language": model.language, "probes": probes})
    config = _config(stage, recipe, steps)
    name = stage + (recipe.suffix if stage == "language" else "")
    made_with = {"seed": recipe.seed, "batch_tokens": recipe.batch_tokens, **made_with}
    return train(name, modules, dataset, loss_of, config, recipe.folder, stop_after, made_with)


def run_sketch(
    recipe: Recipe, steps: int | None = None, stop_after: int | None = None
) -> dict[str, float]:
    """Stage `sketch`: needs nothing, so it may run beside `vision`."""
    model, tokenizer = initial_model(recipe)
    hidden = model.config.language.hidden_size
    torch.manual_seed(recipe.seed)
    probes = Probes(hidden)
    dataset = SketchDataset(
        factory(tokenizer), sketch_matrix(hidden), recipe.seed, recipe.batch_tokens
    )
    return _train_language("sketch", recipe, model, probes, dataset, steps, stop_after, {})


def _of_bank(recipe: Recipe, model: VideoLM) -> dict[str, Any]:
    """What features of episodes depend on."""
    drawn = {"seed": recipe.seed, "wide": recipe.wide, "footage": footage_available()}
    return {**drawn, "vision": model.version("visual")}


def build_bank(recipe: Recipe, model: VideoLM, source: PixelDataset) -> list[NDArray[np.float16]]:
    """Features of `num_clips` episodes, fp16, kept in `bank.npz` for the next run. ValueError for
    one of another seed or tower; one that does not say is taken as it is."""
    path = recipe.folder / f"bank{recipe.suffix}.npz"
    made_with = _of_bank(recipe, model)
    if path.is_file():
        with np.load(path) as stored:
            if "made_with" in stored.files:
                check_same(WHAT, path, json.loads(str(stored["made_with"])), made_with)
            kept = [stored[name] for name in stored.files if name != "made_with"]
        if len(kept) >= recipe.num_clips:
            return kept[: recipe.num_clips]
    loader: DataLoader[Any] = DataLoader(
        source,
        batch_size=None,
        sampler=range(recipe.num_clips),
        num_workers=recipe.workers,
    )
    bank = []
    for index, pixels in loader:
        bank.append(encode_views(model, np.asarray(pixels)).astype(np.float16))
        if (index + 1) % 100 == 0:
            logger.info("bank: %d of %d clips", index + 1, recipe.num_clips)
    with replacing(path) as partial:
        np.savez(partial, *bank, made_with=np.array(json.dumps(made_with)))
    return bank


def run_language(
    recipe: Recipe, steps: int | None = None, stop_after: int | None = None
) -> dict[str, float]:
    """Stage `language`: the sketch stage's language model on the vision stage's features."""
    model, tokenizer = initial_model(recipe)
    _load(model.visual, recipe.folder / "vision.pt", "visual.", seed=recipe.seed)
    probes = Probes(model.config.language.hidden_size)
    start = recipe.folder / "sketch.pt"
    if start.is_file() or not (recipe.folder / f"language{recipe.suffix}.pt").is_file():
        _load(model.language, start, "language.", seed=recipe.seed)
        _load(probes, start, "probes.")
    source = PixelDataset(factory(tokenizer, recipe.wide), recipe.seed)
    bank = build_bank(recipe, model, source)
    matrix = sketch_matrix(model.config.language.hidden_size)
    sketch = SketchDataset(
        source.factory, matrix, recipe.seed + 1, recipe.batch_tokens // recipe.wide
    )
    dataset = BankDataset(source, bank, sketch)
    made_with = {**_of_bank(recipe, model), "clips": recipe.num_clips}
    if start.is_file():
        made_with["sketch"] = model.version("language")
    about = (model, probes, dataset, steps, stop_after, made_with)
    return _train_language("language", recipe, *about)


def write_questions(recipe: Recipe, num: int) -> Path:
    """`num` graded clips, encoded, and the manifest of questions about them, for GRPO: of the
    training split, in `grpo_clips`. Those that are there stay. Returns the manifest."""
    folder = recipe.folder / "grpo_clips"
    write_needle(folder, 0, num, difficulty="graded")
    sets = [DataSet("needle_graded", "video", "gqa", Path(), Path("rows.json"))]
    write_manifest(folder / "manifest.json", sets)
    return folder / "manifest.json"


def export(recipe: Recipe, out: Path) -> None:
    """Write the trained model to `out`: bf16 weights, tokenizer, perception settings, wording."""
    model, _ = initial_model(recipe)
    _load(model.visual, recipe.folder / "vision.pt", "visual.", seed=recipe.seed)
    made_with = {"seed": recipe.seed, "vision": model.version("visual")}
    _load(model.language, recipe.folder / f"language{recipe.suffix}.pt", "language.", **made_with)
    write_checkpoint(model, out, recipe.wide)


def write_checkpoint(model: VideoLM, out: Path, wide: int = 1) -> None:
    """The embedded model's folder, as transformers and `load_model` read it."""
    extras = {"dtype": DTYPE, "perception": perception_fields(wide), "prompts": PROMPTS}
    save_hf(model, out, "bfloat16", extras)
    save_tokenizer(make_tokenizer(), out)
    (out / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8"
    )
