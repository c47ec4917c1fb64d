"""Episodes: whole conversations of rounds about a needle scene, as token ids with labels.

Frames come from the frame policy and text from the prompt layout of the perception layer, so a
training sequence is token for token what the runtime shows. The answers are what an ideal
viewer would say of the views at hand: where the card is while only the card can be seen, where
the mark is once the mark can be seen, and what the mark shows once it can be read, without a clue,
which ends the rounds. Of two cards of the asked colour it looks at the first in reading order; a
view that shows nothing of use leads back to the whole frame, and there to the other card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tiny.views import MIN_MARK_PX, READABLE_PX
from vtts_rt.config import ResolvedPerception
from vtts_rt.data.needle import Card, Scene, grid_place, make_question, pattern_text
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer, encode_prompt
from vtts_rt.perception.clue import parse_clue
from vtts_rt.perception.dialect import TAGS, tagged
from vtts_rt.perception.plan import FramePlan, RoundHistory
from vtts_rt.perception.prompts import PromptTemplates
from vtts_rt.perception.strategy import build_prompt, plan_round
from vtts_rt.rounds.transcript import Transcript
from vtts_rt.types import Parity, PixelBox, Prompt, TimeSpan, VideoMetadata

Stage = Literal["card", "mark", "read", "blank", "lost"]
STAGES: tuple[Stage, ...] = ("card", "mark", "read", "blank", "lost")
# What is thought where nothing can be read.
THOUGHTS = {"card": "card", "mark": "mark", "blank": "none mark", "lost": "none card"}
MAX_ROUNDS = 5
CARD_BOX_TENTHS = 4  # side of the box around a card, in tenths of the view
MARK_BOX_TENTHS = 3  # side of the box around a mark
GUESS_WEIGHT = 0.1  # of the letter in rounds that cannot read: random labels are noise
LETTER_WEIGHT = 5.0  # of the letter in rounds that can: one token in forty, the last to be learnt
_FULL_VIEW = 0.8  # a view of this part of the frame's side shows cards, not small marks
_CARD_VIEW = 0.25  # a view of this part shows a whole card


@dataclass(frozen=True)
class Verdict:
    """What an ideal viewer says of a round: stage, times of the pairs that show it, box.

    box_tenths: (x0, y0, side) in tenths of the view. card: the one that it is about; of stage
    `blank` the one that shows no mark.
    """

    stage: Stage
    seen: tuple[float, ...] = ()
    box_tenths: tuple[int, int, int] = (0, 0, 0)
    card: Card | None = None


@dataclass
class Episode:
    """One conversation, as the runtime's transcript of it would be; L tokens, V vision segments.

    transcript: of the tokens `generated`, which are the labels; nothing drew them, so log-probs are
    NaN. weights: (L,) loss weight of predicting each token from those before it, 0 where it is not
    generated. rounds: of each vision segment, counted among the written ones. verdicts: the ideal
    viewer's, of each written round. answers: index of the letter in each round; clues: index of the
    first token of each round's clue (-1: none).
    """

    scene: Scene
    card: int
    transcript: Transcript
    weights: NDArray[np.float32]
    rounds: list[int]
    verdicts: list[Verdict]
    answers: list[int]
    clues: list[int]

    @property
    def stages(self) -> list[Stage]:
        return [verdict.stage for verdict in self.verdicts]


class _Writer:
    """Prompts and answers of a conversation, in order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown = EncodedPrompt([], (), np.zeros(0, np.uint8))
        self._generated: list[bool] = []
        self._weights: list[float] = []
        self._rounds: list[int] = []

    def prompt(self, prompt: Prompt, round_index: int) -> None:
        """A round's prompt. A later one begins with the end token of the answer before it."""
        encoded = encode_prompt(self._tokenizer, prompt)
        self._shown += encoded
        num_ends = min(len(self._weights), 1)
        self._add(num_ends, 1.0)
        self._add(len(encoded) - num_ends, 0.0, generated=False)
        self._rounds += [round_index] * len(encoded.spans)

    def said(self, text: str, weight: float = 1.0) -> int:
        """What the model says, with one loss weight; returns where it begins."""
        begin, ids = len(self._shown), self._tokenizer.encode(text)
        self._shown = self._shown.extended(ids)
        self._add(len(ids), weight)
        return begin

    def _add(self, num_tokens: int, weight: float, generated: bool = True) -> None:
        self._generated += [generated] * num_tokens
        self._weights += [weight] * num_tokens

    def episode(
        self,
        scene: Scene,
        card: int,
        parity: Parity,
        verdicts: list[Verdict],
        answers: list[int],
        clues: list[int],
    ) -> Episode:
        transcript = Transcript(
            np.array(self._shown.token_ids, np.int64),
            np.array(self._generated, bool),
            np.full(len(self._shown), np.nan),
            self._shown.spans,
            build_position_ids(self._shown, MropePositions(parity, 2.0)).numpy(),
            0,
            parity,
        )
        weights = np.array(self._weights, np.float32)
        return Episode(scene, card, transcript, weights, self._rounds, verdicts, answers, clues)


def scene_metadata(scene: Scene) -> VideoMetadata:
    """What an opened clip of the scene would say of itself."""
    return VideoMetadata(
        video_id=f"needle-{scene.split}-{scene.seed}",
        num_frames=scene.num_frames,
        source_fps=scene.source_fps,
        duration_seconds=scene.duration_seconds,
        height=scene.height,
        width=scene.width,
        decoder="needle",
        timestamps_seconds=np.arange(scene.num_frames) / scene.source_fps,
    )


def judge(scene: Scene, colour: str, plan: FramePlan, left: Sequence[Card] = ()) -> Verdict:
    """The ideal viewer: looks at what the views show, knows nothing else.

    left: cards that an earlier round came back from, since they showed no mark.
    """
    view = plan.views[0]
    part = (view.box.x1 - view.box.x0) / scene.width
    cards = [card for card in scene.all_cards if card.colour == colour]
    cards.sort(key=lambda card: grid_place(card.box, scene.width))
    for card in cards:
        mark, seen = card.mark_box, _seen(scene, plan, card.mark_span)
        width_px = (mark.x1 - mark.x0) / (view.box.x1 - view.box.x0) * view.resized_hw[1]
        if not seen or width_px < MIN_MARK_PX or not _inside(view.box, mark):
            continue
        whole = view.box.x0 <= mark.x0 and mark.x1 <= view.box.x1
        whole = whole and view.box.y0 <= mark.y0 and mark.y1 <= view.box.y1
        box = box_tenths(view.box, mark, MARK_BOX_TENTHS)
        return Verdict("read" if whole and width_px >= READABLE_PX else "mark", seen, box, card)
    shown = [card for card in cards if _inside(view.box, card.box)]
    shown = [card for card in shown if _seen(scene, plan, card.span)]
    if not shown or part < _CARD_VIEW:
        return Verdict("lost")
    card = next((card for card in shown if card not in left), shown[-1])
    seen = _seen(scene, plan, card.span)
    if part < _FULL_VIEW:
        return Verdict("blank", seen, card=card)
    return Verdict("card", seen, box_tenths(view.box, card.box, CARD_BOX_TENTHS), card)


def _seen(scene: Scene, plan: FramePlan, span: TimeSpan) -> tuple[float, ...]:
    """Times of the pairs with a frame inside the span."""
    return tuple(
        segment.pairs[0].time_seconds
        for segment in plan.segments
        if any(_shows(span, frame / scene.source_fps) for frame in segment.frame_indices)
    )


def _inside(view: PixelBox, target: PixelBox) -> bool:
    """Whether the view shows the middle of the target."""
    x, y = (target.x0 + target.x1) / 2, (target.y0 + target.y1) / 2
    return view.x0 <= x < view.x1 and view.y0 <= y < view.y1


def _shows(span: TimeSpan, time_seconds: float) -> bool:
    return span.start_seconds <= time_seconds + 5e-7 < span.end_seconds


def box_tenths(view: PixelBox, target: PixelBox, side: int) -> tuple[int, int, int]:
    """(x0, y0, side) of the box about a target, in tenths of the view."""
    x = ((target.x0 + target.x1) / 2 - view.x0) / (view.x1 - view.x0)
    y = ((target.y0 + target.y1) / 2 - view.y0) / (view.y1 - view.y0)
    x0, y0 = (int(np.clip(round(10 * v - side / 2), 0, 10 - side)) for v in (x, y))
    return x0, y0, side


def clue_text(
    start_seconds: float, end_seconds: float, box_tenths: tuple[int, int, int] | None = None
) -> str:
    """`[(8.0, 12.0)] [0.2, 0.4, 0.6, 0.8]`; times are those of labels, to be copied. None: no box,
    which asks for the whole frame."""
    if box_tenths is None:
        return f"[({start_seconds:.1f}, {end_seconds:.1f})]"
    x, y, side = box_tenths
    box = ", ".join(f"{v / 10:.1f}" for v in (x, y, x + side, y + side))
    return f"[({start_seconds:.1f}, {end_seconds:.1f})] [{box}]"


def _jittered(
    rng: np.random.Generator, plan: FramePlan, verdict: Verdict, miss: bool
) -> tuple[float, float, tuple[int, int, int]]:
    """A clue that is off by about a step, as a model's own would be; miss: its box is elsewhere."""
    times = [segment.pairs[0].time_seconds for segment in plan.segments]
    first, last = times.index(verdict.seen[0]), times.index(verdict.seen[-1])
    if rng.random() < 0.4:
        first = int(np.clip(first + rng.integers(-1, 2), 0, len(times) - 1))
    if rng.random() < 0.4:
        last = int(np.clip(last + rng.integers(-1, 2), 0, len(times) - 1))
    x, y, side = verdict.box_tenths
    to_x, to_y = (int(np.clip(v + rng.integers(-1, 2), 0, 10 - side)) for v in (x, y))
    while miss and max(abs(to_x - x), abs(to_y - y)) < side - 1:
        to_x, to_y = (int(v) for v in rng.integers(0, 11 - side, 2))
    return times[first], times[max(first, last)], (to_x, to_y, side)


def make_episode(
    scene: Scene,
    card: int,
    *,
    tokenizer: Tokenizer,
    perception: ResolvedPerception,
    templates: PromptTemplates,
    seed: int,
    question_seed: int = 0,
    num_rounds: int = MAX_ROUNDS,
    skip_rounds: int = 0,
    jitter: float = 0.5,
    miss: float = 0.1,
) -> Episode:
    """A conversation of up to `num_rounds` rounds about one card of a scene.

    jitter: share of rounds whose clue is off by a step, shown but not trained on, so that the
    rounds after it see what a model's own clues lead to; miss: share of those whose box is
    elsewhere. A round that reads ends the episode. skip_rounds: rounds that are planned but left
    out of the text, so that a later round stands alone: a short drill of one skill (nothing is
    written if an earlier round ends the episode). seed: decides the jitter and with it the frames;
    question_seed: the options and their order.
    """
    rng = np.random.default_rng([scene.seed, card, seed])
    asked = scene.cards[card]
    question = make_question(scene, card, question_seed)
    metadata = scene_metadata(scene)
    writer = _Writer(tokenizer)
    history: list[RoundHistory] = []
    left: list[Card] = []
    span = (0.0, 0.0)
    verdicts: list[Verdict] = []
    answers: list[int] = []
    clues: list[int] = []
    for index in range(num_rounds):
        plan = plan_round("append", perception, [metadata], history, index)
        if plan.empty:
            break
        verdict = judge(scene, asked.colour, plan, left)
        text, off, misses = "", bool(rng.random() < jitter), bool(rng.random() < miss)
        off = off and verdict.stage in ("card", "mark")
        if verdict.stage in ("card", "mark"):
            first, last, box = verdict.seen[0], verdict.seen[-1], verdict.box_tenths
            if off:
                first, last, box = _jittered(rng, plan, verdict, misses)
            span, text = (first, last), clue_text(first, last, box)
        elif verdict.stage != "read":  # the whole frame again, at the same time
            text = clue_text(*span)
            left += [verdict.card] if verdict.card is not None else []
        written = history[skip_rounds:]
        history.append(RoundHistory(plan, parse_clue(tagged("glue", text))))
        if index < skip_rounds:
            if not text:
                break
            continue
        prompt = build_prompt(
            replace(perception, max_rounds=num_rounds),
            tokenizer.chat,
            templates,
            plan,
            written,
            question=question.text,
            options=question.options,
        )
        writer.prompt(prompt, len(verdicts))
        thought = THOUGHTS.get(verdict.stage, pattern_text(asked.pattern))
        writer.said(tagged("think", f" {thought}") + TAGS["answer"][0])
        weight = LETTER_WEIGHT if verdict.stage == "read" else GUESS_WEIGHT
        answers.append(writer.said(chr(65 + question.answer), weight))
        writer.said(TAGS["answer"][1] + TAGS["glue"][0])
        verdicts.append(verdict)
        clues.append(writer.said(text, 0.0 if off else 1.0) if text else -1)
        writer.said(TAGS["glue"][1])
        if not text:
            break
    if verdicts:
        writer.said(tokenizer.chat.end_of_turn)
    return writer.episode(scene, card, perception.parity, verdicts, answers, clues)


def make_drill(
    scene: Scene,
    card: int,
    *,
    tokenizer: Tokenizer,
    perception: ResolvedPerception,
    templates: PromptTemplates,
    question_seed: int,
) -> Episode:
    """Text only: the pattern is in the thought, the letter of its option has to follow."""
    question = make_question(scene, card, question_seed)
    writer = _Writer(tokenizer)
    prompt = build_prompt(
        replace(perception, max_rounds=1),
        tokenizer.chat,
        templates,
        FramePlan(0, (), (), (), 1.0, ()),
        (),
        question=question.text,
        options=question.options,
    )
    writer.prompt(prompt, 0)
    thought = tagged("think", f" {pattern_text(scene.cards[card].pattern)}")
    writer.said(thought + TAGS["answer"][0], 0.0)
    answers = [writer.said(chr(65 + question.answer), LETTER_WEIGHT)]
    return writer.episode(scene, card, "transformers", [Verdict("read")], answers, [-1])
