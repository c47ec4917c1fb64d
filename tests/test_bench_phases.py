"""bench_phases.py on a small model: what it counts is true; no times are judged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import bench_phases
import pytest
import report
import torch
from report.ops import TABLES
from utils import tiny_checkpoint

from vtts_rt import bench
from vtts_rt.bench.model import moving_frames
from vtts_rt.models.checkpoint import EXTRAS_FILE
from vtts_rt.models.registry import load_model
from vtts_rt.ops.dispatch import Op
from vtts_rt.video.writer import write_video

MAX_TOKENS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    budgets = {"total_pixels": 64 * 28 * 28, "min_pixels": 4 * 28 * 28}
    (folder / EXTRAS_FILE).write_text(json.dumps({"perception": budgets}))
    return folder


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("phases")
    clip = folder / "clip.mp4"
    write_video(clip, moving_frames(60, (96, 128)), source_fps=10)
    flags = ["--max-tokens", str(MAX_TOKENS), "--rounds", "2", "--threads", "1", "--repeats", "1"]
    flags += ["--runs", "1", "--model", str(checkpoint), "--video", str(clip)]
    before = Op.choose, os.environ.get("VTTS_RT_BACKEND")
    sides = torch.ones(8, 8), torch.ones(8, 8)
    with pytest.MonkeyPatch.context() as patch:  # what only measures the machine is made short
        patch.setattr(bench_phases, "_CACHES", 1 << 16)
        patch.setattr(bench_phases, "product_sides", lambda *_: sides)
        assert bench.script(bench_phases, [*flags, "--result-dir", str(folder / "r")]) == 0
    assert (Op.choose, os.environ.get("VTTS_RT_BACKEND")) == before
    (written,) = (folder / "r").glob("phases_*.json")
    loaded: dict[str, Any] = json.loads(written.read_text())
    return loaded


def ops_of(run: dict[str, Any], phase: str, *kinds: str) -> list[dict[str, Any]]:
    return [op for op in run["ops"] if op["phase"] == phase and (not kinds or op["op"] in kinds)]


def test_every_product_of_a_question_is_counted(result: dict[str, Any], checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype="float32", device="cpu")
    patches = [
        (path, module)
        for path, module in model.visual.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    layers = model.config.language.num_hidden_layers
    assert [run["dtype"] for run in result["runs"]] == ["float32", "bfloat16"]
    for run in result["runs"]:
        rounds = run["question"]["rounds"]
        pairs = sum(look["reuse"]["pairs_encoded"] for look in rounds)
        products = ops_of(run, "vision", "linear")
        embeds = [op for op in products if op["name"] == "patch_embed"]
        rows = sum(sum(op["calls"]) * op["rows"] for op in embeds)
        assert rows and rows % pairs == 0
        counted = sum(sum(op["calls"]) * op["gflop"] for op in products)
        known = sum(
            2 * (rows // 4 if path.startswith("merger") else rows) * m.in_features * m.out_features
            for path, m in patches
        )
        assert counted * 1e9 == pytest.approx(known)
        steps = MAX_TOKENS - 1
        by_name = {op["name"]: op for op in ops_of(run, "a token", "linear")}
        assert set(by_name) == {"qkv", "o", "gate_up", "down", "head"}
        for name, op in by_name.items():
            assert op["calls"] == [steps * (1 if name == "head" else layers)] * 2
            assert op["rows"] == 1
        # All prompt tokens of the first round go through every layer but the last.
        prefilled = [op for op in ops_of(run, "prefill", "linear") if op["name"] == "qkv"]
        tokens = sum(op["calls"][0] * op["rows"] for op in prefilled)
        assert tokens == layers * rounds[0]["reuse"]["tokens_prefilled"]


def test_a_step_of_eight_reads_the_same_weights(result: dict[str, Any]) -> None:
    for run in result["runs"]:
        one, eight = (ops_of(run, phase, "linear") for phase in ("a token", "8 tokens"))
        assert [op["mb"] for op in one] == [op["mb"] for op in eight]
        for a, b in zip(one, eight, strict=True):
            assert b["gflop"] == pytest.approx(8 * a["gflop"]) and b["calls"] == []


def test_phases_are_made_of_what_was_noted(result: dict[str, Any]) -> None:
    for run in result["runs"]:
        assert run["peak_gflops"] > 0 and run["read_gb_per_second"] > 0
        assert run["token_weights_mb"] > 0
        phases = {phase["phase"]: phase for phase in run["phases"]}
        assert list(phases) == [
            *("preprocess", "vision", "prefill", "a token", "first round", "all 2 rounds")
        ]
        for phase in phases.values():
            made = sum(phase[part] for part in ("products", "attention", "others", "between"))
            assert made == pytest.approx(phase["ms"], abs=0.01)
        parts = [phases[name] for name in ("preprocess", "vision", "prefill")]
        tokens = (MAX_TOKENS - 1) * phases["a token"]["products"]
        found = sum(part["products"] for part in parts) + tokens
        assert phases["first round"]["products"] == pytest.approx(found, abs=0.02)
        assert phases["preprocess"]["others"] > 0 == phases["preprocess"]["floor"]


def test_a_narrow_types_peak_is_at_least_a_wider_ones(result: dict[str, Any]) -> None:
    wide, narrow = result["runs"]
    assert narrow["peak_gflops"] >= wide["peak_gflops"]
    assert "float32" in wide["peak_of"]


def test_tables_are_made_of_a_result(result: dict[str, Any], tmp_path: Path) -> None:
    names = [name for name, (theme, _) in TABLES.items() if theme == "phases"]
    blocks = "".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in names)
    (tmp_path / "README.md").write_text(blocks)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    path = tmp_path / "bench" / "results" / "phases_cpu-2_202611.json"
    path.write_text(json.dumps(result))
    assert report.main(["--root", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    for line in ("| vision: gate_up |", "| a token: head |", "| 8 tokens: head |"):
        assert line in text
    assert "| all 2 rounds, bfloat16 |" in text


def test_flags_that_do_not_fit_are_named() -> None:
    for flags, message in (
        (["--strategy", "append,official"], "strategy must be one"),
        (["--max-tokens", "1"], "max_tokens must be >= 2, got 1"),
        (["--dtype", "float8"], "dtype must be of float32"),
    ):
        with pytest.raises(ValueError, match=message):
            bench.script(bench_phases, flags)
