"""What the Python implementation says in the terms of vtts.h, and the golden vectors.

    python tests/abi_cases.py        writes tests/csrc/golden.json anew

Both implementations are read against that file, so that neither changes unnoticed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.config import PerceptionConfig
from vtts_rt.engine.page_hash import content_id, page_hashes, pair_name
from vtts_rt.perception.clue import Clue, parse_clue
from vtts_rt.perception.plan import FramePlan
from vtts_rt.perception.policy import RoundHistory, plan_round
from vtts_rt.perception.sizing import smart_resize
from vtts_rt.types import PixelBox, VideoMetadata

GOLDEN = Path(__file__).parent / "csrc" / "golden.json"
TAGS = ("think", "answer", "glue")


def video(**fields: Any) -> VideoMetadata:
    """Metadata of a video given in the fields of vtts_video_info."""
    fields = {"source_fps": 0.0, "duration_seconds": 0.0, "num_frames": 1, **fields}
    times = fields.pop("timestamps_seconds", None)
    return VideoMetadata(
        video_id="v",
        decoder="test",
        is_image=bool(fields.pop("is_image", False)),
        timestamps_seconds=None if times is None else np.asarray(times, dtype=np.float64),
        **fields,
    )


def plan_dict(plan: FramePlan) -> dict[str, Any]:
    return {
        "round_index": plan.round_index,
        "sample_fps": plan.sample_fps,
        "segments": [
            {
                "pairs": [[p.video, p.frame_a, p.frame_b, p.time_seconds] for p in s.pairs],
                "box": list(s.box),
                "resized_hw": list(s.resized_hw),
                "seconds_per_grid": s.seconds_per_grid,
                "is_image": s.is_image,
            }
            for s in plan.segments
        ],
        "frame_indices": [int(i) for i in plan.frame_indices],
        "timestamps_seconds": list(plan.timestamps_seconds),
        "views": [
            {
                "box": list(v.box),
                "resized_hw": list(v.resized_hw),
                "spans": [[s.start_seconds, s.end_seconds] for s in v.spans],
                "cell_seconds": v.cell_seconds,
                "level": v.level,
            }
            for v in plan.views
        ],
        "regions": [
            [r.video, r.span.start_seconds, r.span.end_seconds, *(getattr(r.box, n) for n in XYXY)]
            for r in plan.regions
        ],
        "notes": list(plan.notes),
    }


XYXY = ("x0", "y0", "x1", "y1")


def plan_rounds(
    strategy: Any,
    config: dict[str, Any],
    videos: Sequence[dict[str, Any]],
    clues: Sequence[tuple[Clue, bool]],
) -> list[dict[str, Any]]:
    """Plans of len(clues) + 1 rounds; clues: what each round but the last ended with, and whether
    it was forced."""
    settings = PerceptionConfig(**config)
    metadata = [video(**fields) for fields in videos]
    history: list[RoundHistory] = []
    plans = []
    for round_index in range(len(clues) + 1):
        plan = plan_round(strategy, settings, metadata, history, round_index)
        plans.append(plan_dict(plan))
        if round_index < len(clues):
            clue, forced = clues[round_index]
            history.append(RoundHistory(plan, clue, forced))
    return plans


def clue_dict(raw: bytes) -> dict[str, Any]:
    """The clue in some bytes; the text of a tag instead of its range."""
    clue = parse_clue(raw.decode(errors="replace"))
    return {
        **{tag: getattr(clue, tag) for tag in TAGS},
        "spans": [list(span) for span in clue.spans],
        "boxes": [list(box) for box in clue.boxes],
        "problems": list(clue.problems),
        "glue_is_empty_list": (clue.glue or "").strip() in ("[]", "()"),
    }


# -- the golden vectors -----------------------------------------------------------------------

CLUES = [
    "",
    "no tags at all",
    "<think> a card </think>\n<answer> B </answer><glue>[(12.0, 15.5), (20, 25)]</glue>",
    "thought without a tag </think><glue>12秒到15秒 and 20–25；1:05 - 1:10.5</glue>",
    "< Think >x</ think ><ANSWER>\u3000 C \xa0</answer><glue>[0.1, 0.2, 0.3, 0.4] (1, 2, 3)",
    "<glue>[]</glue>",
    "<glue> ( ) </glue><glue>()\u2003</glue><glue>open",
    "<glue>(nan, 1) (1e999, 2) (1e-400, 5e-324) (.5, 1.) (1:., 2) (" + "9" * 70 + ", 1)</glue>",
    "<glue>" + "(1, 2)" * 70 + "[1, 2, 3, 4]" * 70 + "</glue>",
    "<glue>(−5, 3) (- -5, 3) 1 to 2 until 3, frame3 4\n5 6; 7 8</glue>",
    "<glue>(1, 2)</answer>(3, 4)</glue><answer><think>a<glue></answer>",
    "<glue>1e+ 2e-3, 4E+2</glue  ><    /    glue    ><     glue>(1,2)",
    "<glue>(0.1, 0.30000000000000004) (123456789.123456789, 2.2250738585072011e-308)</glue>",
]
RAW_CLUES = [
    b"<glue>\xe2\x88\x92\xe2\x88(5, 6)\xff\x80(7\xe5\x88\xb08)\xc2</glue>",
    b"<answer>\xe3\x80\x80\xff \xed\xa0\x80 \xe2\x80</answer>\x00<glue>1\x002</glue>",
    b"<think>\xc2\x85\xe2\x80\xa8x\xe1\x9a\x80\x1c</think>\xf0\x9f\x98<glue>(1,2)",
]

MOVIE = {"num_frames": 1800, "source_fps": 29.97, "duration_seconds": 60.06, "height": 360,
         "width": 640}  # fmt: skip
SHORT = {"num_frames": 7, "source_fps": 10.0, "duration_seconds": 0.7, "height": 1080,
         "width": 81}  # fmt: skip
IMAGE = {"is_image": 1, "num_frames": 1, "height": 333, "width": 777}
SINGLE = {**SHORT, "num_frames": 1, "duration_seconds": 0.1}
UNEVEN = {
    **MOVIE,
    "num_frames": 40,
    "source_fps": 1.9,
    "duration_seconds": 21.0,
    "timestamps_seconds": [0.5 * i + (0.013 if i % 3 else 0.0) for i in range(40)],
}

LOOK = "<glue>[(20.0, 30.0)]</glue>"
CLOSER = "<glue>[(24.5, 27)] [0.2, 0.1, 0.6, 0.9]</glue>"
PIXELS = "<glue>[100, 50, 20, 90]</glue>"
ODD = "<glue>(-3, 2) (50, 9e9) (40, 30) (59.9, 59.9)</glue>"
NONE = "<glue>[]</glue>"
HUGE = "<glue>(-1e300, 1e300) (3, 1e308)</glue>"


def clue_case(raw: bytes) -> dict[str, Any]:
    return {"hex": raw.hex(), **clue_dict(raw)}


def plan_case(
    strategy: str,
    config: dict[str, Any],
    videos: list[dict[str, Any]],
    texts: list[str],
    forced: bool = False,
) -> dict[str, Any]:
    clues = [(parse_clue(text), forced) for text in texts]
    case = {"strategy": strategy, "config": config, "videos": videos, "texts": texts}
    rounds = plan_rounds(strategy, config, videos, clues)
    return {**case, "forced": forced, "rounds": rounds}


def golden() -> dict[str, Any]:
    few: dict[str, Any] = {"max_frames": 16}
    plans = []
    for strategy in ("official", "grid", "refresh", "append"):
        plans += [
            plan_case(strategy, few, [MOVIE], [LOOK, CLOSER, PIXELS, NONE]),
            plan_case(strategy, few, [UNEVEN, IMAGE], [ODD, PIXELS, "nothing"]),
            plan_case(strategy, {"max_frames": 8, "focus_margin_cells": 0.5, "min_pixels": 784},
                      [SHORT, SINGLE], ["<glue>(0.1, 0.3)</glue>", NONE]),
            plan_case(strategy, {**few, "key_ratio": 0.25, "focus_frames": 6, "sample_fps": 0.7},
                      [MOVIE], [HUGE, CLOSER]),
            plan_case(strategy, few, [MOVIE], ["<glue>[0.4, 0.4, 0.41, 0.42] 3-4</glue>"], True),
        ]  # fmt: skip
    generator = random.Random(0)
    keys = [[generator.randrange(-(2**63), 2**63) for _ in range(4)] for _ in range(40)]
    hashes = [
        {
            "num_tokens": n,
            "page_size": page,
            "space": space,
            "hashes": [
                h.hex()
                for h in page_hashes(
                    np.array(keys[:n], dtype=np.int64).reshape(-1, 4), page, space.encode()
                )
            ],
        }
        for n, page, space in [(0, 1, ""), (40, 16, ""), (40, 16, "weights 2"), (5, 1, "x" * 300)]
    ]
    pairs = [["", 0, 0, [0, 0, 1, 1], [28, 28]], ["blake:ü", 7, 2**40, [-1, 2, 30, 40], [56, 84]]]
    sizes = [[360, 640, 100352, 602112.0], [1, 1, 1, 784.0], [14, 42, 3136, 1e6],
             [1080, 81, 784, 100000.5], [9999, 3, 100352, 105369], [30, 5000, 1, 2000]]  # fmt: skip
    return {
        "clues": [clue_case(text.encode()) for text in CLUES] + [clue_case(r) for r in RAW_CLUES],
        "plans": plans,
        "keys": keys,
        "hashes": hashes,
        "content_ids": [
            {"pair": p, "id": content_id(pair_name(p[0], p[1], p[2], PixelBox(*p[3]), tuple(p[4])))}
            for p in pairs
        ],
        "smart_resize": [{"arguments": s, "hw": list(smart_resize(*s))} for s in sizes],
    }


def golden_text() -> str:
    """One case a line."""
    sections = []
    for name, cases in golden().items():
        lines = ",\n".join(json.dumps(case, sort_keys=True) for case in cases)
        sections.append(f'"{name}": [\n{lines}\n]')
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    GOLDEN.write_text(golden_text(), encoding="utf-8")
