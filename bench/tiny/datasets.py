"""What the stages train on: batch i of each data set is a function of (seed, i)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tiny.episodes import Episode, Stage, make_drill, make_episode
from tiny.features import episode_labels, episode_pixels, sketch_features
from tiny.language_stage import EpisodeBatch, PromptWords, collate
from tiny.views import FloatArray, ViewBatch, make_view_batch
from vtts_rt.config import ResolvedPerception
from vtts_rt.data.needle import LEVELS, Level, make_scene
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates

Kind = Literal["drill", "first", "second", "third", "again", "whole"]
KINDS: tuple[Kind, ...] = ("drill", "first", "second", "third", "again", "whole")
# Tokens of an episode of each kind, about; batches hold the same number of tokens.
_TOKENS = {"drill": 60, "first": 250, "second": 270, "third": 250, "again": 680, "whole": 650}
# Rounds of an episode of each kind, and how many of them are left out of the text.
_ROUNDS = {"first": (1, 0), "second": (2, 1), "third": (3, 2), "again": (3, 0), "whole": (5, 0)}
# Shares of the levels of needle.LEVELS in each kind.
_LEVELS: dict[Kind, tuple[float, ...]] = {
    "drill": (0.25, 0.25, 0.25, 0.25),
    "first": (0.25, 0.2, 0.2, 0.35),
    "second": (0.0, 0.4, 0.3, 0.3),
    "third": (0.0, 0.0, 1.0, 0.0),
    "again": (0.0, 0.1, 0.1, 0.8),
    "whole": (0.15, 0.25, 0.3, 0.3),
}
_SEEDS = 1 << 40


def _draw_level(rng: np.random.Generator, kind: Kind) -> Level:
    return list(LEVELS)[int(rng.choice(len(LEVELS), p=_LEVELS[kind]))]


def _serves(kind: Kind, stages: Sequence[Stage]) -> bool:
    """Whether an episode with the stages, of its rounds from the first, can serve as one of the
    kind: a later round stands alone where it needs no earlier one; `again` comes back."""
    at = {"second": 1, "third": 2, "again": 1}.get(kind, 0)
    wanted = ("blank", "lost") if kind == "again" else ("mark", "read")
    return len(stages) > at + (kind == "again") and (at == 0 or stages[at] in wanted)


class ViewDataset(Dataset[ViewBatch]):
    """Random views of training scenes, `size` a batch."""

    def __init__(self, seed: int, size: int = 96) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> ViewBatch:
        return make_view_batch(self.seed, index, self.size)


@dataclass
class EpisodeFactory:
    """Makes episodes of the embedded model's settings, of at most perception.max_rounds rounds."""

    tokenizer: Tokenizer
    perception: ResolvedPerception
    templates: PromptTemplates
    words: PromptWords = field(init=False)

    def __post_init__(self) -> None:
        self.words = PromptWords(self.tokenizer)

    def make(
        self,
        kind: Kind,
        level: Level,
        scene_seed: int,
        seed: int,
        question_seed: int,
        miss: float = 0.15,
    ) -> Episode:
        """One episode about the first card of a scene of that level."""
        scene = make_scene(scene_seed, "train", difficulty=level)
        about: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "perception": self.perception,
            "templates": self.templates,
            "question_seed": question_seed,
        }
        if kind == "drill":
            return make_drill(scene, 0, **about)
        num_rounds, skip_rounds = _ROUNDS[kind]
        return make_episode(
            scene,
            0,
            **about,
            seed=seed,
            num_rounds=min(num_rounds, self.perception.max_rounds),
            skip_rounds=skip_rounds,
            jitter=0.0 if kind == "first" else 0.5,
            miss=miss,
        )


class SketchDataset(Dataset[EpisodeBatch]):
    """Fresh scenes every time, with features sketched from their labels.

    mix: share of batches of each kind, in the order of KINDS.
    """

    def __init__(
        self,
        factory: EpisodeFactory,
        matrix: FloatArray,
        seed: int,
        num_tokens: int = 7000,
        mix: tuple[float, ...] = (0.1, 0.17, 0.13, 0.15, 0.2, 0.25),
    ) -> None:
        self.factory, self.matrix, self.seed = factory, matrix, seed
        self.num_tokens, self.mix = num_tokens, mix

    def __getitem__(self, index: int) -> EpisodeBatch:
        rng = np.random.default_rng([self.seed, index, 0])
        return self.batch(index, KINDS[int(rng.choice(len(KINDS), p=self.mix))])

    def batch(self, index: int, kind: Kind) -> EpisodeBatch:
        """Batch `index` if it is one of `kind`."""
        rng = np.random.default_rng([self.seed, index, 1])
        episodes: list[Episode] = []
        while len(episodes) < max(1, self.num_tokens // _TOKENS[kind]):
            level = _draw_level(rng, kind)
            miss = 1.0 if kind == "again" and level != "twin" else 0.15
            scene_seed, seed, asking = (int(n) for n in rng.integers(_SEEDS, size=3))
            episode = self.factory.make(kind, level, scene_seed, seed, asking, miss)
            left_out: list[Stage] = ["card"] * _ROUNDS.get(kind, (0, 0))[1]
            if _serves(kind, left_out + episode.stages):
                episodes.append(episode)
        labels = [episode_labels(episode) for episode in episodes]
        features = [sketch_features(found, self.matrix, rng) for found in labels]
        return collate(episodes, features, labels, self.factory.words)


class PixelDataset(Dataset[tuple[int, NDArray[np.uint8]]]):
    """Views of whole episodes, drawn: what a frozen tower encodes once."""

    def __init__(self, factory: EpisodeFactory, seed: int) -> None:
        self.factory, self.seed = factory, seed

    def episode(self, index: int, kind: Kind = "whole", question_seed: int = 0) -> Episode:
        """Episode `index`, or one round of it; its frames do not depend on question_seed."""
        rng = np.random.default_rng([self.seed, index, 2])
        level = _draw_level(rng, "whole")
        scene_seed, seed = (int(n) for n in rng.integers(_SEEDS, size=2))
        return self.factory.make(kind, level, scene_seed, seed, question_seed)

    def __getitem__(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        rng = np.random.default_rng([self.seed, index, 3])
        return index, episode_pixels(self.episode(index), rng)


class BankDataset(Dataset[EpisodeBatch]):
    """Episodes over features that are kept; every visit asks with other options.

    bank: features (V, 9, C) fp16 of each whole episode of `source`. sketch: batches of drills,
    and of sketched episodes against forgetting. mix: share of batches of each kind, in the order
    of KINDS; sketch_share: of batches that `sketch` gives beside.
    """

    def __init__(
        self,
        source: PixelDataset,
        bank: list[NDArray[np.float16]],
        sketch: SketchDataset,
        mix: tuple[float, ...] = (0.15, 0.08, 0.13, 0.16, 0.18, 0.3),
        sketch_share: float = 0.15,
    ) -> None:
        self.source, self.bank, self.sketch = source, bank, sketch
        self.sketch_share = sketch_share
        wholes = [source.episode(index) for index in range(len(bank))]
        self.rounds = [np.array(whole.rounds) for whole in wholes]
        self.serving = {
            kind: [i for i, whole in enumerate(wholes) if _serves(kind, whole.stages)]
            for kind in KINDS
        }
        shares = np.array([p if self.serving[k] else 0 for k, p in zip(KINDS, mix, strict=True)])
        self.mix = shares / shares.sum()

    def __getitem__(self, index: int) -> EpisodeBatch:
        rng = np.random.default_rng([self.source.seed, index, 4])
        kind = KINDS[int(rng.choice(len(KINDS), p=self.mix))]
        if kind == "drill" or rng.random() < self.sketch_share:
            return self.sketch.batch(index, kind)
        episodes: list[Episode] = []
        features: list[FloatArray] = []
        num_rounds, skip_rounds = _ROUNDS[kind]
        for _ in range(max(1, self.sketch.num_tokens // _TOKENS[kind])):
            chosen = int(rng.choice(self.serving[kind]))
            rounds = self.rounds[chosen]
            kept = (skip_rounds <= rounds) & (rounds < num_rounds)
            episodes.append(self.source.episode(chosen, kind, int(rng.integers(_SEEDS))))
            features.append(self.bank[chosen].astype(np.float32)[kept])
        labels = [episode_labels(episode) for episode in episodes]
        return collate(episodes, features, labels, self.source.factory.words)
