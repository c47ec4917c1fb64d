"""The acceptance list never passes without evidence."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARGS = Namespace(fresh_clone=False, needle_seed=None, results=None)


@pytest.fixture
def accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/accept.py, looking at an empty checkout."""
    spec = importlib.util.spec_from_file_location("accept", ROOT / "bench" / "accept.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys.modules["evidence"], "ROOT", tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return module


@pytest.fixture
def evidence(accept: ModuleType) -> ModuleType:
    """bench/evidence.py, looking at the same."""
    return sys.modules["evidence"]


@pytest.mark.parametrize(
    ("returncode", "num", "failures", "errors", "skipped", "status"),
    [
        (0, 3, 0, 0, 0, "PASS"),
        (1, 3, 1, 0, 0, "FAIL"),
        (2, 1, 0, 1, 0, "FAIL"),  # a file that does not import
        (1, 3, 1, 0, 2, "FAIL"),
        (3, 3, 0, 0, 0, "FAIL"),  # interrupted
        (0, 3, 0, 0, 1, "NOT RUN"),
        (5, 0, 0, 0, 0, "NOT RUN"),  # nothing collected
        (4, 0, 0, 0, 0, "NOT RUN"),  # no such test
    ],
)
def test_tests_are_evidence_only_if_they_ran(
    evidence: ModuleType,
    returncode: int,
    num: int,
    failures: int,
    errors: int,
    skipped: int,
    status: str,
) -> None:
    counts = {"tests": num, "failures": failures, "errors": errors, "skipped": skipped}
    assert evidence.tests_verdict(returncode, counts, "test_x.py").status == status


def test_tests_are_run(evidence: ModuleType, tmp_path: Path) -> None:
    assert evidence.tests("test_gone.py")(ARGS).status == "NOT RUN"
    path = tmp_path / "test_x.py"
    path.write_text("def test_a(): pass\ndef test_b(): assert False")
    assert evidence.tests("test_x.py::test_a")(ARGS) == ("PASS", "1 tests")
    assert evidence.tests("test_x.py")(ARGS).status == "FAIL"
    path.write_text("import pytest\ndef test_a(): pass\n@pytest.mark.cuda\ndef test_b(): pass\n")
    assert evidence.tests("test_x.py")(ARGS) == ("PASS", "2 tests")
    assert evidence.tests("test_x.py", marks="not cuda")(ARGS) == ("PASS", "1 tests")


def test_every_line_without_evidence_is_not_run(
    accept: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accept.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(accept.LINES)
    assert all(line.startswith("NOT RUN issue ") for line in lines)


@pytest.mark.parametrize(
    ("ratio", "status"), [(0.5, "PASS"), (0.51, "FAIL"), (float("nan"), "FAIL")]
)
def test_numbers_are_read_from_results(
    evidence: ModuleType, tmp_path: Path, ratio: float, status: str
) -> None:
    data = {"comparisons": [{"name": "append", "time_ratio": ratio}]}
    (tmp_path / "bench" / "results" / "rounds_cpu_202611.json").write_text(json.dumps(data))
    assert evidence.measured("rounds", evidence.targets.append_time)(ARGS).status == status


def test_a_result_that_lacks_the_number_is_not_run(evidence: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bench" / "results" / "rounds_cpu_202611.json").write_text("{}")
    assert evidence.measured("rounds", evidence.targets.append_time)(ARGS).status == "NOT RUN"


@pytest.mark.parametrize(("two_threads", "ok"), [(3.0, True), (2.9, False)])
def test_patchify_counts_with_two_threads_and_fresh_memory(
    evidence: ModuleType, two_threads: float, ok: bool
) -> None:
    results = [
        {"name": "patchify avx2", "num_threads": 1, "speedup": 9.0},
        {"name": "patchify avx2, out= reused", "num_threads": 2, "speedup": 9.0},
        {"name": "patchify avx2", "num_threads": 2, "speedup": two_threads},
        {"name": "transformers", "num_threads": 2, "speedup": 1.0},
    ]
    assert evidence.targets.patchify_speed({"results": results})[0] is ok


@pytest.mark.parametrize(
    ("one", "three", "num", "ok"),
    [
        (0.40, 0.75, 500, True),
        (0.46, 0.90, 500, False),
        (0.40, 0.69, 500, False),
        (0.40, 0.75, 499, False),
    ],
)
def test_the_needle_bar(evidence: ModuleType, one: float, three: float, num: int, ok: bool) -> None:
    looks = [{"rounds": 1, "accuracy": one}, {"rounds": 3, "accuracy": three}]
    assert evidence.targets.needle_bar({"rounds": looks, "num": num})[0] is ok


def test_one_failing_check_fails_the_line(accept: ModuleType, evidence: ModuleType) -> None:
    verdicts = {name: evidence.Verdict(name, name) for name in ("PASS", "FAIL", "NOT RUN")}

    def judged(*names: str) -> str:
        checks = tuple((lambda _, n=name: verdicts[n]) for name in names)
        return str(accept.judge(evidence.Line(2, "text", checks), ARGS).status)

    assert judged("PASS", "NOT RUN", "FAIL") == "FAIL"
    assert judged("PASS", "NOT RUN") == "NOT RUN"
    assert judged("PASS", "PASS") == "PASS"


def test_gpu_lines_read_results_of_gpus_only(evidence: ModuleType, tmp_path: Path) -> None:
    def said(gpu: str | None, share: float) -> str:
        row = {
            "op": "patchify",
            "median_us": {"triton": 1.0, "reference": 9.0},
            "share_of_copy": {"triton": share, "reference": 2.0},
        }
        data = {"hardware": {"gpu": gpu}, "results": [row]}
        path = tmp_path / "bench" / "results" / "ops_card_202611.json"
        path.write_text(json.dumps(data))
        check = evidence.measured("ops", evidence.targets.gpu_patchify, gpu=True)
        return str(check(ARGS).status)

    assert said(None, 0.9) == "NOT RUN"
    assert said("a card", 0.61) == "PASS" and said("a card", 0.59) == "FAIL"


def test_patchify_is_judged_by_fresh_memory(evidence: ModuleType) -> None:
    def judge(speedup: float, scalar: float) -> bool:
        names = {"scalar": scalar, "avx2": 10.0, "avx2, out= reused": 1.0}
        rows = [
            {
                "name": f"patchify {name}",
                "num_threads": 2,
                "median_ms": ms,
                "speedup": 99.0 if "reused" in name else speedup,
            }
            for name, ms in names.items()
        ]
        return bool(evidence.targets.patchify_targets({"results": rows})[0])

    assert judge(4.1, 41.0) and not judge(3.9, 41.0) and not judge(4.1, 39.0)


SHARES = [("h264", 12, 0.9), ("h264", 250, 1.0), ("vp9", 12, 1.2)]


@pytest.mark.parametrize(
    ("change", "ok"), [({}, True), ({"h264": 1.01}, False), ({"vp9": 9.0}, True)]
)
def test_h264_is_judged_against_the_best_peer(
    evidence: ModuleType, change: dict[str, float], ok: bool
) -> None:
    comparisons = [
        {"codec": c, "gop": g, "pattern": "uniform", "time_ratio": change.get(c, ratio)}
        for c, g, ratio in SHARES
    ]
    comparisons.append({"codec": "h264", "gop": 12, "pattern": "spans", "time_ratio": 2.0})
    setting = {"duration_seconds": 60, "height": 720, "width": 1280}
    data = {"setting": setting, "comparisons": comparisons}
    assert evidence.targets.best_peer(data)[0] is ok
    with pytest.raises(ValueError, match="a file of 60 s"):
        evidence.targets.best_peer({**data, "setting": {**setting, "height": 120}})
    with pytest.raises(ValueError, match="a peer"):
        evidence.targets.best_peer({**data, "comparisons": []})


def test_seeing_again_is_judged_by_the_slowest_case_of_pyav(evidence: ModuleType) -> None:
    def judge(*speedups: float) -> bool:
        rows = [{"name": "pyav", "again_speedup": speedup} for speedup in speedups]
        rows.append({"name": "decord", "again_speedup": 1.0})
        return bool(evidence.targets.seen_again({"results": rows})[0])

    assert judge(50.0, 900.0) and not judge(900.0, 49.0)


@pytest.mark.parametrize(("num", "same", "ok"), [(200, 0.98, True), (200, 0.975, False)])
def test_decoders_must_agree_on_enough_clips(
    evidence: ModuleType, num: int, same: float, ok: bool
) -> None:
    def judge(num: int) -> bool:
        good = {"codec": "mjpeg", "num": 200, "same_answer": 1.0}
        rows = [good, {"codec": "vp9", "num": num, "same_answer": same}]
        return bool(evidence.targets.answers_agree({"results": rows})[0])

    assert judge(num) is ok and not judge(199)
    assert not evidence.targets.answers_agree({"results": []})[0]


def test_opening_is_judged_from_the_disk_where_it_was_measured(evidence: ModuleType) -> None:
    def row(name: str, cold: bool, seconds: float) -> dict[str, object]:
        return {"height": 720, "name": name, "cold": cold, "seconds": seconds}

    warm = [row("one read", False, 1.0), row("open", False, 2.0)]
    cold = [row("one read", True, 3.0), row("open", True, 3.0)]
    assert evidence.targets.one_read({"results": warm + cold})[0]
    assert not evidence.targets.one_read({"results": warm})[0]
    small = [{**r, "height": 360} for r in cold]
    assert not evidence.targets.one_read({"results": small})[0]


@pytest.mark.parametrize(("busy", "ok"), [(0.95, True), (0.949, False)])
def test_a_feed_must_keep_its_consumer_busy(evidence: ModuleType, busy: float, ok: bool) -> None:
    assert evidence.targets.feed_busy({"busy": busy})[0] is ok


def test_pixels_are_judged_by_the_worst_mean(evidence: ModuleType) -> None:
    def judge(*means: float) -> bool:
        rows = [{"decoder": "dali-cpu", "codec": "vp9", "mean": mean} for mean in means]
        return bool(evidence.targets.pixels_agree({"differences": rows})[0])

    allowed = evidence.targets.MEAN_DIFFERENCE
    assert judge(0.1, allowed) and not judge(allowed + 0.1, 0.1)
    with pytest.raises(ValueError, match="a second decoder"):
        judge()


@pytest.mark.parametrize(
    ("copies", "ok"),
    [
        ({}, True),
        ({"DtoD": {"largest": 900}, "HtoD": {"largest": 299}}, True),
        ({"DtoH": {"largest": 300}}, False),
    ],
)
def test_a_copy_that_could_hold_a_frame_fails(
    evidence: ModuleType, copies: dict[str, dict[str, int]], ok: bool
) -> None:
    data = {
        **{"refusal": None, "frame_bytes": 300, "on_device": True, "frames_by_pyav": 0},
        "copies": copies,
    }
    judge = evidence.targets.no_host_copies
    assert judge(data)[0] is ok
    assert not judge({**data, "on_device": False})[0]
    assert not judge({**data, "frames_by_pyav": 1})[0]
    with pytest.raises(ValueError, match="no NVDEC"):
        judge({"refusal": "no NVDEC"})
