"""The journal: nothing finished is lost or comes twice, wherever it is cut off or damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt import BadRequest
from vtts_rt.rollout.journal import GroupRecord, RolloutJournal, read_journal
from vtts_rt.rollout.rows import RolloutRow

MADE: dict[str, Any] = {"model": "m", "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def _quick_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def record(number: int, **more: Any) -> GroupRecord:
    num = 2 + number % 3
    ids = np.arange(num, dtype=np.int64) + number
    mask = np.arange(num) > 0
    row = RolloutRow(
        *(ids, mask, np.where(mask, -0.5, np.nan), np.stack([ids] * 3)), group_id=str(number)
    )
    return GroupRecord(str(number), (row,), {1: "KeyError: 'né'"}, **more)


def write(path: Path, count: int) -> list[int]:
    """A journal of `count` groups; where each of its records ends."""
    ends = []
    with RolloutJournal(path, made_with=MADE) as journal:
        ends.append(path.stat().st_size)
        for number in range(count):
            journal.append(record(number, position={"passed": number} if number % 2 else None))
            ends.append(path.stat().st_size)
    return ends


def ids(path: Path) -> list[str]:
    return [found.group_id for found in read_journal(path)]


def test_groups_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, 4)
    for number, found in enumerate(read_journal(path)):
        (row,), (own,) = found.rows, record(number).rows
        assert row.as_dict() == own.as_dict() and found.errors == {1: "KeyError: 'né'"}
        assert found.position == ({"passed": number} if number % 2 else None)
    with RolloutJournal(path, resume=True, made_with=MADE) as journal:
        assert len(journal) == 4 and "3" in journal and "4" not in journal
        assert journal.position == {"passed": 3}
        with pytest.raises(BadRequest, match="group_id must be of a group not yet there, got '3'"):
            journal.append(record(3))
        journal.append(record(4))
        with pytest.raises(RuntimeError, match="is open in another process"):
            RolloutJournal(path, resume=True, made_with=MADE)
    journal.close()
    assert ids(path) == [str(number) for number in range(5)]


def test_a_journal_cut_at_any_byte_goes_on(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    ends = write(whole, 2)
    data = whole.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        kept = max(0, sum(e <= end for e in ends) - 1)
        if end:
            assert ids(path) == [str(number) for number in range(kept)]
        with RolloutJournal(path, resume=True, made_with=MADE, fsync_seconds=None) as journal:
            assert len(journal) == kept
            for number in range(kept, 2):
                journal.append(record(number, position={"passed": 1} if number % 2 else None))
        assert path.read_bytes() == data


def test_a_torn_end_of_zeros_is_cut_and_other_files_are_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    ends = write(path, 2)
    data = path.read_bytes()
    for tail in (b"\0" * 5000, b"\n\n", b"0badc0de {}\n", b"half\nand half"):
        path.write_bytes(data + tail)
        with RolloutJournal(path, resume=True, made_with=MADE) as journal:
            assert len(journal) == 2
        assert path.read_bytes() == data
    path.write_bytes(b"\0" * 100)
    RolloutJournal(path, resume=True, made_with=MADE).close()
    for other in (b"my notes", b"my notes\n", b"{}\n", b"01234567 {}\n", data[ends[0] :]):
        path.write_bytes(other)
        for use in (lambda: RolloutJournal(path, resume=True), lambda: list(read_journal(path))):
            with pytest.raises(BadRequest, match="must be a journal of rollouts, version 1, got"):
                use()
        assert path.read_bytes() == other


def test_damage_before_the_end_is_told_and_left(tmp_path: Path) -> None:
    path = tmp_path / "a"
    ends = write(path, 3)
    data = bytearray(path.read_bytes())
    data[ends[1] - 9] ^= 1
    path.write_bytes(data)
    message = f"byte {ends[0]} of .* must be a record: it is damaged, and records follow; cut the"
    for use in (lambda: RolloutJournal(path, resume=True), lambda: list(read_journal(path))):
        with pytest.raises(BadRequest, match=message):
            use()
    assert path.read_bytes() == data


def test_wrong_arguments_change_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(BadRequest, match="path must be a new file, or one to go on with .resume."):
        RolloutJournal(path, made_with=MADE)
    with pytest.raises(BadRequest, match="made_with must be that of .*'seed': 3.*, got.*4"):
        RolloutJournal(path, resume=True, made_with={**MADE, "seed": 4})
    for seconds in (-1, True, "1", float("nan")):
        with pytest.raises(BadRequest, match="fsync_seconds must be seconds >= 0 or None"):
            RolloutJournal(path, resume=True, fsync_seconds=seconds)  # type: ignore[arg-type]
    assert path.read_bytes() == before


@pytest.mark.parametrize("resume", [True, False])
def test_a_journal_without_groups_is_begun_anew(resume: bool, tmp_path: Path) -> None:
    path, other = tmp_path / "a", {"model": "other"}
    write(path, 0)
    for tail in (b"", b'0badc0de {"group_id":'):  # of a first group
        path.write_bytes(path.read_bytes() + tail)
        with RolloutJournal(path, resume=resume, made_with=other) as journal:
            assert len(journal) == 0
        path.with_name("b").unlink(missing_ok=True)
        RolloutJournal(path.with_name("b"), made_with=other).close()
        assert path.read_bytes() == path.with_name("b").read_bytes()
    path.write_bytes(b"my notes")
    with pytest.raises(BadRequest, match="path must be a "):
        RolloutJournal(path, resume=resume, made_with=other)
    assert path.read_bytes() == b"my notes"


@pytest.mark.parametrize(
    ("content", "resume"),
    [
        (b"31415", False),  # of a process id, say; with `resume` the beginning of a header
        (b"cafe", False),
        (b"\0" * 100, False),
        (b"\0" * 100 + b"of a disk", True),
        (b"\0" * (1 << 17), True),
    ],
    ids=["number", "word", "zeros", "disk", "many zeros"],
)
def test_a_file_that_is_no_journal_is_left(content: bytes, resume: bool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match="path must be a "):
        RolloutJournal(path, resume=resume)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write(path, 1)
    before, real = path.read_bytes(), os.write
    calls: list[int] = []

    def full(file: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(file, data[:7])

    with RolloutJournal(path, resume=True, made_with=MADE) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                journal.append(record(1))
        assert path.read_bytes() == before and "1" not in journal
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda file: Path("/nowhere").stat())
            with pytest.raises(OSError, match="nowhere"):
                journal.append(record(1))
        assert path.read_bytes() == before and "1" not in journal
        journal.append(record(1))
    assert ids(path) == ["0", "1"]


def test_when_records_are_forced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for name, seconds, at_least in (("all", 0.0, 5), ("rare", 1e6, 0), ("none", None, 0)):
        with RolloutJournal(tmp_path / name, fsync_seconds=seconds) as journal:
            synced.clear()
            for number in range(5):
                journal.append(record(number))
            assert len(synced) == at_least
        assert len(synced) == at_least + 1  # at the end


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_is_told_or_cut(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never another group than one that was written, never another error."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.unlink(missing_ok=True)
    write(path, 3)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 40))
        content[at : at + cut] = data.draw(st.binary(max_size=40))
    path.write_bytes(content)
    try:
        found = ids(path)
        RolloutJournal(path, resume=True, made_with=MADE).close()
    except ValueError:
        assert path.read_bytes() == content
    else:
        assert found == [str(n) for n in range(len(found))] and ids(path) == found


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(value=JSON)
def test_records_of_any_json_are_read_or_refused(value: Any) -> None:
    try:
        GroupRecord.from_dict({**record(0).as_dict(), "rows": value})
        GroupRecord.from_dict({**record(0).as_dict(), "errors": value})
    except ValueError:
        pass
    assert json.loads(json.dumps(value)) == value


# The engine over a sampler that needs no model, in children that are killed at any moment; the
# last of them comes to its end.
KILLED = """
import asyncio, os, random, signal, sys
sys.path.insert(0, sys.argv[2])
from test_journal import record
from vtts_rt import Ask, RolloutGroup
from vtts_rt.rollout import engine
from vtts_rt.rollout.journal import RolloutJournal, read_journal
path, num = sys.argv[1], 40
os.fsync = lambda file: None  # of no use to a process that is killed
engine.rows_of = lambda group, scores: list(record(int(group.group_id)).rows)
class Sampler:
    async def rollouts_async(self, ask, num_answers, *, group_id):
        await asyncio.sleep(random.random() * 0.01)
        return RolloutGroup(group_id, ask, (KeyError("no answer"),) * num_answers)
async def main(journal):
    feed = ((str(number), Ask("clip.mp4", "which?")) for number in range(num))
    async for _ in engine.RolloutEngine(Sampler(), 2, journal=journal, max_groups=3).run(feed): pass
def kill_at(calls):
    # at one of the calls and returns of this process, whichever code makes it
    left = iter(range(calls))
    def count(*event):
        if next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)
kills, sizes = 0, set()
while True:
    pid = os.fork()
    if not pid:
        random.seed(kills)
        if kills < 25: kill_at(random.randrange(15_000))
        try:
            with RolloutJournal(path, resume=True) as journal: asyncio.run(main(journal))
        except BaseException as error: print("FAIL", repr(error)); sys.stdout.flush(); os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -9: break
    kills += 1
    if os.path.exists(path): sizes.add(os.path.getsize(path))
found = sorted(int(r.group_id) for r in read_journal(path))
print(status, found == list(range(num)), kills, len(sizes))
"""


def test_a_run_killed_at_any_moment_loses_and_repeats_nothing(tmp_path: Path) -> None:
    here = Path(__file__).parent
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(here)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    status, whole, *numbers = done.stdout.split()[-4:] or ("", "")
    assert (status, whole) == ("0", "True"), done.stdout + done.stderr
    kills, sizes = map(int, numbers)
    assert kills >= 3 and sizes >= 2  # at several places of the journal
