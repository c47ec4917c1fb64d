"""Flags that every bench takes: --device and --dtype."""

from __future__ import annotations

import argparse
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_cases import cases
from utils import tiny_checkpoint

from vtts_rt import bench
from vtts_rt.bench.setting import dtype_of

SCRIPTS = sorted((Path(__file__).parents[1] / "bench").glob("bench_*.py"))
NO_DTYPE = ("decode", "bench_feed.py", "bench_open.py", "bench_nvdec.py")  # frames of 8 bits
NO_DTYPE += ("bench_grpo.py",)  # the trainer's is float32


def flags_of(capsys: pytest.CaptureFixture[str], run: Callable[[], object]) -> set[str]:
    """The long flags that --help names."""
    with pytest.raises(SystemExit, match="0"):
        run()
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize("kind", ["rounds", "serve", "ops", "decode"])
def test_every_bench_takes_a_device_and_a_dtype(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags_of(capsys, lambda: bench.main([kind, "--help"]))
    assert "--device" in flags and ("--dtype" in flags) == (kind not in NO_DTYPE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_bench_script_takes_a_device_and_a_dtype(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr("sys.argv", [script.name, "--help"])
    flags = flags_of(capsys, lambda: runpy.run_path(str(script), run_name="__main__"))
    assert "--device" in flags and ("--dtype" in flags) == (script.name not in NO_DTYPE)


def test_the_dtype_is_the_checkpoints_own_unless_asked_for(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    assert dtype_of(argparse.Namespace(dtype=None), folder) == "bfloat16"
    assert dtype_of(argparse.Namespace(dtype="float32"), folder) == "float32"


def test_ops_are_timed_in_the_dtype_that_is_asked_for() -> None:
    for asked, dtype in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        assert next(cases("rmsnorm", "cpu", "bench", asked)).dtype is dtype
    checked = {case.dtype for case in cases("rmsnorm", "cpu", "check", torch.float16)}
    assert checked == {torch.float16}
