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


def test_rewards_of_the_command(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"video": "a.mp4", "question": "which?", "answer": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    entry = {"media_type": "video", "task_type": "gqa", "visual_base": str(manifest.parent)}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"set": {**entry, "json_path": "rows.json"}}))
    out = tmp_path / "journal"
    command = flags(path, checkpoint, out)
    for wrong, text in (
        (["nice=1"], "name must be one of"),
        (["clue_spans@x=1"], "name must be one of"),
        (["answer=much"], "reward must be NAME=WEIGHT with a finite number, got 'answer=much'"),
        (["answer"], "reward must be NAME=WEIGHT with a finite number"),
        (["answer=inf"], "reward must be NAME=WEIGHT with a finite number"),
        (["answer=1", "answer=2"], "reward must be named once, got 'answer'"),
    ):
        assert cli.main([*command, *(f"--reward={one}" for one in wrong)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert text in error
    for more, text in (
        (["--temperature", "0"], "temperature must be above 0"),
        (["--num-answers", "1"], "num_answers must be 2 or more, got 1"),
        (["--max-groups", "0"], "max_groups must be 1 or more, got 0"),
    ):
        assert cli.main([*command, *more]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert text in error
    assert not out.exists()  # or what is right then would not go on with it
    rewarded = [*command, "--reward", "answer=2", "--reward", "tokens_cost=0.25"]
    assert cli.main(rewarded) == 0
    (found,) = read_journal(out)
    for row in found.rows:
        cost = -sum(seen.length for seen in row.vision) / 1000
        assert row.reward_parts == pytest.approx({"answer": 0.0, "tokens_cost": cost})
        assert row.reward == pytest.approx(0.25 * cost) and cost < 0
    capsys.readouterr()
    assert cli.main([*command, "--resume", "--reward", "answer=1"]) == 2
    assert "made_with must be that of" in capsys.readouterr().err


def test_a_row_that_a_reward_cannot_judge_loses_nothing(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, str]] = [
        {"video": "a.mp4", "question": "which?", "answer": "red"},
        {"video": "a.mp4", "question": "and?"},
    ]
    entry = {"media_type": "video", "task_type": "gqa", "visual_base": str(manifest.parent)}
    path, out = tmp_path / "manifest.json", tmp_path / "journal"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path.write_text(json.dumps({"set": {**entry, "json_path": "rows.json"}}))
    command = [*flags(path, checkpoint, out), "--max-groups", "1", "--reward", "answer=1"]
    for more in ([], ["--resume"]):
        assert cli.main([*command, *more]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "row must be one with answer, which reward 'answer' compares with" in error
        assert len(contents(out)) == 1


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
