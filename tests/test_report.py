"""Generated tables: what is between the markers comes from the result files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtts_rt import report

ROOT = Path(__file__).resolve().parents[1]
LOOK = {
    "rounds": 1,
    "accuracy": 0.304,
    "span_iou": 0.125,
    "box_iou": 0.5,
    "visual_tokens": 1234.4,
    "ms": 20.6,
}
README = "before\n<!-- table:needle -->\nold\n<!-- /table -->\nafter\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return tmp_path


def write(checkout: Path, name: str, accuracy: float = 0.304) -> None:
    data = {
        **{"model": "tiny", "strategy": "append", "num": 500, "seed": 7, "split": "held_out"},
        "rounds": [{**LOOK, "accuracy": accuracy}],
        "commit": "0123456789abcdef+",
    }
    (checkout / "bench" / "results" / name).write_text(json.dumps(data))


def test_a_table_is_written_from_the_result(checkout: Path) -> None:
    write(checkout, "needle_cpu-2_202611.json")
    assert report.main(["--root", str(checkout)]) == 0
    text = (checkout / "README.md").read_text()
    assert "| 1 | 30.4 % | 0.12 | 0.50 | 1,234 | 21 |" in text
    assert "`needle_cpu-2_202611.json`, commit 0123456789+." in text
    assert "tiny, `append`, 500 clips from seed 7, split held_out." in text
    assert text.startswith("before\n<!-- table:needle -->\n")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "old" not in text


def test_rounds_and_phases_come_from_one_result(checkout: Path) -> None:
    timings = {"decode": 900.4, "preprocess": 2, "vision": 30, "prefill": 4, "generate": 5}
    look = {
        "index": 0,
        "num_frames": 30,
        "prompt_tokens": 2000,
        "timings_ms": {**timings, "total": 1234.0},
    }
    reuse = {"frames_decoded": 8, "pairs_encoded": 4, "tokens_prefilled": 99, "tokens_reused": 1}
    data = {
        "setting": {"rounds": 1},
        "hardware": {"cpu": "A CPU", "gpu": None, "threads": 2},
        "contenders": {
            "loop": {"median_latency": 4.0, "rounds": [{**look, "reuse": None}]},
            "append": {"median_latency": 1.0, "rounds": [{**look, "reuse": reuse}]},
        },
        "comparisons": [{"name": "append", "time_ratio": 0.25}],
    }
    path = checkout / "bench" / "results" / "rounds_cpu_202611.json"
    path.write_text(json.dumps(data))
    rounds = report.table("rounds", checkout)
    assert "| seconds | round 1 | all | share of time |" in rounds
    assert "| loop | 1.23 | 4.00 | 1 |\n| append | 1.23 | 1.00 | 0.25 |" in rounds
    assert "A CPU, 2 threads" in rounds
    phases = report.table("phases", checkout)
    assert "| loop, 1 | 900 | 2 | 30 | 4 | 5 | 30 | 15 | 2,000 | 0 |" in phases
    assert "| append, 1 | 900 | 2 | 30 | 4 | 5 | 8 | 4 | 99 | 1 |" in phases


def test_patchify_has_a_line_for_each_contender(checkout: Path) -> None:
    entry = {"num_threads": 2, "median_ms": 33.3, "min_ms": 30.0, "max_ms": 41.0}
    data = {"results": [{"name": "avx2", **entry, "speedup": 4.04}], "hardware": {"cpu": "A CPU"}}
    path = checkout / "bench" / "results" / "patchify_cpu2_202611.json"
    path.write_text(json.dumps(data))
    text = report.table("patchify", checkout)
    assert "| avx2, 2 threads | 33 | 30 | 41 | 4.0 |" in text
    assert "`patchify_cpu2_202611.json`, A CPU." in text


def test_modules_are_listed_with_their_first_sentence(checkout: Path) -> None:
    (checkout / "vtts_rt" / "ops").mkdir(parents=True)
    (checkout / "vtts_rt" / "ops" / "fold.py").write_text('"""Folds a | b\nin two. More."""\n')
    (checkout / "vtts_rt" / "empty.py").write_text("")
    (checkout / "csrc").mkdir()
    (checkout / "csrc" / "fold.h").write_text("// Folds.\n// Twice.\n#pragma once\n// No.\n")
    assert report.modules(checkout).splitlines()[2:] == [
        r"| `vtts_rt/ops/fold.py` | Folds a \| b in two |",
        "| `csrc/fold.h` | Folds |",
    ]


def test_writing_twice_changes_nothing(checkout: Path) -> None:
    write(checkout, "needle_cpu_202611.json")
    report.main(["--root", str(checkout)])
    once = (checkout / "README.md").read_text()
    report.main(["--root", str(checkout)])
    assert (checkout / "README.md").read_text() == once


def test_check_changes_nothing_and_tells(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(checkout, "needle_cpu_202611.json")
    assert report.main(["--root", str(checkout), "--check"]) == 1
    assert (checkout / "README.md").read_text() == README
    assert "README.md: out of date" in capsys.readouterr().out
    report.main(["--root", str(checkout)])
    assert report.main(["--root", str(checkout), "--check"]) == 0


def test_the_newest_result_of_each_hardware_counts(checkout: Path) -> None:
    write(checkout, "needle_cpu_202611.json", accuracy=0.9)
    write(checkout, "needle_cpu_202610.json", accuracy=0.1)
    write(checkout, "needle_h200_202609.json", accuracy=0.5)
    results = report.load_results(checkout / "bench" / "results", "needle")
    assert [(r.hardware, r.month) for r in results] == [("cpu", "202611"), ("h200", "202609")]


def test_without_results_the_table_says_so(checkout: Path) -> None:
    report.main(["--root", str(checkout)])
    assert "No result of `needle` in bench/results yet" in (checkout / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must be JSON"), ("[]", "must be a JSON object"), ("{}", "lacks a value: KeyError")],
)
def test_a_broken_result_is_named(checkout: Path, content: str, message: str) -> None:
    (checkout / "bench" / "results" / "needle_cpu_202611.json").write_text(content)
    with pytest.raises(ValueError, match=f"needle_cpu_202611.json {message}"):
        report.main(["--root", str(checkout)])


def test_an_unknown_table_and_a_wrong_root_are_refused(checkout: Path, tmp_path: Path) -> None:
    (checkout / "README.md").write_text(README.replace("needle", "nothing"))
    with pytest.raises(ValueError, match="table must be one of .*, got 'nothing'"):
        report.main(["--root", str(checkout)])
    with pytest.raises(ValueError, match="root must be a checkout"):
        report.main(["--root", str(tmp_path / "docs")])


def test_the_tables_of_this_checkout_are_current() -> None:
    assert report.main(["--root", str(ROOT), "--check"]) == 0, "run `make report`"
