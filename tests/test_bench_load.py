"""`bench serve` and bench_soak.py on small models: what they count is true; no times are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_soak
import pytest
import torch
from utils import tiny_checkpoint

from vtts_rt import bench
from vtts_rt.bench.model import moving_frames
from vtts_rt.video.writer import write_video


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("serve")
    checkpoint = tiny_checkpoint(folder / "tiny")
    clip = folder / "clip.mp4"
    write_video(clip, moving_frames(60, (96, 128)), source_fps=10)
    flags = ["--max-concurrency", "1,3", "--num-prompts", "4", "--num-videos", "2"]
    flags += ["--one-video", "3", "--model", str(checkpoint), "--video", str(clip)]
    return served(folder / "r", *flags)


def served(folder: Path, *flags: str) -> dict[str, Any]:
    """The result of a short run."""
    short = ["--max-tokens", "4", "--rounds", "2", "--threads", "1", "--result-dir", str(folder)]
    assert bench.main(["serve", *flags, *short]) == 0
    (written,) = folder.glob("*.json")
    loaded: dict[str, Any] = json.loads(written.read_text())
    return loaded


def test_a_level_has_the_fields_of_vllm_bench_serve(serve: dict[str, Any]) -> None:
    assert [level["max_concurrency"] for level in serve["sweep"]] == [1, 3]
    for level in serve["sweep"]:
        assert level["num_prompts"] == level["completed"] == 4
        assert level["total_output_tokens"] == sum(level["output_lens"]) == 4 * 2 * 4
        assert level["output_throughput"] == pytest.approx(32 / level["duration"])
        assert level["request_throughput"] == pytest.approx(4 / level["duration"])
        for name in ("ttft", "tpot", "itl", "e2el"):
            assert {f"{s}_{name}_ms" for s in ("mean", "median", "std", "p99")} <= set(level)
        assert 0 < level["median_ttft_ms"] < level["median_e2el_ms"] <= 1e3 * level["duration"]
        assert len(level["round_ttft_ms"]) == 2


def test_gaps_between_tokens_are_reported_only_without_drafts(
    serve: dict[str, Any], tmp_path: Path
) -> None:
    assert serve["setting"]["draft_tokens"] == 0
    clip = tmp_path / "clip.mp4"
    write_video(clip, moving_frames(20, (96, 128)), source_fps=10)
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    flags = ["--max-concurrency", "1", "--num-prompts", "1", "--one-video", "0"]
    flags += ["--draft-tokens", "3", "--model", str(checkpoint), "--video", str(clip)]
    drafted = served(tmp_path / "r", *flags)
    assert not any("itl" in name for name in drafted["sweep"][0])
    assert drafted["dtype"] == "bfloat16", "the checkpoint's own"
    assert "--device cpu" in drafted["command"] and "--dtype" not in drafted["command"]


def test_every_part_is_cold_and_shares_within_itself(serve: dict[str, Any]) -> None:
    one, three = serve["sweep"]
    # Two files, each decoded and encoded once however many ask.
    assert one["reuse"]["pairs_encoded"] == three["reuse"]["pairs_encoded"] > 0
    part, video_first = serve["one_video"]
    alone, together = part["separate"]["reuse"], part["shared"]["reuse"]
    for counter in ("pairs_encoded", "frames_decoded"):
        assert alone[counter] == 3 * together[counter] > 0
    assert together["pairs_encoded"] * 2 == one["reuse"]["pairs_encoded"]
    assert part["time_ratio"] == pytest.approx(
        part["shared"]["duration"] / part["separate"]["duration"]
    )
    assert [part["strategy"] for part in serve["one_video"]] == ["append", "append, video first"]
    assert video_first["shared"]["reuse"]["pairs_encoded"] == together["pairs_encoded"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-concurrency", "1,0"], "max_concurrency must be >= 1, got 0"),
        (["--max-concurrency", "none", "--one-video", "0"], "one_video must be >= 1, got 0"),
        (["--num-videos", "0"], "num_videos must be >= 1, got 0"),
    ],
)
def test_bad_flags_of_serve_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["serve", *flags])


def test_soak_mixes_requests_and_stays_within_its_budgets(tmp_path: Path) -> None:
    written = tmp_path / "soak.json"
    flags = ["--num-prompts", "40", "--num-warmups", "10", "--sample-every", "5", "--threads", "1"]
    flags += ["--frame-store-mib", "1", "--vision-cache-mib", "1", "--kv-mib", "8"]
    assert bench.script(bench_soak, [*flags, "--output-json", str(written)]) == 0
    result = json.loads(written.read_text())
    assert result["num_prompts"] == sum(result["outcomes"].values()) >= 40
    assert result["outcomes"]["closed"] > 0
    assert set(result["strategies"]) == {"official", "grid", "refresh", "append"}
    for cache in result["caches"].values():
        assert 0 < cache["peak_bytes"] <= cache["budget_bytes"]
    assert result["evictions"]["frame_store"] > 0
    measured = [(n, mb) for n, mb in result["rss_mb"] if n >= 10]
    assert len(measured) >= 5
    assert result["slope_mb_per_100_requests"] == pytest.approx(
        bench_soak.slope(measured), abs=0.05
    )
    assert result["warm_rss_mb"] == pytest.approx(measured[0][1], abs=0.01)
    assert result["peak_rss_mb"] == pytest.approx(max(mb for _, mb in result["rss_mb"]), abs=0.01)


def test_the_slope_is_that_of_the_line_through_the_samples() -> None:
    line = [(number, 500.0 + 0.02 * number) for number in range(200, 1000, 10)]
    assert bench_soak.slope(line) == pytest.approx(2.0)
    noisy = [(number, mb + (-1) ** index) for index, (number, mb) in enumerate(line)]
    assert bench_soak.slope(noisy) == pytest.approx(2.0, abs=0.1)


def test_a_warm_up_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_warmups must be two readings below num_prompts"):
        bench.script(bench_soak, ["--num-prompts", "20", "--num-warmups", "15"])
