"""`vtts-rt rollout`: a manifest to a journal, and on from there."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtts_rt import cli
from vtts_rt.rollout.journal import read_journal


@pytest.fixture(scope="module")
def manifest(clips: list[Path]) -> Path:
    folder = clips[0].parent
    rows = [{"video": f"{'ab'[i % 2]}.mp4", "question": f"which {i}?"} for i in range(3)]
    rows.append({"video": "none.mp4", "question": "which?"})
    (folder / "rows.json").write_text(json.dumps(rows))
    entry = {"media_type": "video", "task_type": "gqa", "visual_base": "", "json_path": "rows.json"}
    (folder / "manifest.json").write_text(json.dumps({"set": entry}))
    return folder / "manifest.json"


def flags(manifest: Path, checkpoint: Path, out: Path) -> list[str]:
    words = ["rollout", str(manifest), "--model", str(checkpoint), "--out", str(out)]
    words += ["--num-answers", "2", "--max-tokens", "4", "--strategy", "append", "--rounds", "2"]
    return [*words, "--sample-fps", "1", "--min-pixels", "3136", "--total-pixels", "60000"]


def contents(path: Path) -> dict[str, list[list[int]]]:
    return {
        found.group_id: [row.token_ids.tolist() for row in found.rows]
        for found in read_journal(path)
    }


def test_a_manifest_becomes_a_journal(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "journal"
    command = flags(manifest, checkpoint, out)
    assert cli.main([*command, "--limit", "1"]) == 0
    done = len(contents(out))
    assert 1 <= done <= 3
    assert cli.main([*command, "--resume"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"{3 - done} groups of 2 in " in said[-1] and "0 failed, 1 rows skipped" in said[-1]
    assert len(contents(out)) == 3
    assert cli.main(command) == 2  # it is there already
    assert cli.main([*command, "--resume", "--temperature", "0.5"]) == 2
    assert cli.main([*command, "--resume", "--epochs", "0"]) == 2
    errors = capsys.readouterr().err.splitlines()
    for error, text in zip(errors[-3:], ("path must be a new", "made_with must", "epochs must"), strict=True):  # fmt: skip  # noqa: E501
        assert text in error


@pytest.mark.slow
def test_a_killed_command_goes_on(manifest: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "journal"
    assert cli.main(flags(manifest, checkpoint, whole)) == 0
    command = [sys.executable, "-m", "vtts_rt.cli", *flags(manifest, checkpoint, out), "--resume"]
    for _ in range(8):
        process = subprocess.Popen(command, cwd=tmp_path)
        time.sleep(random.random() * 12)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert contents(out) == contents(whole)
    two = tmp_path / "two"
    assert cli.main([*flags(manifest, checkpoint, two), "--workers", "2"]) == 0
    assert contents(two) == contents(whole)
