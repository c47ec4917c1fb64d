"""`vtts-rt rollout`: a manifest to a journal, and on from there."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from vtts_rt import Ask, RolloutGroup, Runtime, cli, workers
from vtts_rt.rollout.journal import read_journal
from vtts_rt.workers import WorkerDied


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
    assert cli.main(command) == 2 and not out.exists()
    first, last = capsys.readouterr().err.splitlines()
    none = manifest.parent / "none.mp4"
    where = f"{manifest.parent / 'rows.json'}, row 4"
    assert first == f"{where}: row: media must be a file, got '{none}'"
    assert last == "vtts-rt rollout: 1 bad (--skip-bad leaves them out)"
    command.append("--skip-bad")
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


def test_a_file_that_cannot_be_opened_ends_the_run_where_it_comes_up(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.mp4").write_text("this is no video")
    media = [str(manifest.parent / "a.mp4"), "text.mp4", str(manifest.parent / "b.mp4")]
    rows = [{"video": name, "question": "which?"} for name in media]
    path, out = write(tmp_path, tmp_path, rows), tmp_path / "journal"
    (tmp_path / "none").mkdir()
    refused = write(tmp_path / "none", tmp_path, [{"video": "none.mp4", "question": "which?"}])
    other = tmp_path / "another's"
    other.write_text("my notes")
    assert cli.main(flags(refused, checkpoint, other)) == 2
    assert "holds what is finished" not in capsys.readouterr().err  # it is no journal of this run
    assert other.read_text() == "my notes"
    command = [*flags(path, checkpoint, out), "--max-groups", "1", "--resume"]
    for _ in range(2):
        assert cli.main(command) == 2
        first, *_, last = capsys.readouterr().err.splitlines()
        assert first.startswith(f"{tmp_path / 'rows.json'}, row 2: row: media is unreadable: ")
        assert "text.mp4" in first and last == f"{out} holds what is finished; go on with --resume"
    assert cli.main([*command, "--skip-bad"]) == 0
    assert "1 rows skipped" in capsys.readouterr().out and len(contents(out)) == 2


def test_a_run_goes_on_with_the_same_weights_and_rows_only(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "journal"
    shutil.copytree(checkpoint, model)
    rows = [{"video": "a.mp4", "question": f"which {i}?"} for i in range(2)]
    path = write(tmp_path, manifest.parent, rows)
    command = [*flags(path, model, out), "--resume"]
    assert cli.main([*command, "--limit", "1"]) == 0
    write(tmp_path, manifest.parent, [rows[0], {**rows[1], "question": "another?"}])
    assert cli.main(command) == 2
    assert "manifest of the state must be" in capsys.readouterr().err
    write(tmp_path, manifest.parent, rows)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert cli.main(command) == 2
    assert "made_with must be that of" in capsys.readouterr().err
    shutil.copyfile(checkpoint / weights.name, weights)
    model.rename(tmp_path / "moved")
    command = [*flags(path, tmp_path / "moved", out), "--resume"]
    assert cli.main(command) == 0 and len(contents(out)) == 2


def test_rewards_of_the_command(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"video": "a.mp4", "question": "which?", "answer": "red"}]
    path, out = write(tmp_path, manifest.parent, rows), tmp_path / "journal"
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
        (["--timeout-seconds", "-1"], "timeout_seconds must be > 0 seconds"),
        (["--timeout-seconds", "nan"], "timeout_seconds must be > 0 seconds"),
        (["--fsync-seconds", "-1"], "fsync_seconds must be seconds >= 0"),
        (["--strategy", "best"], "strategy must be one of"),
        (["--threads", "-1"], "threads must be"),
        (["--dtype", "float8"], "dtype must be"),
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


def write(folder: Path, media: Path, rows: list[dict[str, Any]], task: str = "gqa") -> Path:
    entry = {"media_type": "video", "task_type": task, "visual_base": str(media)}
    (folder / "rows.json").write_text(json.dumps(rows))
    path = folder / "manifest.json"
    path.write_text(json.dumps({"set": {**entry, "json_path": "rows.json"}}))
    return path


def test_a_row_that_a_reward_cannot_judge_is_told_before_sampling(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"video": "a.mp4", "question": "which?", "answer": "red"},
        {"video": "a.mp4", "question": "and?"},
        {"video": "a.mp4"},
    ]
    path, out = write(tmp_path, manifest.parent, rows), tmp_path / "journal"
    command = [*flags(path, checkpoint, out), "--reward", "answer=1"]
    assert cli.main(command) == 2 and not out.exists()
    first, second, last = capsys.readouterr().err.splitlines()
    where = f"{tmp_path / 'rows.json'}, row"
    needs = "row: row must be one with answer, which reward 'answer' compares with"
    assert first.startswith(f"{where} 2: {needs}")
    assert second.startswith(f"{where} 3: row: question must be a text")
    assert last == "vtts-rt rollout: 2 bad (--skip-bad leaves them out)"
    assert cli.main([*command, "--skip-bad"]) == 0
    assert "0 failed, 2 rows skipped" in capsys.readouterr().out
    assert len(contents(out)) == 1


def test_published_rewards_are_those_of_the_row_s_task(
    manifest: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = {"spans": [[1, 2]], "boxes": [[10, 10, 50, 50]]}  # in px until the file is open
    rows = [{"video": "a.mp4", "question": "when?", "glue": box}]
    path, out = write(tmp_path, manifest.parent, rows, "tg"), tmp_path / "journal"
    command = [*flags(path, checkpoint, out), "--reward", "published"]
    command += ["--reward", "clue_boxes=0.5", "--reward", "format_answer=-2"]
    assert cli.main(command) == 0
    (found,) = read_journal(out)
    for row in found.rows:
        assert row.reward_parts.keys() == {"iou_answer", "format_answer", "clue_boxes"}
    write(tmp_path, manifest.parent, rows, "mc")
    assert cli.main([*command, "--resume"]) == 2
    assert "which reward 'letter' compares with" in capsys.readouterr().err


def test_groups_that_fail_are_no_success(
    manifest: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, out = Runtime.rollouts_async, tmp_path / "journal"

    async def sometimes(self: Runtime, ask: Ask, *rest: Any, **more: Any) -> RolloutGroup:
        if "1" in ask.question:
            raise RuntimeError("no room")
        return await real(self, ask, *rest, **more)

    command = [*flags(manifest, checkpoint, out), "--skip-bad"]
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "rollouts_async", sometimes)
        assert cli.main(command) == 1
    *_, last = capsys.readouterr().err.splitlines()
    told = "1 of 3 groups failed, first 0.2.1: no room; --resume tries them again"
    assert last == f"vtts-rt: rollout: {told}" and len(contents(out)) == 2
    assert cli.main([*command, "--resume"]) == 0 and len(contents(out)) == 3


def test_no_row_and_no_worker_are_no_success(
    manifest: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"video": "none.mp4", "question": f"which {i}?"} for i in range(2)]
    path, out = write(tmp_path, manifest.parent, rows), tmp_path / "journal"
    assert cli.main([*flags(path, checkpoint, out), "--skip-bad"]) == 1
    assert "none of 2 rows can be read" in capsys.readouterr().err

    class Dying:
        """Loads, and dies at its first group."""

        def __init__(self, make: object) -> None: ...
        def close(self) -> None: ...

        def call(self, method: str, *arguments: Any) -> Any:
            future: Future[Any] = Future()
            if method == "rollouts":
                future.set_exception(WorkerDied("gone"))
            else:
                future.set_result(None)
            return future

    monkeypatch.setattr(workers, "ProcessWorker", Dying)
    # The journal holds no group: it goes on with other settings, too.
    command = [*flags(manifest, checkpoint, out), "--temperature", "0.5", "--workers", "2"]
    command.append("--skip-bad")
    assert cli.main(command) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("vtts-rt: rollout: 1 of 1 groups failed, first 0.")
    assert "RolloutCluster: no worker is left" in last and not contents(out)


@pytest.mark.slow
def test_a_killed_command_goes_on(manifest: Path, checkpoint: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "journal"
    assert cli.main([*flags(manifest, checkpoint, whole), "--skip-bad"]) == 0
    command = [sys.executable, "-m", "vtts_rt.cli", *flags(manifest, checkpoint, out)]
    command += ["--resume", "--skip-bad"]
    for _ in range(8):
        process = subprocess.Popen(command, cwd=tmp_path)
        time.sleep(random.random() * 12)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=tmp_path, check=True)
    assert contents(out) == contents(whole)
    two = tmp_path / "two"
    assert cli.main([*flags(manifest, checkpoint, two), "--workers", "2", "--skip-bad"]) == 0
    assert contents(two) == contents(whole)
