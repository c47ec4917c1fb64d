"""Generated tables: what is between the markers comes from the result files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report

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


def test_rounds_stand_in_every_dtype_and_headlines_rest_on_no_drafts(checkout: Path) -> None:
    timings = {"decode": 900.4, "preprocess": 2, "vision": 30, "prefill": 4, "generate": 5}
    look = {
        "index": 0,
        "num_frames": 29,
        "prompt_tokens": 2000,
        "completion_tokens": 32,
        "timings_ms": {**timings, "total": 1234.0, "ttft": 937},
    }
    reuse = {"frames_decoded": 8, "pairs_encoded": 4, "tokens_prefilled": 99, "tokens_reused": 1}

    def run(dtype: str, seconds: float, differences: list[str]) -> dict[str, object]:
        ours = {"median_latency": seconds, "rounds": [{**look, "reuse": reuse}]}
        official = {"name": "official", "baseline": "loop", "speedup": 4 / seconds}
        return {
            "dtype": dtype,
            "contenders": {
                "loop": {"median_latency": 4.0, "rounds": [{**look, "reuse": None}]},
                "official": ours,
                "official, same question again": ours,
                "official with drafts": ours,
            },
            "comparisons": [
                {**official, "same_work": True, "differences": differences},
                {**official, "name": "append", "same_work": False, "differences": None},
            ],
        }

    data = {
        "hardware": {"cpu": "A CPU", "gpu": None, "threads": 2},
        "runs": [run("float32", 2.0, []), run("bfloat16", 1.0, [])],
        "vllm": {
            **{"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0", "threads": 2},
            **{"compiled": False, "ld_preload": ["libiomp5.so"], "enable_prefix_caching": True},
        },
    }
    path = checkout / "bench" / "results" / "rounds_cpu_202611.json"
    path.write_text(json.dumps(data))
    rounds = report.table("rounds", checkout)
    assert "| seconds | float32 | times as fast | bfloat16 | times as fast |" in rounds
    assert (
        "| loop | 4.00 | 1.00 | 4.00 | 1.00 |\n| official | 2.00 | 2.00 | 1.00 | 4.00 |" in rounds
    )
    said = "against the loop, times as fast: 2.00 in float32, 4.00 in bfloat16"
    assert f"- `official` {said} (same frames and prompts).\n" in rounds
    assert f"- `append` {said} (same spans, but other frames and another prompt).\n" in rounds
    assert "vLLM 0.32.0 (torch 2.13.0, transformers 5.19.0)" in rounds
    assert "eager mode, 2 threads, libiomp5.so preloaded, prefix caching on." in rounds
    assert "A CPU, 2 threads" in rounds
    phases = report.table("phases", checkout)
    assert (
        "| loop, float32, 1 | 900 | 2 | 30 | 4 | 5 | 1,234 | 937 | 29 | 15 | 2,000 | 0 |" in phases
    )
    assert (
        "| official, bfloat16, 1 | 900 | 2 | 30 | 4 | 5 | 1,234 | 937 | 8 | 4 | 99 | 1 |" in phases
    )
    assert "again" not in phases and "drafts" not in phases
    data["runs"] = [run("float32", 2.0, []), run("bfloat16", 1.0, ["sizes of round 2: 1 and 2"])]
    path.write_text(json.dumps(data))
    assert "(not the same work: sizes of round 2: 1 and 2 in bfloat16)" in report.table(
        "rounds", checkout
    )


def file(checkout: Path, theme: str, data: dict[str, object]) -> str:
    """File a result and return the table of its theme."""
    path = checkout / "bench" / "results" / f"{theme}_cpu_202611.json"
    path.write_text(json.dumps(data))
    return report.table(theme, checkout)


def test_ablations_are_shares_of_the_whole_of_their_strategy(checkout: Path) -> None:
    seconds = {"append": 4.0, "append without prefix cache": 6.0, "official": 10.0}
    contenders = {}
    for name, median in seconds.items():
        contenders[name] = {"median_latency": median}
        contenders[f"{name}, another question"] = {"median_latency": median / 2}
    runs = [{"dtype": "float32", "contenders": contenders}]
    text = file(checkout, "ablations", {"runs": runs})
    assert "| append, float32 | 4.00 | 2.00 | 1.00 | 1.00 |" in text
    assert "| append without prefix cache, float32 | 6.00 | 3.00 | 1.50 | 1.50 |" in text
    assert "| official, float32 | 10.00 | 5.00 | 1.00 | 1.00 |" in text


LEVEL = {
    **{"strategy": "append", "max_concurrency": 8, "num_prompts": 8, "duration": 20.04},
    **{"output_throughput": 38.4, "median_ttft_ms": 2500.0, "median_tpot_ms": 40.4},
    **{"median_e2el_ms": 19000.0, "reuse": {"pairs_encoded": 24, "tokens_prefilled": 26848}},
}
SETTING = {"video": "real", "draft_tokens": 0}
SERVED = "8 | 8 | 20.0 | 38.4 | 2.50 | 40 | 19.00 | 24 | 26,848 |"


def test_concurrency_has_a_line_for_each_level(checkout: Path) -> None:
    data = {"setting": {**SETTING, "num_videos": 4}, "dtype": "float32", "sweep": [LEVEL]}
    text = file(checkout, "serve", data)
    assert text.startswith("\n| 4 videos | concurrency | questions |")
    assert f"| `append` | {SERVED}" in text and "real video, float32, no drafts." in text


def test_times_of_a_token_are_reported_only_without_drafts(checkout: Path) -> None:
    setting = {**SETTING, "num_videos": 4, "draft_tokens": 15}
    text = file(checkout, "serve", {"setting": setting, "dtype": "float32", "sweep": [LEVEL]})
    assert f"| `append` | {SERVED.replace('| 40 |', '|  |')}" in text
    assert "drafts of up to 15 tokens." in text


def test_requests_about_one_video_stand_beside_each_alone(checkout: Path) -> None:
    alone = {**LEVEL, "max_concurrency": 1}
    part = {"strategy": "append", "shared": LEVEL, "separate": alone, "time_ratio": 0.3}
    data = {"setting": SETTING, "dtype": "float32", "one_video": [part]}
    text = file(checkout, "onevideo", data)
    assert f"| `append`, together | {SERVED}" in text
    assert "| `append`, each alone and cold | 1 | 8 |" in text
    assert "Together over alone: 0.30 with `append`." in text


def test_soak_says_what_memory_did(checkout: Path) -> None:
    numbers = {
        "loaded_rss_mb": 444.4,
        "warm_rss_mb": 520.6,
        "peak_rss_mb": 530.0,
        "budget_mb": 14.0,
    }
    data = {
        **{"num_prompts": 1000, "duration": 90.0, "slope_mb_per_100_requests": 0.52},
        **numbers,
        "outcomes": {"closed": 100, "max_rounds": 900},
    }
    text = file(checkout, "soak", data)
    assert "| 1,000 | 1.5 | 444.4 | 520.6 | 530.0 | 14.0 | +0.52 |" in text
    assert "How they ended: 100 closed, 900 max_rounds." in text


def test_patchify_has_a_line_for_each_contender(checkout: Path) -> None:
    entry = {"num_threads": 2, "median_ms": 33.3, "min_ms": 30.0, "max_ms": 41.0}
    data = {"results": [{"name": "avx2", **entry, "speedup": 4.04}], "hardware": {"cpu": "A CPU"}}
    path = checkout / "bench" / "results" / "patchify_cpu2_202611.json"
    path.write_text(json.dumps(data))
    text = report.table("patchify", checkout)
    assert "| avx2, 2 threads | 33 | 30 | 41 | 4.0 |" in text
    assert "`patchify_cpu2_202611.json`, A CPU." in text


def test_quantization_stands_beside_float32(checkout: Path) -> None:
    steps = [("float32", 1, 9, 20.04), ("int8", 1, 9, 10.02)]
    about = {"model": "tiny", "strategy": "append", "num": 9, "seed": 3, "split": "held_out"}
    data = {
        "decode": [
            {"name": name, "sequences": sequences, "rows": rows, "median_ms": ms}
            for name, sequences, rows, ms in steps
        ],
        "accuracy": [
            {"name": name, **about, "rounds": [{"rounds": 3, "accuracy": accuracy}]}
            for name, accuracy in (("float32", 0.75), ("int8", 0.5))
        ],
    }
    text = file(checkout, "quantization", data)
    assert "| 1 sequence of 9 | 20.0 | 10.0 | 2.00 |" in text
    assert "| float32 | 75.0 % |\n| int8 | 50.0 % |" in text
    assert "tiny, `append`, 9 clips from seed 3, split held_out." in text


def test_strategies_are_compared_by_what_they_keep_and_by_accuracy(checkout: Path) -> None:
    share = {"strategy": "grid", "duration_seconds": 20, "frames": 0.95, "prefix": 0.375}
    looks = [{**LOOK, "rounds": number, "accuracy": number / 4} for number in (1, 2)]
    data = {
        **{"plans": 50, "num": 9, "seed": 3},
        "kept": [
            {**share, "round": 2, "pairs": 0.9, "tokens": 2881.4},
            {**share, "round": 3, "pairs": 0.8, "tokens": 2710.0},
        ],
        "accuracy": [{"model": "tiny", "split": "held_out", "strategy": "grid", "rounds": looks}],
    }
    path = checkout / "bench" / "results" / "strategies_cpu_202611.json"
    path.write_text(json.dumps(data))
    kept = report.table("kept", checkout)
    assert "| round 2: frames | pairs | prefix | prompt tokens | round 3: frames | pairs |" in kept
    shares = "95.0 % | 90.0 % | 37.5 % | 2,881 | 95.0 % | 80.0 % | 37.5 % | 2,710"
    assert f"| `grid`, 20 s | {shares} |\n" in kept and "over 50 random clues" in kept
    accuracy = report.table("strategies", checkout)
    assert "| accuracy | 1 round | 2 rounds | visual tokens | ms a question |" in accuracy
    assert "| `grid` | 25.0 % | 50.0 % | 1,234 | 21 |" in accuracy
    assert "tiny, 9 clips from seed 3, split held_out." in accuracy


def video_row(name: str, pattern: str, ms: float) -> dict[str, object]:
    case = {"codec": "h264", "gop": 250, "pattern": pattern, "name": name}
    return {**case, "median_ms": ms, "cpu_ms": ms / 2, "again_speedup": 1234.4}


def test_decoders_stand_beside_each_other(checkout: Path) -> None:
    rows = [video_row("pyav", "uniform", 1400.4), video_row("opencv", "uniform", 1600)]
    data = {
        "setting": {"duration_seconds": 60, "width": 1280, "height": 720},
        "results": [*rows, video_row("pyav", "spans", 800)],
        "comparisons": [
            {
                "codec": "h264",
                "gop": 250,
                "pattern": "uniform",
                "peer": "opencv",
                "time_ratio": 0.875,
            }
        ],
        "peers": {"opencv": "5.0.0"},
        "absent": {"torchcodec": "it does not load"},
        "differences": [
            {
                "decoder": "dali-cpu",
                "codec": "vp9",
                "num_frames": 2048,
                "max": 77,
                "p999": 15,
                "mean": 1.302,
            }
        ],
    }
    text = file(checkout, "video", data)
    assert (
        "| H.264, GOP 250, uniform | 1,400 / 700 | 1,600 / 800 | 0.88 of opencv | 1,234 |" in text
    )
    assert "| H.264, GOP 250, spans | 800 / 400 |  |  | 1,234 |" in text
    assert "Files of 60 s of 1280x720 px. Peers: opencv 5.0.0." in text
    assert "torchcodec took no part: it does not load." in text
    pixels = report.table("differences", checkout)
    assert "| dali-cpu, VP9 | 2,048 | 77 | 15 | 1.30 |" in pixels


def test_opening_stands_beside_reading(checkout: Path) -> None:
    rows = [
        {"height": 720, "name": name, "cold": cold, "seconds": seconds}
        for name, cold, seconds in (
            ("one read", False, 0.121),
            ("open", False, 0.5),
            ("open", True, 2),
        )
    ]
    files = [{"height": 720, "width": 1280, "bytes": 558471625}]
    setting = {"duration_seconds": 7200, "source_fps": 30, "files": files}
    text = file(checkout, "open", {"setting": setting, "results": rows})
    assert "| 1280x720, 558 MB: one read |  | 0.12 |" in text
    assert "| 1280x720, 558 MB: open | 2.00 | 0.50 |" in text
    assert "Files of 2 h at 30 fps." in text


def test_agreement_has_a_line_for_each_codec(checkout: Path) -> None:
    row = {
        **{"codec": "vp9", "seed": 7, "num": 200, "accuracy": {"pyav": 0.8, "dali": 0.805}},
        **{"same_answer": 0.985, "same_clues": 0.9, "same_text": 0.89},
    }
    text = file(checkout, "agreement", {"model": "tiny", "results": [row]})
    assert "| VP9 | 98.5 % | 90.0 % | 89.0 % | 80.0 % | 80.5 % |" in text
    assert "tiny, 200 clips of each codec from seed 7." in text


def test_writing_twice_changes_nothing(checkout: Path) -> None:
    write(checkout, "needle_cpu_202611.json")
    report.main(["--root", str(checkout)])
    once = (checkout / "README.md").read_text()
    report.main(["--root", str(checkout)])
    assert (checkout / "README.md").read_text() == once


def test_check_changes_nothing_and_reports(
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
