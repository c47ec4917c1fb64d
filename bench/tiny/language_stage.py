"""Stage `language`: the language model on episodes, over features of single frame pairs.

Beside the text, linear probes on the hidden states of vision tokens ask for what the answer
will need: where in the view, at what time, does the card have the asked colour. They turn
circuits that would take tens of thousands of clips to appear into a few thousand, and are
thrown away afterwards.

Shape letters: B episodes, L tokens of the longest, V vision tokens of all, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tiny.episodes import Episode
from tiny.views import (
    COLOUR_INDEX,
    GRID,
    MARK_INDEX,
    NUM_CARDS,
    NUM_MARKS,
    TOKENS,
    ViewBatch,
)
from vtts_rt.models.base import ForwardBatch, VideoLM, VisionRows
from vtts_rt.models.tokenizer import Tokenizer

MAX_SECONDS = 64  # whole seconds that the time probe tells apart
_NOT_SCORED = -100


@dataclass
class EpisodeBatch:
    """Padded episodes.

    token_ids: (B, L); positions: (3, B, L); weights: (B, L) fp32. features: (V, C) fp32 and
    vision: (V,) their places in the flattened batch.
    Targets of the probes: seconds, tenths: (V,) time of the pair; asked: (V,) asked colour;
    match: (V,) 1 where a card of that colour covers the token; target: (V,) 1 where the token
    shows what the round is after; first: (V,) of those tokens, 1 in the first pair of the round
    that has one (-100 elsewhere); box: (V, 2) x0, y0 in tenths at the centre of what is looked
    for (-100 elsewhere); card_word: (B,) place of the word after the colour; option_ends: (4 B,)
    and option_cells: (4 B, 4) colours; reads: (R,) places where the pattern
    has to be known: the tag of the answer, and where it was seen the words of the thought;
    read_cells: (R, 4).
    For the skills: clue_starts: (K,) first tokens of the clues that are trained on, and
    clue_stages: (K,) 0 card, 1 mark, 2 read; letters: (M,) letters of reading rounds.
    """

    token_ids: Tensor
    positions: Tensor
    weights: Tensor
    features: Tensor
    vision: Tensor
    seconds: Tensor
    tenths: Tensor
    asked: Tensor
    match: Tensor
    target: Tensor
    first: Tensor
    box: Tensor
    card_word: Tensor
    option_ends: Tensor
    option_cells: Tensor
    reads: Tensor
    read_cells: Tensor
    clue_starts: Tensor
    clue_stages: Tensor
    letters: Tensor


class PromptWords:
    """Where in a needle prompt the words are that the probes look at."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.cards = {self._one(tokenizer, f" {name}"): i for name, i in COLOUR_INDEX.items()}
        self.marks = {self._one(tokenizer, f" {name}"): i for name, i in MARK_INDEX.items()}
        self.card = self._one(tokenizer, " card")
        self.newline = self._one(tokenizer, "\n")

    @staticmethod
    def _one(tokenizer: Tokenizer, text: str) -> int:
        (index,) = tokenizer.encode(text)
        return index

    def find(
        self, ids: Sequence[int], answers: Sequence[int], stages: Sequence[str], seen: bool
    ) -> tuple[int, list[int], list[list[int]], list[int], list[list[int]]]:
        """(card word, option ends, option cells, reads, read cells) of an episode."""
        card = list(ids).index(self.card)
        ends: list[int] = []
        cells: list[list[int]] = []
        at = card
        while len(ends) < 4:
            at = list(ids).index(self.newline, at + 1)
            if ids[at - 1] in self.marks:
                ends.append(at - 1)
                cells.append(self._pattern(ids, at))
        reads: list[int] = []
        read_cells: list[list[int]] = []
        for answer, stage in zip(answers, stages, strict=True):
            if stage == "read":
                # The tag of the answer, and what stands before each word of the thought.
                places = [answer - 1, *(answer - back for back in (8, 7, 6, 5, 4))]
                reads += places if seen else places[:1]
                read_cells += [self._pattern(ids, answer - 2)] * (len(places) if seen else 1)
        return card, ends, cells, reads, read_cells

    def _pattern(self, ids: Sequence[int], end: int) -> list[int]:
        """Colours of `w w / w w` that ends before `end`."""
        return [self.marks[int(ids[end - back])] for back in (5, 4, 2, 1)]


def collate(
    episodes: Sequence[Episode],
    features: Sequence[NDArray[np.float32]],
    labels: Sequence[ViewBatch],
    words: PromptWords,
) -> EpisodeBatch:
    """A batch of episodes. features: (pairs, 9, C) of each; labels: of its views."""
    length = max(len(e.weights) for e in episodes)
    num = len(episodes)
    ids = np.zeros((num, length), np.int64)
    positions = np.zeros((3, num, length), np.int64)
    weights = np.zeros((num, length), np.float32)
    lists: dict[str, list[object]] = {f.name: [] for f in fields(EpisodeBatch)}
    for row, episode in enumerate(episodes):
        shown, size = episode.transcript, len(episode.weights)
        ids[row, :size], weights[row, :size] = shown.token_ids, episode.weights
        positions[:, row, :size] = shown.position_ids
        base = row * length
        colour = COLOUR_INDEX[episode.scene.cards[episode.card].colour]
        for span in shown.spans:
            start = base + span.start
            lists["vision"] += range(start, start + TOKENS)
            whole, tenth = f"{span.segment.pairs[0].time_seconds:.1f}".split(".")
            lists["seconds"] += [min(int(whole), MAX_SECONDS - 1)] * TOKENS
            lists["tenths"] += [int(tenth)] * TOKENS
            lists["asked"] += [colour] * TOKENS
        lists["match"] += labels[row].cover[:, :, colour].ravel().tolist()
        target, first, box = _targets(episode, labels[row], colour)
        lists["target"] += target
        lists["first"] += first
        lists["box"] += box
        found = words.find(
            shown.token_ids.tolist(), episode.answers, episode.stages, bool(shown.spans)
        )
        lists["card_word"].append(base + found[0])
        lists["option_ends"] += [base + at for at in found[1]]
        lists["option_cells"] += found[2]
        lists["reads"] += [base + at for at in found[3]]
        lists["read_cells"] += found[4]
        for clue, answer, stage in zip(episode.clues, episode.answers, episode.stages, strict=True):
            if clue >= 0 and episode.weights[clue] == 1.0:
                lists["clue_starts"].append(base + clue)
                lists["clue_stages"].append(("card", "mark", "read").index(stage))
            if stage == "read":
                lists["letters"].append(base + answer)
    integer = {
        name: torch.tensor(values, dtype=torch.int64)
        for name, values in lists.items()
        if name not in ("token_ids", "positions", "weights", "features", "match", "target")
    }
    return EpisodeBatch(
        token_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        weights=torch.from_numpy(weights),
        features=torch.from_numpy(np.concatenate([f.reshape(-1, f.shape[-1]) for f in features])),
        match=torch.tensor(lists["match"], dtype=torch.float32),
        target=torch.tensor(lists["target"], dtype=torch.float32),
        **integer,
    )


def _targets(
    episode: Episode, labels: ViewBatch, colour: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """(target, first, box) of every vision token (see EpisodeBatch)."""
    num = len(episode.rounds)
    target = np.zeros((num, TOKENS), np.int64)
    first = np.full((num, TOKENS), _NOT_SCORED, np.int64)
    box = np.full((num, TOKENS, 2), _NOT_SCORED, np.int64)
    seen_rounds = set()
    for pair, index in enumerate(episode.rounds):
        verdict = episode.verdicts[index]
        if not verdict.seen:
            continue
        card = verdict.stage == "card"
        shown = (labels.cover if card else labels.mark)[pair, :, colour] > 0
        centre = (labels.centre if card else labels.mark)[pair, :, colour] > 0
        target[pair, shown] = 1
        first[pair, shown] = int(index not in seen_rounds)
        box[pair, centre] = verdict.box_tenths[:2]
        if shown.any():
            seen_rounds.add(index)
    return target.ravel().tolist(), first.ravel().tolist(), box.reshape(-1, 2).tolist()


class Probes(nn.Module):
    """Linear read-outs of hidden states after the first three layers."""

    SECOND = (NUM_CARDS, MAX_SECONDS, 10, 4 * NUM_MARKS, 4, 2)

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_channels, 2 * GRID + NUM_CARDS)
        self.second = nn.Linear(num_channels, sum(self.SECOND))
        self.third = nn.Linear(num_channels, 1 + 4 * NUM_MARKS + 20)

    def loss(
        self, hidden: Sequence[Tensor], batch: EpisodeBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """hidden: (B * L, C) after each of the first three layers."""
        ce = F.cross_entropy
        *_, cells, letter, _ = self.second(hidden[1][batch.option_ends]).split(self.SECOND, dim=-1)
        order = torch.arange(len(letter)) % 4
        loss = ce(letter, order) + ce(cells.reshape(-1, NUM_MARKS), batch.option_cells.flatten())
        skills = {"options": _share(cells.reshape(-1, NUM_MARKS), batch.option_cells.flatten())}
        if len(batch.reads):
            read = self.third(hidden[2][batch.reads])[:, 1:-20].reshape(-1, NUM_MARKS)
            loss = loss + ce(read, batch.read_cells.flatten())
            skills["recall"] = _share(read, batch.read_cells.flatten())
        if not len(batch.vision):
            return loss, skills
        place = torch.arange(len(batch.vision)) % TOKENS
        row, column = place // GRID, place % GRID
        seen = self.first(hidden[0][batch.vision])
        word = self.first(hidden[0][batch.card_word])[:, 2 * GRID :]
        asked = batch.asked[torch.searchsorted(batch.vision, batch.card_word)]
        loss = (
            loss + ce(seen[:, :GRID], row) + ce(seen[:, GRID : 2 * GRID], column) + ce(word, asked)
        )
        second = self.second(hidden[1][batch.vision]).split(self.SECOND, dim=-1)
        colour, seconds, tenths, _, _, flags = second
        loss = loss + ce(colour, batch.asked) + ce(seconds, batch.seconds)
        loss = loss + ce(tenths, batch.tenths)
        third = self.third(hidden[2][batch.vision])
        first, box = third[:, 0], third[:, -20:].reshape(-1, 10)
        weight = torch.tensor(5.0)  # one vision token in fifty shows the asked card
        bce = F.binary_cross_entropy_with_logits
        loss = loss + 2 * bce(flags[:, 0], batch.match, pos_weight=weight)
        loss = loss + 2 * bce(flags[:, 1], batch.target, pos_weight=weight)
        ordered = batch.first >= 0
        if ordered.any():
            loss = loss + 2 * bce(first[ordered], batch.first[ordered].float())
        boxed = batch.box.flatten() >= 0
        if boxed.any():
            loss = loss + ce(box[boxed], batch.box.flatten()[boxed])
        said = flags[:, 1] > 0
        both = (said & (batch.target > 0)).sum().item()
        total = int(said.sum() + batch.target.sum())
        skills |= {
            "row": _share(seen[:, :GRID], row),
            "column": _share(seen[:, GRID : 2 * GRID], column),
            "asked": _share(colour, batch.asked),
            "seconds": _share(seconds, batch.seconds),
            "box": _share(box[boxed], batch.box.flatten()[boxed]),
            "target": 2 * both / max(1, total),
            "first": float(((first > 0) == (batch.first > 0))[ordered].float().mean()),
        }
        return loss, skills


def _share(logits: Tensor, truth: Tensor) -> float:
    return float((logits.argmax(-1) == truth).float().mean())


def language_loss(
    model: VideoLM, probes: Probes, batch: EpisodeBatch
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(text loss, probe loss, accuracies by skill).

    Skills, as fractions of what is trained on with full weight: `when`, `where`: whole spans
    and boxes of a clue, suffixed by stage (card, mark, read); `letter`: of reading rounds.
    """
    num, length = batch.token_ids.shape
    hidden: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, out: hidden.append(out))
        for layer in list(model.language.layers)[:3]
    ]
    try:
        final = model(
            ForwardBatch(
                batch.token_ids.flatten(),
                VisionRows(batch.vision, batch.features),
                batch.positions.flatten(1),
                [length * i for i in range(num + 1)],
            )
        )
    finally:
        for hook in hooks:
            hook.remove()
    target = batch.token_ids.flatten().roll(-1)
    weight = batch.weights.flatten().roll(-1)
    scored = weight > 0
    logits = model.logits(final[scored])
    each = F.cross_entropy(logits, target[scored], reduction="none")
    text_loss = (each * weight[scored]).sum() / weight[scored].sum()
    probe_loss, skills = probes.loss(hidden, batch)
    right = torch.zeros(num * length, dtype=torch.bool)
    right[1:][scored[:-1]] = (logits.argmax(-1) == target[scored])[: int(scored[:-1].sum())]
    skills["loss"] = float(text_loss.detach())
    for index, stage in enumerate(("card", "mark", "read")):
        starts = batch.clue_starts[batch.clue_stages == index]
        if len(starts):
            spans = torch.stack([right[starts + k] for k in range(1, 6)])
            boxes = torch.stack([right[starts + k] for k in range(7, 18)])
            skills[f"when_{stage}"] = float(spans.all(0).float().mean())
            skills[f"where_{stage}"] = float(boxes.all(0).float().mean())
            skills[f"from_{stage}"] = float(spans[:2].all(0).float().mean())
    if len(batch.letters):
        skills["letter"] = float(right[batch.letters].float().mean())
        words = torch.stack([right[batch.letters - 1 - back] for back in (5 + 1, 5, 4, 3, 2)])
        skills["read"] = float(words.all(0).float().mean())
    return text_loss, probe_loss, skills
