"""Stage `language`: the language model on episodes, over features of single frame pairs.

Beside the text, linear probes on the hidden states of vision tokens ask for what the answer
will need: where in the view, at what time, does the card have the asked colour. They turn
circuits that would take tens of thousands of clips to appear into a few thousand, and are
thrown away afterwards.

Shape letters: B episodes, N tokens and V vision tokens of all, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tiny.episodes import CARD_BOX_TENTHS, STAGES, Episode, Stage, box_tenths
from tiny.views import (
    COLOUR_INDEX,
    GRID,
    MARK_INDEX,
    NUM_CARDS,
    NUM_MARKS,
    TOKENS,
    ViewBatch,
)
from vtts_rt.data.needle import grid_place
from vtts_rt.models.base import ForwardBatch, VideoLM, VisionRows
from vtts_rt.models.tokenizer import Tokenizer

MAX_SECONDS = 64  # whole seconds that the time probe tells apart
CLUES = ("card", "mark", "again", "none")  # again: a card, of a later look at the whole frame
_NOT_SCORED = -100


@dataclass
class EpisodeBatch:
    """Packed episodes.

    seqlens: tokens of each. token_ids: (N,); positions: (3, N); weights: (N,) fp32. features:
    (V, C) fp32 and vision: (V,) their places.
    Targets of the probes: seconds, tenths: (V,) time of the pair; asked: (V,) asked colour;
    match: (V,) 1 where a card of that colour covers the token; target: (V,) 1 where the token
    shows what the round is after, or its twin; first: (V,) of those tokens, 1 in the first pair of
    the round that has one (-100 elsewhere); second: (V,) of the middles of cards that a round is
    after, 1 where an earlier token of the pair has one; box: (V, 2) x0, y0 in tenths at the centre
    of what is looked for (-100 elsewhere); card_word: (B,) place of the word after the colour;
    option_ends: (4 B,) and option_cells: (4 B, 4) colours; reads: (R,) places where the pattern
    has to be known: the tag of the answer, and where it was seen the words of the thought;
    read_cells: (R, 4); boxed: (P,) places where a digit of a card's box comes next, and came_back:
    (P,) 1 if an earlier round saw a card without a mark.
    For the skills: clue_starts: (K,) first tokens of the clues that are trained on, and clue_kinds:
    (K,) of CLUES; answers: (A,) letters, and answer_stages: (A,) of STAGES.
    """

    seqlens: list[int]
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
    second: Tensor
    box: Tensor
    card_word: Tensor
    option_ends: Tensor
    option_cells: Tensor
    reads: Tensor
    read_cells: Tensor
    boxed: Tensor
    came_back: Tensor
    clue_starts: Tensor
    clue_kinds: Tensor
    answers: Tensor
    answer_stages: Tensor


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
    lists: dict[str, list[Any]] = {f.name: [] for f in fields(EpisodeBatch)}
    base = 0
    for episode, found in zip(episodes, labels, strict=True):
        shown = episode.transcript
        lists["seqlens"].append(len(shown.token_ids))
        lists["token_ids"] += shown.token_ids.tolist()
        colour = COLOUR_INDEX[episode.scene.cards[episode.card].colour]
        for span in shown.spans:
            lists["vision"] += range(base + span.start, base + span.start + TOKENS)
            whole, tenth = f"{span.segment.pairs[0].time_seconds:.1f}".split(".")
            lists["seconds"] += [min(int(whole), MAX_SECONDS - 1)] * TOKENS
            lists["tenths"] += [int(tenth)] * TOKENS
            lists["asked"] += [colour] * TOKENS
        lists["match"] += found.cover[:, :, colour].ravel().tolist()
        for name, values in _targets(episode, found, colour).items():
            lists[name] += values
        words_found = words.find(
            shown.token_ids.tolist(), episode.answers, episode.stages, bool(shown.spans)
        )
        lists["card_word"].append(base + words_found[0])
        lists["option_ends"] += [base + at for at in words_found[1]]
        lists["option_cells"] += words_found[2]
        lists["reads"] += [base + at for at in words_found[3]]
        lists["read_cells"] += words_found[4]
        came_back = False
        for index, (clue, stage) in enumerate(zip(episode.clues, episode.stages, strict=True)):
            lists["answers"].append(base + episode.answers[index])
            lists["answer_stages"].append(STAGES.index(stage))
            if stage == "card":  # `[(a.b, c.d)] [x.x, y.y`
                lists["boxed"] += [base + clue + 7, base + clue + 10]
                lists["came_back"] += [int(came_back)] * 2
            if clue >= 0 and episode.weights[clue] == 1.0:
                lists["clue_starts"].append(base + clue)
                lists["clue_kinds"].append(CLUES.index(_clue_kind(stage, index)))
            came_back |= stage == "blank"
        base += len(shown.token_ids)
    arrays: dict[str, Any] = {
        "seqlens": lists["seqlens"],
        "positions": torch.from_numpy(
            np.concatenate([e.transcript.position_ids for e in episodes], axis=1)
        ),
        "weights": torch.from_numpy(np.concatenate([e.weights for e in episodes])),
        "features": torch.from_numpy(
            np.concatenate([f.reshape(-1, f.shape[-1]) for f in features])
        ),
    }
    kinds = {"match": torch.float32, "target": torch.float32}
    for name in lists.keys() - arrays.keys():
        arrays[name] = torch.tensor(lists[name], dtype=kinds.get(name, torch.int64))
    return EpisodeBatch(**arrays)


def _clue_kind(stage: Stage, index: int) -> str:
    if stage == "card":
        return "again" if index else "card"
    return "mark" if stage == "mark" else "none"


def _targets(episode: Episode, labels: ViewBatch, colour: int) -> dict[str, list[Any]]:
    """target, first, second, box of every vision token (see EpisodeBatch)."""
    num = len(episode.rounds)
    target = np.zeros((num, TOKENS), np.int64)
    first, second = (np.full((num, TOKENS), _NOT_SCORED, np.int64) for _ in range(2))
    box = np.full((num, TOKENS, 2), _NOT_SCORED, np.int64)
    seen_rounds = set()
    cards = [c for c in episode.scene.all_cards if COLOUR_INDEX[c.colour] == colour]
    cards.sort(key=lambda card: grid_place(card.box, episode.scene.width))
    for pair, index in enumerate(episode.rounds):
        verdict = episode.verdicts[index]
        if verdict.stage not in ("card", "mark", "read"):
            continue
        card = verdict.stage == "card"
        shown = (labels.cover if card else labels.mark)[pair, :, colour] > 0
        centre = (labels.centre if card else labels.mark)[pair, :, colour] > 0
        target[pair, shown] = 1
        first[pair, shown] = int(index not in seen_rounds)
        places = np.flatnonzero(centre)
        if card:  # at most one a token, in reading order
            second[pair, places] = np.arange(len(places))
            view = episode.transcript.spans[pair].segment.box
            for place, found in zip(places, cards, strict=False):
                box[pair, place] = box_tenths(view, found.box, CARD_BOX_TENTHS)[:2]
        else:
            box[pair, places] = verdict.box_tenths[:2]
        if shown.any():
            seen_rounds.add(index)
    return {
        "target": target.ravel().tolist(),
        "first": first.ravel().tolist(),
        "second": second.ravel().tolist(),
        "box": box.reshape(-1, 2).tolist(),
    }


class Probes(nn.Module):
    """Linear read-outs of hidden states after the first three layers."""

    SECOND = (NUM_CARDS, MAX_SECONDS, 10, 4 * NUM_MARKS, 4, 3)
    THIRD = (2, 4 * NUM_MARKS, 20)

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_channels, 2 * GRID + NUM_CARDS)
        self.second = nn.Linear(num_channels, sum(self.SECOND))
        self.third = nn.Linear(num_channels, sum(self.THIRD))

    def loss(
        self, hidden: Sequence[Tensor], batch: EpisodeBatch
    ) -> tuple[Tensor, dict[str, float]]:
        """hidden: (N, C) after each of the first three layers."""
        ce, bce = F.cross_entropy, F.binary_cross_entropy_with_logits
        *_, cells, letter, _ = self.second(hidden[1][batch.option_ends]).split(self.SECOND, dim=-1)
        order = torch.arange(len(letter)) % 4
        loss = ce(letter, order) + ce(cells.reshape(-1, NUM_MARKS), batch.option_cells.flatten())
        skills = {"options": _share(cells.reshape(-1, NUM_MARKS), batch.option_cells.flatten())}
        if len(batch.reads):
            _, read, _ = self.third(hidden[2][batch.reads]).split(self.THIRD, dim=-1)
            read = read.reshape(-1, NUM_MARKS)
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
        orders, _, box = third.split(self.THIRD, dim=-1)
        box = box.reshape(-1, 10)
        weight = torch.tensor(5.0)  # one vision token in fifty shows the asked card
        loss = loss + 2 * bce(flags[:, 0], batch.match, pos_weight=weight)
        loss = loss + 2 * bce(flags[:, 1], batch.target, pos_weight=weight)
        for index, name in enumerate(("first", "second")):
            truth = getattr(batch, name)
            said, truth = orders[truth >= 0, index], truth[truth >= 0]
            if len(truth):
                loss = loss + 2 * bce(said, truth.float())
                skills[name] = float(((said > 0) == (truth > 0)).float().mean())
        if len(batch.boxed):
            said = self.second(hidden[1][batch.boxed])[:, -1]
            loss = loss + bce(said, batch.came_back.float())
            skills["came_back"] = float(((said > 0) == (batch.came_back > 0)).float().mean())
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
        }
        return loss, skills


def _share(logits: Tensor, truth: Tensor) -> float:
    return float((logits.argmax(-1) == truth).float().mean())


def language_loss(
    model: VideoLM, probes: Probes, batch: EpisodeBatch
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(text loss, probe loss, accuracies by skill).

    Skills, as fractions of what is trained on with full weight: `when`, `where`: whole spans
    and boxes of a clue, suffixed by its kind; `thought`, suffixed by stage; `read` and `letter`:
    thought and letter of reading rounds.
    """
    hidden: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, out: hidden.append(out))
        for layer in list(model.language.layers)[:3]
    ]
    try:
        final = model(
            ForwardBatch(
                batch.token_ids,
                VisionRows(batch.vision, batch.features),
                batch.positions,
                [0, *accumulate(batch.seqlens)],
            )
        )
    finally:
        for hook in hooks:
            hook.remove()
    target = batch.token_ids.roll(-1)
    weight = batch.weights.roll(-1)
    scored = weight > 0
    logits = model.logits(final[scored])
    each = F.cross_entropy(logits, target[scored], reduction="none")
    text_loss = (each * weight[scored]).sum() / weight[scored].sum()
    probe_loss, skills = probes.loss(hidden, batch)
    right = torch.zeros(len(target), dtype=torch.bool)
    right[scored.nonzero()[:, 0] + 1] = logits.argmax(-1) == target[scored]
    skills["loss"] = float(text_loss.detach())

    def share(places: Tensor, *offsets: int) -> float:
        return float(torch.stack([right[places + k] for k in offsets]).all(0).float().mean())

    for index, kind in enumerate(CLUES):
        starts = batch.clue_starts[batch.clue_kinds == index]
        if len(starts):
            skills[f"when_{kind}"] = share(starts, *range(1, 6))
            # The whole frame is a clue that ends after its spans.
            skills[f"where_{kind}"] = share(starts, *((6,) if kind == "none" else range(6, 18)))
    for index, stage in enumerate(STAGES):
        places = batch.answers[batch.answer_stages == index]
        if not len(places):
            continue
        if stage == "read":
            skills["letter"] = share(places, 0)
            skills["read"] = share(places, -7, -6, -5, -4, -3)
        else:
            skills[f"thought_{stage}"] = share(places, -4, -3)
    return text_loss, probe_loss, skills
