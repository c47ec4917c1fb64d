"""Checks and times of ops: what fails in one op is said and costs no other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bench_device
import bench_errors
import isolated
import pytest
import torch
from isolated import Outcome, outcomes
from op_cases import cases

from vtts_rt import checkout, cli
from vtts_rt.bench import main, ops, script
from vtts_rt.ops.dispatch import backends

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
    found = outcomes(
        [sys.executable, "-c", CHILD, "said"], ops, seconds=5.0, interpret=True, jobs=jobs
    )
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
    (worst,) = bench_errors.worst(rows)
    assert (worst["case"], worst["cases"], worst["within"]) == ("near", 3, True)
    for wrong in (float("nan"), 1.1):
        (worst,) = bench_errors.worst([row(wrong, 1.0, "beyond"), *rows])
        assert (worst["case"], worst["cases"], worst["within"]) == ("beyond", 4, False)


def test_an_error_beyond_its_bound_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Outcome("rmsnorm", [{**row(2.0, 1.0, "odd"), "op": "rmsnorm"}], None)
    found = {False: [bad], True: []}
    monkeypatch.setattr(bench_errors, "outcomes", lambda *_, interpret, **__: found[interpret])
    out = tmp_path / "errors.json"
    flags = ["--op", "rmsnorm", "--device", "cpu", "--output-json", str(out)]
    assert script(bench_errors, flags) == 1
    assert json.loads(out.read_text())["results"][0]["case"] == "odd"
    assert "failed: rmsnorm, cpu, float32, odd: error 2, allowed 1" in capsys.readouterr().err


def test_wrong_names_are_named() -> None:
    with pytest.raises(ValueError, match="scale must be of check, bench, got 'large'"):
        script(bench_errors, ["--scale", "large"])
    for run in (lambda flags: main(["ops", *flags]), lambda flags: script(bench_errors, flags)):
        with pytest.raises(ValueError, match="bench: op must be one of .*, got 'abacus'"):
            run(["--op", "rmsnorm,abacus", "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("bench", [bench_errors, bench_device, ops])
def test_a_device_that_is_not_there_is_one_sentence(bench: Any) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device is available; use --device cpu"):
        script(bench, ["--device", "cuda"])


def test_times_become_rates_and_a_failure_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"op": "swiglu", "case": "1 x 2", "dtype": "float32", "num_bytes": 8, "num_flops": 16}
    rows = [
        {**about, "backend": "cpu", "median": 2.0, "error": {"found": 0.0}},
        {**about, "backend": "eager", "median": 4.0},
    ]
    limits = [
        {"num_bytes": 40, "median": 2.0},
        {"num_flops": 5e9, "median": 0.5, "dtype": "torch.float32"},
    ]
    found = [
        Outcome("limits", limits, None),
        Outcome("swiglu", rows, None),
        Outcome("rotary", [], "wrong (after 0 rows)"),
    ]
    monkeypatch.setattr(isolated, "outcomes", lambda *_, **__: found)
    out = tmp_path / "ops.json"
    flags = ["--op", "swiglu,rotary", "--device", "cpu", "--output-json", str(out)]
    assert main(["ops", *flags]) == 1
    assert "failed: rotary: wrong (after 0 rows)" in capsys.readouterr().err
    result = json.loads(out.read_text())
    assert result["copy_gb_per_second"] == 20e-9 and result["matmul_gflops"]["torch.float32"] == 10
    (row,) = result["results"]
    assert row["median_us"] == {"cpu": 2e6, "eager": 4e6} and row["error"] == {"cpu": {"found": 0}}
    assert row["gb_per_second"]["cpu"] == 4e-9 and row["gflops"]["eager"] == 4e-9
    assert row["share_of_copy"] == {"cpu": 0.2, "eager": 0.1}


@pytest.mark.slow
def test_every_backend_of_a_case_is_timed_and_a_failure_costs_no_other_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of bench/ where what one op returns is wrong."""
    folder = tmp_path / "bench"
    shutil.copytree(checkout.FOLDER, folder, ignore=shutil.ignore_patterns("results"))
    wrong = folder / "op_cases" / "rotary.py"
    text = wrong.read_text()
    assert "return rotary(x[" in text
    wrong.write_text(text.replace("return rotary(x[", "return 1 + rotary(x["))
    monkeypatch.setattr(checkout, "FOLDER", folder)
    flags = ["--op", "rotary,swiglu", "--device", "cpu", "--threads", "1", "--runs", "1"]
    out = tmp_path / "ops.json"
    assert main(["ops", *flags, "--output-json", str(out)]) == 1
    result = json.loads(out.read_text())
    (failure,) = result["failures"]
    assert failure.startswith("rotary: AssertionError: 1 x 10 x 64"), failure
    assert result["copy_gb_per_second"] > 0 and result["matmul_gflops"]["torch.float32"] > 0
    assert [row["case"] for row in result["results"]] == [
        case.name for case in cases("swiglu", "cpu", "bench")
    ]
    for row in result["results"]:
        wanted = {name for name in backends("swiglu", "cpu") if name != "reference"}
        assert set(row["median_us"]) == wanted | {"eager"} and set(row["error"]) == wanted
        for name, microseconds in row["median_us"].items():
            rate = row["num_bytes"] / microseconds / 1e3
            assert row["gb_per_second"][name] == pytest.approx(rate)


def test_an_installed_wheel_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkout, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="micro-benchmarks are in bench/ of the source checkout"):
        main(["ops", "--op", "swiglu", "--device", "cpu"])
    with pytest.raises(RuntimeError, match="peers on vLLM are in bench/ of the source checkout"):
        main(["rounds", "--peer", "vllm"])
    for command in ("report", "train tiny"):
        assert cli.main(command.split()) == 1
        said = capsys.readouterr().err
        assert f"the parts of `vtts-rt {command}` are in bench/ of the source checkout" in said
