"""What the stages train on: batch i of each data set is a function of (seed, i)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from vtts_rt.config import PerceptionConfig
from vtts_rt.data.needle import make_scene
from vtts_rt.data.views import FloatArray, ViewBatch, make_view_batch
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.train.episodes import Episode, make_drill, make_episode
from vtts_rt.train.features import episode_labels, episode_pixels, sketch_features
from vtts_rt.train.language_stage import EpisodeBatch, PromptWords, collate

Kind = Literal["drill", "first", "second", "third", "whole"]
KINDS: tuple[Kind, ...] = ("drill", "first", "second", "third", "whole")
# Tokens of an episode of each kind, about; batches hold the same number of tokens.
_TOKENS = {"drill": 60, "first": 250, "second": 270, "third": 250, "whole": 600}
_ROUNDS = {"first": (1, 0), "second": (2, 1), "third": (3, 2), "whole": (3, 0)}
_SEEDS = 1 << 40


class ViewDataset(Dataset[ViewBatch]):
    """Random views of training scenes, `size` a batch."""

    def __init__(self, seed: int, size: int = 96) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> ViewBatch:
        return make_view_batch(self.seed, index, self.size)


@dataclass
class EpisodeFactory:
    """Makes episodes of the embedded model's settings."""

    tokenizer: Tokenizer
    perception: PerceptionConfig
    templates: PromptTemplates
    words: PromptWords = field(init=False)

    def __post_init__(self) -> None:
        self.words = PromptWords(self.tokenizer)

    def make(
        self, kind: Kind, scene_seed: int, card: int, seed: int, question_seed: int
    ) -> Episode:
        """One episode; `card` counts modulo the scene's cards."""
        scene = make_scene(scene_seed, "train")
        card %= len(scene.cards)
        if kind == "drill":
            return make_drill(
                scene,
                card,
                tokenizer=self.tokenizer,
                templates=self.templates,
                question_seed=question_seed,
            )
        num_rounds, skip_rounds = _ROUNDS[kind]
        return make_episode(
            scene,
            card,
            tokenizer=self.tokenizer,
            perception=self.perception,
            templates=self.templates,
            seed=seed,
            question_seed=question_seed,
            num_rounds=num_rounds,
            skip_rounds=skip_rounds,
            jitter=0.0 if kind == "first" else 0.5,
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
        mix: tuple[float, ...] = (0.15, 0.2, 0.15, 0.2, 0.3),
    ) -> None:
        self.factory, self.matrix, self.seed = factory, matrix, seed
        self.num_tokens, self.mix = num_tokens, mix

    def __getitem__(self, index: int) -> EpisodeBatch:
        rng = np.random.default_rng([self.seed, index, 1])
        kind = KINDS[int(rng.choice(len(KINDS), p=self.mix))]
        episodes = []
        while len(episodes) < self.num_tokens // _TOKENS[kind]:
            seeds = (int(n) for n in rng.integers(_SEEDS, size=4))
            episode = self.factory.make(kind, *seeds)
            if episode.verdicts:  # none where an earlier round that is left out lost the card
                episodes.append(episode)
        labels = [episode_labels(episode) for episode in episodes]
        features = [sketch_features(found, self.matrix, rng) for found in labels]
        return collate(episodes, features, labels, self.factory.words)


class PixelDataset(Dataset[tuple[int, np.ndarray]]):
    """Views of whole episodes, drawn: what a frozen tower encodes once."""

    def __init__(self, factory: EpisodeFactory, seed: int) -> None:
        self.factory, self.seed = factory, seed

    def episode(self, index: int, question_seed: int = 0) -> Episode:
        """Episode `index`; its frames do not depend on question_seed."""
        rng = np.random.default_rng([self.seed, index, 2])
        scene_seed, card, seed = (int(n) for n in rng.integers(_SEEDS, size=3))
        return self.factory.make("whole", scene_seed, card, seed, question_seed)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng([self.seed, index, 3])
        return index, episode_pixels(self.episode(index), rng)


class BankDataset(Dataset[EpisodeBatch]):
    """Whole episodes over features that are kept; every visit asks with other options.

    bank: features (V, 9, C) fp16 of each episode of `source`.
    """

    def __init__(
        self, source: PixelDataset, bank: list[np.ndarray], seed: int, num_tokens: int = 7000
    ) -> None:
        self.source, self.bank, self.seed = source, bank, seed
        self.size = num_tokens // _TOKENS["whole"]

    def __getitem__(self, index: int) -> EpisodeBatch:
        per_epoch = len(self.bank) // self.size
        epoch, place = divmod(index, per_epoch)
        order = np.random.default_rng([self.seed, epoch, 4]).permutation(len(self.bank))
        chosen = order[place * self.size : (place + 1) * self.size]
        episodes = [self.source.episode(int(i), question_seed=epoch) for i in chosen]
        features = [self.bank[int(i)].astype(np.float32) for i in chosen]
        labels = [episode_labels(episode) for episode in episodes]
        return collate(episodes, features, labels, self.source.factory.words)
