"""needle for every task type: a balanced set of clips and pictures with spans, boxes and letters.

- tg: when does a card show; gqa: the pattern on a card, with the time of its mark and its box;
  mc: which card shows first.
- igqa: the pattern on a card of a picture, with its box; detection: where is a card in a picture.
- tracking: where is a moving card in eight frames.

Scenes are those of data/needle.py; tracking adds two cards that move to the start of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from vtts_rt.data.backgrounds import Image
from vtts_rt.data.needle import (
    CARD_COLOURS,
    SPLITS,
    Card,
    Question,
    Scene,
    Split,
    draw_card,
    make_question,
    make_scene,
    needle_row,
    normalised,
    write_clip,
)
from vtts_rt.data.row import NUM_TRACKED
from vtts_rt.data.rows import TASKS, DataSet, Row, write_manifest, write_rows
from vtts_rt.types import PixelBox, TimeSpan, require

NUM_OPTIONS = 4
MAX_PER_TASK = 100_000
TRACKING_SECONDS = (6.0, 9.0)
FIRST_BY_SECONDS = 0.5  # by which the first card of an mc question comes before the second


@dataclass(frozen=True, slots=True)
class Mover:
    """A card without a mark on a closed curve, always in the frame.

    card: its colour and shade. size: px a side; centre, reach: (y, x) px; phase: radians; speed:
    radians a second.
    """

    card: Card
    size: int
    centre: tuple[float, float]
    reach: tuple[float, float]
    phase: tuple[float, float]
    speed: tuple[float, float]

    def box(self, time_seconds: float) -> PixelBox:
        """Where it is at a moment, on even px, as chroma samples are."""
        y0, x0 = (
            2 * round((c + r * math.sin(p + s * time_seconds) - self.size / 2) / 2)
            for c, r, p, s in zip(self.centre, self.reach, self.phase, self.speed, strict=True)
        )
        return PixelBox(x0, y0, x0 + self.size, y0 + self.size)


@dataclass(frozen=True)
class MovingScene(Scene):
    """A scene with cards that move in front of the others; the last one is in front of all."""

    movers: tuple[Mover, ...] = ()

    def render(self, time_seconds: float, box: PixelBox | None = None) -> Image:
        box = box or PixelBox(0, 0, self.width, self.height)
        view = super().render(time_seconds, box)
        for mover in self.movers:
            draw_card(view, box, replace(mover.card, box=mover.box(time_seconds)), False)
        return view


def make_moving_scene(
    seed: int, split: Split = "train", footage: bool | None = None
) -> MovingScene:
    """The first seconds of `make_scene(seed)`, with two moving cards of colours of their own."""
    scene = make_scene(seed, split, footage)
    rng = np.random.default_rng([SPLITS.index(split), seed, 7])
    taken = {card.colour for card in scene.cards}
    colours = rng.permutation([name for name in CARD_COLOURS if name not in taken])[:2]
    given = {field.name: getattr(scene, field.name) for field in fields(Scene)}
    given["num_frames"] = int(rng.uniform(*TRACKING_SECONDS) * scene.source_fps)
    movers = tuple(_mover(rng, str(colour), scene) for colour in colours)
    return MovingScene(**given, movers=movers)


def _mover(rng: np.random.Generator, colour: str, scene: Scene) -> Mover:
    side = min(scene.height, scene.width)
    size = 2 * round(float(rng.uniform(0.14, 0.24)) * side / 2)
    room = (side - size) / 2 - 2
    reach = room * rng.uniform(0.5, 0.9, 2)
    centre = side / 2 + (room - reach) * rng.uniform(-1, 1, 2)
    phase, speed = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0.4, 1.0, 2)
    card = replace(scene.cards[0], colour=colour, shade=float(rng.uniform(0.85, 1.12)))

    def pair(values: np.ndarray) -> tuple[float, float]:
        return float(values[0]), float(values[1])

    return Mover(card, size, pair(centre), pair(reach), pair(phase), pair(speed))


def tracking_row(scene: MovingScene, media: str) -> Row:
    """Where the front moving card is in eight frames, the first, the last and evenly between."""
    mover = scene.movers[-1]
    indices = np.linspace(0, scene.num_frames - 1, NUM_TRACKED).round().astype(int)
    times = tuple(int(index) / scene.source_fps for index in indices)
    return Row(
        media=media,
        question=f"the moving {mover.card.colour} card",
        boxes=tuple(normalised(mover.box(time), scene) for time in times),
        box_times=times,
        duration_seconds=scene.duration_seconds,
    )


def tg_row(scene: Scene, card: int, media: str) -> Row:
    """When does a card show."""
    asked = scene.cards[card]
    return Row(
        media=media,
        question=f"the {asked.colour} card is shown",
        spans=(asked.span,),
        duration_seconds=scene.duration_seconds,
    )


def gqa_row(scene: Scene, card: int, letter: int, media: str) -> Row:
    """The pattern on a card, where the right option is number `letter`."""
    return needle_row(scene, _lettered(scene, card, letter), media)


def mc_row(scene: Scene, letter: int, media: str) -> Row:
    """Which card shows first; options are colours, those of the scene's cards before others."""
    first, *others = (card.colour for card in sorted(scene.cards, key=_start))
    others += [colour for colour in CARD_COLOURS if colour not in (first, *others)]
    rng = np.random.default_rng([SPLITS.index(scene.split), scene.seed, 9])
    options = [others[i] for i in rng.permutation(NUM_OPTIONS - 1)]
    options.insert(letter, first)
    return Row(
        media=media,
        question="Which card is shown first?",
        options=tuple(f"the {colour} card" for colour in options),
        answer=chr(ord("A") + letter),
        duration_seconds=scene.duration_seconds,
    )


def igqa_row(scene: Scene, card: int, letter: int, media: str) -> Row:
    """As `gqa_row`, of the picture of `picture_index`."""
    row = gqa_row(scene, card, letter, media)
    return replace(row, media_type="image", spans=(), duration_seconds=None)


def detection_row(scene: Scene, card: int, media: str) -> Row:
    """Where is a card in a picture that shows it."""
    asked = scene.cards[card]
    box = normalised(asked.box, scene)
    return Row(media, f"the {asked.colour} card", "image", boxes=(box,))


def picture_index(scene: Scene, span: TimeSpan) -> int:
    """The frame in the middle of a span of the scene."""
    return round((span.start_seconds + span.end_seconds) / 2 * scene.source_fps)


def _start(card: Card) -> float:
    return card.span.start_seconds


def _lettered(scene: Scene, card: int, letter: int) -> Question:
    questions = (make_question(scene, card, seed) for seed in itertools.count())
    return next(question for question in questions if question.answer == letter)


def _tells_the_first(scene: Scene) -> bool:
    first, second, *_ = sorted(map(_start, scene.cards))
    return second - first >= FIRST_BY_SECONDS


def write_balanced(
    folder: str | Path,
    seed: int,
    num_per_task: int,
    split: Split = "train",
    *,
    tasks: Sequence[str] = tuple(TASKS),
    footage: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `num_per_task` rows of each of `tasks` with their media, and the manifest of them.

    Letters are balanced in each task: their numbers differ by at most one. A scene gives one row
    of each task, so two clips and two PNGs. seed: scenes are those of the first seeds from here on
    whose cards begin apart. footage: as in `make_scene`. progress: called with scenes (done, of).
    Returns the path of the manifest, `manifest.json` in `folder`, written last.
    """
    ok = type(num_per_task) is int and 1 <= num_per_task <= MAX_PER_TASK
    require("write_balanced", "num_per_task", num_per_task, ok, f"in 1..{MAX_PER_TASK}")
    rule = f"one of {', '.join(SPLITS)}"
    require("write_balanced", "split", split, split in SPLITS, rule)
    ok = type(seed) is int and 0 <= seed < 2**62
    require("write_balanced", "seed", seed, ok, "an integer in [0, 2**62)")
    rule = f"some of {', '.join(TASKS)}, each once"
    ok = 0 < len(tasks) == len(set(tasks)) and set(tasks) <= set(TASKS)
    require("write_balanced", "tasks", list(tasks), ok, rule)
    folder = Path(folder)
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    scenes = (make_scene(number, split, footage) for number in itertools.count(seed))
    chosen = itertools.islice(filter(_tells_the_first, scenes), num_per_task)
    letters = _letters(seed, num_per_task, split)
    rows: dict[str, list[Row]] = {task: [] for task in tasks}
    for number, scene in enumerate(chosen):
        made = _write_scene(media, scene, number, {t: letters[t][number] for t in letters}, tasks)
        for task, row in made.items():
            rows[task].append(row)
        if progress is not None:
            progress(number + 1, num_per_task)
    sets = []
    for task, found in rows.items():
        write_rows(folder / f"{task}.jsonl", found)
        name, kind = f"needle-{task}", found[0].media_type
        sets.append(DataSet(name, kind, task, Path("media"), Path(f"{task}.jsonl")))
    write_manifest(folder / "manifest.json", sets)
    return folder / "manifest.json"


def _letters(seed: int, num: int, split: Split) -> dict[str, list[int]]:
    """Balanced options' numbers, in an order of its own for each task that has options."""
    rng = np.random.default_rng([SPLITS.index(split), seed, 11])
    return {
        task: [int(n) for n in rng.permutation(np.arange(num) % NUM_OPTIONS)]
        for task in ("gqa", "igqa", "mc")
    }


def _write_scene(
    media: Path, scene: Scene, number: int, letters: dict[str, int], tasks: Sequence[str]
) -> dict[str, Row]:
    """The row of a scene for each task, and their media; which card is asked about goes round."""
    from PIL import Image as Picture

    def card(offset: int) -> int:
        return (number + offset) % len(scene.cards)

    stem = f"{scene.split}_{scene.seed}"
    clip, moving, read, found = (
        f"{stem}{end}" for end in (".mp4", "_moving.mp4", "_read.png", "_found.png")
    )
    moving_scene = make_moving_scene(scene.seed, scene.split, scene.footage)
    rows = {
        "tg": tg_row(scene, card(0), clip),
        "gqa": gqa_row(scene, card(1), letters["gqa"], clip),
        "igqa": igqa_row(scene, card(2), letters["igqa"], read),
        "detection": detection_row(scene, card(3), found),
        "mc": mc_row(scene, letters["mc"], clip),
        "tracking": tracking_row(moving_scene, moving),
    }
    rows = {task: rows[task] for task in tasks}
    shown = {row.media for row in rows.values()}
    for name, clip_scene in ((clip, scene), (moving, moving_scene)):
        if name in shown:
            write_clip(media / name, clip_scene)
    for name, span in (
        (read, scene.cards[card(2)].mark_span),
        (found, scene.cards[card(3)].span),
    ):
        if name in shown:
            Picture.fromarray(scene.frame(picture_index(scene, span))).save(media / name)
    return rows
