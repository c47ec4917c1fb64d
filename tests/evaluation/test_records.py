from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtts_rt.evaluation.records import Records, compare, paired, read_records, summarise, wilson


def _record(seed: int, *right: bool, level: str = "far") -> dict[str, Any]:
    same = {"span_iou": 0.5, "box_iou": 0.25, "visual_tokens": 90, "ms": 10.0}
    looks = [{"rounds": k + 1, "right": r, **same} for k, r in enumerate(right)]
    return {"seed": seed, "level": level, "rounds": looks}


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_of_shares_are_the_published_ones(
    right: int, num: int, low: float, high: float
) -> None:
    assert wilson(right, num) == pytest.approx((low, high), abs=1e-4)


def test_paired_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        first = rng.random(300) < 0.6
        second = np.where(rng.random(300) < 0.2, True, first)
        found = paired(first.astype(float), second.astype(float))
        held += found["low"] <= 0.2 * 0.4 <= found["high"]
    assert 0.92 < held / 400 < 0.98


def test_of_one_clip_a_difference_may_be_anything() -> None:
    (step,) = summarise([_record(0, False, True)])["steps"]
    assert (step["difference"], step["low"], step["high"]) == (1.0, -1.0, 1.0)
    json.dumps(step, allow_nan=False)


def test_summaries_count_by_rounds_and_levels() -> None:
    records = [
        _record(0, False, True, True),
        _record(1, False, False, True),
        _record(2, True, True, True, level="glance"),
        _record(3, False, True, False),
    ]
    found = summarise(records)
    assert [line["accuracy"] for line in found["rounds"]] == [0.25, 0.75, 0.75]
    assert found["rounds"][0]["low"] < 0.25 < found["rounds"][0]["high"]
    assert found["levels"]["glance"] == {"num": 1, "accuracy": [1.0, 1.0, 1.0]}
    steps = {(s["fewer"], s["more"]): s for s in found["steps"]}
    assert steps.keys() == {(1, 2), (2, 3), (1, 3)}
    assert steps[1, 2]["difference"] == 0.5 and steps[2, 3]["difference"] == 0.0
    assert steps[2, 3]["low"] < 0 < steps[2, 3]["high"]


def test_two_runs_are_compared_on_the_clips_of_both() -> None:
    one = [_record(seed, False) for seed in (1, 2, 3)]
    three = [_record(seed, False, False, seed > 2) for seed in (2, 3, 4)]
    found = compare(one, 1, three, 3)
    assert found["num"] == 2 and found["difference"] == 0.5
    with pytest.raises(ValueError, match="records must be of the same clips"):
        compare(one, 1, [_record(9, True)], 1)


def test_a_killed_run_goes_on_behind_its_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    first = Records(path, {"model": "a", "rounds": (1, 2)})
    first.add(_record(0, True))
    first.add(_record(1, False))
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    again = Records(path, {"model": "a", "rounds": (1, 2)})
    assert again.seeds == {0}
    again.add(_record(1, False))
    setting, records = read_records(path)
    assert setting == {"model": "a", "rounds": [1, 2]} and records == again.all
    with pytest.raises(ValueError, match="out must be a file of the same model"):
        Records(path, {"model": "b", "rounds": (1, 2)})


def test_damaged_files_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"model": "a"}) + "\n[1]\n")
    with pytest.raises(ValueError, match=r"run.jsonl:2 must be an object"):
        read_records(path)
    path.write_text(json.dumps({"model": "a"}) + '\n{"seed": 3}\n')
    with pytest.raises(ValueError, match=r"run.jsonl:2 must be an object with level, rounds, seed"):
        Records(path, {"model": "a"})
    path.write_text("")
    with pytest.raises(ValueError, match="begins with its setting"):
        read_records(path)
