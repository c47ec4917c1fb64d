"""What runs on a GPU is rehearsed on the CPU: the script, its benches and their JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_device
import pytest
import torch
from shapes import SHAPES, make_twins, model_config

from vtts_rt.bench import script

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--shape", "1m", "--seconds", "6", "--height", "112", "--pairs", "1"]
TINY += ["--prefill", "24", "--max-tokens", "2", "--repeats", "1", "--threads", "1"]


def test_the_shapes_are_the_released_ones() -> None:
    assert set(SHAPES) >= {"7b", "3b", "118m"}
    config = model_config("7b")
    assert (config.language.hidden_size, config.vision.hidden_size) == (3584, 1280)
    assert config.language.head_dim == model_config("3b").language.head_dim == 128
    with pytest.raises(ValueError, match="shape must be one of"):
        model_config("70b")


def test_twins_hold_the_same_weights_and_say_the_same() -> None:
    twins = make_twins("1m", torch.float32, "cpu")
    theirs = dict(twins.hf_model.named_parameters())
    table = theirs["model.language_model.embed_tokens.weight"]
    assert torch.equal(twins.model.language.embed_tokens.weight, table)
    rows = torch.randn(16, 1176)
    grid = torch.tensor([(1, 4, 4)])
    with torch.inference_mode():
        ours = twins.model.visual(rows, [(1, 4, 4)])
        expected = twins.hf_model.model.visual(rows, grid_thw=grid).pooler_output
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_rounds_tower_and_prefill_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    assert script(bench_device, [*TINY, "--rounds", "2", "--output-json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result["parts"]) == {"vision", "prefill"}
    names = {entry["name"]: entry for entry in result["comparisons"]}
    assert set(names) == {"official", "append"}
    assert names["official"]["same_frames"] and all(names["official"]["equal_tokens"])
    assert all(len(run["rounds"]) == 2 for run in result["contenders"].values())


# A site-packages without PyAV and Qwen's ranks: find_spec says so too, as transformers asks it.
HIDING = """
import importlib.machinery

whole = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name in ("av", "dashscope") else whole(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
"""


def test_rounds_of_an_array_need_neither_pyav_nor_qwens_ranks(tmp_path: Path) -> None:
    """The machines with a GPU have neither."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    code = f"import sys; sys.path.append({str(ROOT / 'bench')!r}); import bench_device; "
    code += "from vtts_rt.bench import script; assert 'av' not in sys.modules; "
    code += f"sys.exit(script(bench_device, {[*TINY, '--rounds', '1']!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_script_rehearses_and_leaves_json(tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(ROOT / "bench" / "gpu.sh"), "--rehearse"],
        env=env,
        capture_output=True,
        text=True,
        timeout=420,
    )
    log = (tmp_path / "gpu.log").read_text()
    assert done.returncode == 0, done.stdout + log[-3000:]
    assert "FAILED" not in done.stdout
    for theme in ("errors", "ops", "device1m", "processor"):
        (path,) = tmp_path.glob(f"{theme}_*.json")
        assert json.loads(path.read_text())["results" if theme != "device1m" else "parts"]
    (path,) = tmp_path.glob("treestepfloat32_*.json")
    assert json.loads(path.read_text())["runs"][0]["times_as_fast"]
    for step in ("env", "errors", "ops", "processor", "device 1m", "tree float32/140/3"):
        assert f"== {step}: " in done.stdout


@pytest.mark.slow
def test_a_failed_step_fails_the_script_and_stops_no_other(tmp_path: Path) -> None:
    """With a Python that knows nothing of the package every step fails, and is named."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    env = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    command = [str(ROOT / "bench" / "gpu.sh"), "--rehearse"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    for step in ("env", "errors", "ops", "device 1m"):
        assert f"== FAILED: {step}" in done.stdout


@pytest.mark.slow
def test_a_step_for_which_no_time_is_left_has_failed(tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "SECONDS_IN_ALL": "0"}
    command = [str(ROOT / "bench" / "gpu.sh"), "--rehearse"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "== ops: no time left" in done.stdout and "== FAILED: ops" in done.stdout
