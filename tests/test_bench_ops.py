"""Checks and times of ops: what fails in one op is said and costs no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vtts_rt.bench import errors, main
from vtts_rt.bench.ops import isolated
from vtts_rt.bench.ops.isolated import Outcome, outcomes

# Arguments: a word, and ops that say what to do. The module alone, without torch: quickly.
CHILD = f"""
import os, runpy, sys, time
serve = runpy.run_path({isolated.__file__!r})["serve"]

def rows(op):
    yield {{"op": op, "word": sys.argv[1], "interpret": os.environ.get("TRITON_INTERPRET")}}
    print("this is not for the parent")
    if op == "raise":
        raise RuntimeError("wrong")
    if op == "crash":
        os.abort()
    if op == "hang":
        time.sleep(1000)
    yield {{"op": op}}

serve(sys.argv[2].split(","), rows)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_fails_in_one_op_costs_no_other(jobs: int) -> None:
    ops = ["fine", "raise", "crash", "hang", "last"]
    found = outcomes(CHILD, ["said"], ops, seconds=5.0, interpret=True, jobs=jobs)
    assert [outcome.op for outcome in found] == ops
    assert all(
        outcome.rows[0] == {"op": outcome.op, "word": "said", "interpret": "1"} for outcome in found
    )
    assert [len(outcome.rows) for outcome in found] == [2, 1, 1, 1, 2]
    by_op = {outcome.op: outcome.failure for outcome in found}
    assert by_op["fine"] is None and by_op["last"] is None
    assert by_op["raise"] == "RuntimeError: wrong (after 1 rows)"
    assert by_op["hang"] == "silent for 5 s (after 1 rows)"
    assert "after 1 rows" in str(by_op["crash"])


def row(found: float, allowed: float, case: str) -> dict[str, object]:
    names = {"op": "x", "backend": "cpu", "dtype": "float32", "case": case}
    return {**names, "found": found, "eager": 0.0, "allowed": allowed}


def test_the_case_nearest_to_its_bound_speaks_for_the_others() -> None:
    rows = [row(2.0, 8.0, "large"), row(0.5, 1.0, "near"), row(0.0, 0.0, "equal")]
    (worst,) = errors.worst(rows)
    assert (worst["case"], worst["cases"], worst["within"]) == ("near", 3, True)
    for wrong in (float("nan"), 1.1):
        (worst,) = errors.worst([row(wrong, 1.0, "beyond"), *rows])
        assert (worst["case"], worst["cases"], worst["within"]) == ("beyond", 4, False)


def test_an_error_beyond_its_bound_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Outcome("rmsnorm", [{**row(2.0, 1.0, "odd"), "op": "rmsnorm"}], None)
    found = {False: [bad], True: []}
    monkeypatch.setattr(errors, "outcomes", lambda *_, interpret, **__: found[interpret])
    out = tmp_path / "errors.json"
    assert main(["errors", "--op", "rmsnorm", "--device", "cpu", "--output-json", str(out)]) == 1
    assert json.loads(out.read_text())["results"][0]["case"] == "odd"
    assert "failed: rmsnorm, cpu, float32, odd: error 2, allowed 1" in capsys.readouterr().err


def test_wrong_names_are_named() -> None:
    with pytest.raises(ValueError, match="op must be one of"):
        main(["errors", "--op", "nothing"])
    with pytest.raises(ValueError, match="scale must be of check, bench, got 'large'"):
        main(["errors", "--scale", "large"])


@pytest.mark.parametrize("bench", ["ops", "errors"])
def test_an_op_that_there_is_not_is_refused_before_anything_runs(bench: str) -> None:
    with pytest.raises(ValueError, match="bench: op must be one of .*, got 'abacus'"):
        main([bench, "--op", "rmsnorm,abacus", "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bench", ["ops", "errors", "device"])
def test_a_device_that_is_not_there_is_one_sentence(bench: str) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device is available; use --device cpu"):
        main([bench, "--device", "cuda"])
