"""`bench decode` on tiny files: what it compares and counts is true; no times are judged."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import differences
import numpy as np
import pytest
from bench_agreement import agreement

from vtts_rt import bench
from vtts_rt.bench import readers, video
from vtts_rt.bench.encodings import encode
from vtts_rt.bench.model import moving_frames
from vtts_rt.runtime import Runtime
from vtts_rt.video.decoders import dali_refusal

needs_dali = pytest.mark.skipif(dali_refusal(None) is not None, reason="no DALI")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("decode")
    flags = ["--small", "--repeats", "1", "--clips", "1", "--cache-dir", str(folder / "cache")]
    assert bench.main(["decode", *flags, "--result-dir", str(folder / "r")]) == 0
    assert len(list((folder / "cache").iterdir())) == len(video.FILES)
    (written,) = (folder / "r").glob("video_*.json")
    loaded: dict[str, Any] = json.loads(written.read_text())
    return loaded


def rows(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in result["results"] if row["name"] == name]


def test_ours_is_measured_in_every_case_with_an_index_cache_and_without(
    result: dict[str, Any],
) -> None:
    cases = [(c, g, p) for c, g in video.FILES for p in ("uniform", "spans")]
    for name in ("pyav", "pyav, indexed before"):
        assert [(r["codec"], r["gop"], r["pattern"]) for r in rows(result, name)] == cases
    frames = {row["pattern"]: row["num_frames"] for row in result["results"]}
    assert frames == {"uniform": 30, "spans": 32}
    assert result["failures"] == []


def test_times_fit_together(result: dict[str, Any]) -> None:
    for row in result["results"]:
        whole = row["opening_ms"] + row["decoding_ms"]
        assert row["median_ms"] == pytest.approx(whole)  # of a single run
        assert row["frames_per_second"] == pytest.approx(1e3 * row["num_frames"] / whole)
        assert row["again_speedup"] == pytest.approx(row["decoding_ms"] / row["again_ms"])


def test_a_reader_left_out_has_a_reason(result: dict[str, Any]) -> None:
    able, absent = readers.contenders(Path("unused"))
    assert result["absent"] == absent
    there = {contender.name for contender in able} | set(absent)
    assert there == {
        "pyav",
        "pyav, indexed before",
        *("dali-cpu", "dali-nvdec", "decord", "opencv", "torchcodec"),
    }
    assert {row["name"] for row in result["results"]} == {c.name for c in able}
    for row in result["skipped"]:
        assert row["name"] == "dali-cpu" and row["case"].startswith("h264")


def test_comparisons_are_with_the_fastest_peer(result: dict[str, Any]) -> None:
    peers = {c.name for c in readers.contenders(Path("unused"))[0] if not c.ours}
    if not peers:
        assert result["comparisons"] == []
    for found in result["comparisons"]:
        case = {name: found[name] for name in ("codec", "gop", "pattern")}
        times = {r["name"]: r["median_ms"] for r in result["results"] if case.items() <= r.items()}
        best = min(times[name] for name in peers)
        assert found["time_ratio"] == pytest.approx(times["pyav"] / best)
        assert times[found["peer"]] == best


@needs_dali
def test_pixels_of_dali_are_near_pyavs(result: dict[str, Any]) -> None:
    assert [(r["decoder"], r["codec"]) for r in result["differences"]] == [
        ("dali-cpu", "vp9"),
        ("dali-cpu", "mjpeg"),
    ]
    for row in result["differences"]:
        assert row["num_frames"] == differences.FRAMES_PER_CLIP
        assert 0 < row["mean"] < 2.5 and row["mean"] < row["p999"] <= row["max"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "repeats must be >= 1, got 0"),
        (["--codec", "h264,divx"], "codec must be one of h264, vp9, mjpeg, got 'divx'"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["decode", "--small", *flags])


def test_a_peer_that_gives_other_frames_is_not_timed(tmp_path: Path) -> None:
    """The neighbouring frame is too far off to pass for the one asked for."""

    class Late:
        def __init__(self, path: Path) -> None:
            self._reader = pyav.open(path)

        def frames(self, indices: list[int]) -> Any:
            return self._reader.frames([index + 1 for index in indices])

        def close(self) -> None:
            self._reader.close()

    pyav = readers.contenders(tmp_path)[0][0]
    path = encode(tmp_path / "clip", moving_frames(30, (120, 160)), "h264", source_fps=30)
    case = video._Case("h264", 12, "uniform", path, ((0, 5, 9), (20, 28)))
    here, why_not, wrong = video._checked(case, [pyav, readers.Contender("late", Late)])
    assert [contender.name for contender in here] == ["pyav"] and not why_not
    assert "levels off PyAV's" in wrong["late"]


def test_a_library_that_does_not_load_is_absent_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("cv2", "decord") or name.startswith("torchcodec"):
            raise OSError(f"{name}: a shared object is missing\nand more")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    able, absent = readers.contenders(Path("unused"))
    assert all(contender.ours for contender in able)
    assert absent["decord"] == "OSError: decord: a shared object is missing"
    assert absent["torchcodec"].startswith("OSError: torchcodec")


def test_differences_do_not_wrap() -> None:
    a, b = np.array([0, 255, 7], np.uint8), np.array([255, 0, 9], np.uint8)
    assert readers.absolute(a, b).tolist() == [255, 255, 2]
    counts = np.bincount(readers.absolute(a, b), minlength=256)
    assert differences._summary(counts) == {"max": 255, "p999": 255, "mean": 512 / 3}


@needs_dali
def test_agreement_counts_what_two_decoders_are_answered() -> None:
    with Runtime.from_pretrained("tiny", device="cpu") as runtime:
        found = agreement(runtime, codec="mjpeg", seed=40000, num=2)
        with pytest.raises(RuntimeError, match="does not decode .mp4 files here; pyav does"):
            agreement(runtime, codec="h264", seed=40000, num=1)
    assert found["num"] == 2 and found["codec"] == "mjpeg"
    assert found["same_text"] <= found["same_clues"]
    assert len(found["differences"]) == round(2 * (1 - found["same_text"]))
    assert set(found["accuracy"]) == {"pyav", "dali"}
