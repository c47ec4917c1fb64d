"""Results clip by clip: kept in a file from which a killed run goes on, and what follows from them.

A file is JSON lines: the setting, then a record a clip. A record is {"seed", "level", "rounds"},
"rounds" a list of {"rounds", "right", "span_iou", "box_iou", "visual_tokens", "ms"}, what stood
after each number of rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtts_rt.files import write_whole
from vtts_rt.types import require

Record = dict[str, Any]
_Z = 1.959964  # of a two-sided 95 % interval


class Records:
    """The records of one run, in memory and, if `path` is given, in its file.

    setting: what all records share. A file of another setting is refused: ValueError. What a
    killed process left of a last line is dropped.
    """

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self.path, self.all = path, list[Record]()
        if path is None:
            return
        setting = json.loads(json.dumps(setting))
        if path.is_file() and path.stat().st_size:
            found, self.all = read_records(path)
            others = sorted(
                k for k in found.keys() | setting.keys() if found.get(k) != setting.get(k)
            )
            rule = f"a file of the same {', '.join(others)}"
            require("eval needle", "out", str(path), not others, rule)
            lines = [json.dumps(line) + "\n" for line in (setting, *self.all)]
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(setting) + "\n"]
        write_whole(path, "".join(lines))

    @property
    def seeds(self) -> set[int]:
        return {record["seed"] for record in self.all}

    def add(self, record: Record) -> None:
        self.all.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Setting and records of a file. ValueError, with the line, for anything else."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found: list[Record] = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last newline: nothing, or cut off
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        names = {"seed", "level", "rounds"} if found else set()  # the first line is the setting
        ok = isinstance(value, dict) and names <= value.keys()
        rule = f"an object with {', '.join(sorted(names))}" if names else "an object"
        require("eval needle", f"{path}:{number}", line[:40], ok, rule)
        found.append(value)
    require("eval needle", "out", str(path), bool(found), "a file that begins with its setting")
    return found[0], found[1:]


def wilson(right: int, num: int) -> tuple[float, float]:
    """95 % interval of a share, right of num (Wilson 1927, the score interval)."""
    share, square = right / num, _Z**2 / num
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def paired(less: NDArray[np.float64], more: NDArray[np.float64]) -> dict[str, Any]:
    """{"difference", "low", "high"}: mean of more - less over the same clips, each in [0, 1], and
    its 95 % interval; of one clip, all that a difference can be."""
    gain = np.asarray(more, float) - np.asarray(less, float)
    half = _Z * float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    mean = float(gain.mean())
    ends = {"low": max(-1.0, mean - half), "high": min(1.0, mean + half)}
    return {"difference": round(mean, 4), **{k: round(v, 4) for k, v in ends.items()}}


def right_by_seed(records: Sequence[Record], rounds: int) -> dict[int, float]:
    """Seed -> 1.0 where the answer after that many rounds was right."""
    found = {}
    for record in records:
        for look in record["rounds"]:
            if look["rounds"] == rounds:
                found[record["seed"]] = float(look["right"])
    return found


def compare(
    less: Sequence[Record], rounds_less: int, more: Sequence[Record], rounds_more: int
) -> dict[str, Any]:
    """`paired` accuracies of two runs, over the clips that both have, and their number "num"."""
    a, b = right_by_seed(less, rounds_less), right_by_seed(more, rounds_more)
    seeds = sorted(a.keys() & b.keys())
    require("compare", "records", len(seeds), len(seeds) > 0, "of the same clips")
    values = (np.array([side[seed] for seed in seeds]) for side in (a, b))
    return {"num": len(seeds), **paired(*values)}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """{"rounds", "levels", "steps"} of at least one record.

    rounds: a line for each number of rounds: {"rounds", "accuracy", "low", "high" (Wilson),
    "span_iou", "box_iou", "visual_tokens", "ms"}, means over clips. levels: level -> {"num",
    "accuracy" (a list, by rounds)}. steps: {"fewer", "more", "difference", "low", "high"}: paired
    differences of accuracy between neighbouring numbers of rounds, and over two of them.
    """
    counts = [look["rounds"] for look in records[0]["rounds"]]
    rounds = []
    for index, count in enumerate(counts):
        looks = [record["rounds"][index] for record in records]
        right = sum(look["right"] for look in looks)
        low, high = wilson(right, len(looks))
        line = {"rounds": count, "accuracy": round(right / len(looks), 4), "low": low, "high": high}
        for name, digits in (("span_iou", 4), ("box_iou", 4), ("visual_tokens", 1), ("ms", 1)):
            line[name] = round(sum(look[name] for look in looks) / len(looks), digits)
        rounds.append(line)
    right_at = np.array([[look["right"] for look in r["rounds"]] for r in records], float)
    levels = {}
    for level in dict.fromkeys(record["level"] for record in records):
        own = right_at[[record["level"] == level for record in records]]
        levels[level] = {"num": len(own), "accuracy": own.mean(0).round(4).tolist()}
    ordered = sorted(range(len(counts)), key=counts.__getitem__)
    steps = [
        {"fewer": counts[a], "more": counts[b], **paired(right_at[:, a], right_at[:, b])}
        for reach in (1, 2)
        for a, b in zip(ordered, ordered[reach:], strict=False)
    ]
    return {"rounds": rounds, "levels": levels, "steps": steps}
