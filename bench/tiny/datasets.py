"""What the stages train on: batch i of each data set is a function of (seed, i)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tiny.episodes import Episode, make_drill, make_episode
from tiny.features import episode_labels, episode_pixels, sketch_features
from tiny.language_stage import EpisodeBatch, PromptWords, collate
from tiny.views import FloatArray, ViewBatch, make_view_batch
from vtts_rt.config import ResolvedPerception
from vtts_rt.data.needle import make_scene
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.perception.prompts import PromptTemplates

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
    perception: ResolvedPerception
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
                perception=self.perception,
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
        rng = np.random.default_rng([self.seed, index, 0])
        return self.batch(index, KINDS[int(rng.choice(len(KINDS), p=self.mix))])

    def batch(self, index: int, kind: Kind) -> EpisodeBatch:
        """Batch `index` if it is one of `kind`."""
        rng = np.random.default_rng([self.seed, index, 1])
        episodes: list[Episode] = []
        while len(episodes) < max(1, self.num_tokens // _TOKENS[kind]):
            seeds = (int(n) for n in rng.integers(_SEEDS, size=4))
            episode = self.factory.make(kind, *seeds)
            if episode.verdicts:  # none where an earlier round that is left out lost the card
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
        scene_seed, card, seed = (int(n) for n in rng.integers(_SEEDS, size=3))
        return self.factory.make(kind, scene_seed, card, seed, question_seed)

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
        mix: tuple[float, ...] = (0.2, 0.08, 0.12, 0.24, 0.36),
        sketch_share: float = 0.15,
    ) -> None:
        self.source, self.bank, self.sketch = source, bank, sketch
        self.mix, self.sketch_share = mix, sketch_share

    def __getitem__(self, index: int) -> EpisodeBatch:
        rng = np.random.default_rng([self.source.seed, index, 4])
        kind = KINDS[int(rng.choice(len(KINDS), p=self.mix))]
        if kind == "drill" or rng.random() < self.sketch_share:
            return self.sketch.batch(index, "drill" if kind == "drill" else "whole")
        num = max(1, self.sketch.num_tokens // _TOKENS[kind])
        episodes: list[Episode] = []
        features: list[FloatArray] = []
        while len(episodes) < num:
            chosen = int(rng.integers(len(self.bank)))
            whole = self.source.episode(chosen)
            asked = self.source.episode(chosen, kind, int(rng.integers(_SEEDS)))
            if not asked.verdicts:
                continue
            found = self.bank[chosen].astype(np.float32)
            if kind != "whole":
                found = found[np.array(whole.rounds) == _ROUNDS[kind][1]]
            episodes.append(asked)
            features.append(found)
        labels = [episode_labels(episode) for episode in episodes]
        return collate(episodes, features, labels, self.source.factory.words)
