"""RolloutJournal: finished rollout groups in a file, from which a killed run goes on.

A line a record: the CRC-32 of what follows (8 hex digits), a space, a JSON object, a line feed. The
first is {"vtts_rollouts": 1, "made_with": ...}, every other one a group: {"group_id", "rows": as
`RolloutRow.as_dict`, "errors": by member, "position": of the feed, or null}. Records are written
whole, one after another; a killed process can only leave the last one torn.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vtts_rt.checks import Rule, check, is_number
from vtts_rt.rollout.rows import RolloutRow
from vtts_rt.types import require

logger = logging.getLogger(__name__)

JOURNAL_RULES: dict[str, Rule] = {
    "fsync_seconds": (
        lambda v: v is None or (is_number(v) and 0 <= v < math.inf),
        "seconds >= 0 or None",
    )
}
_VERSION = 1
_MAX_RECORD_BYTES = 1 << 30
_HEADER = b' {"vtts_rollouts":'
_MAX_ZEROS = 1 << 16  # that a crash left of a header; more are another file's


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A finished group. errors: sentences of the members that failed. position: the state of the
    feed behind the group, which says what feed that is; None where it has none."""

    group_id: str
    rows: tuple[RolloutRow, ...]
    errors: Mapping[int, str] = field(default_factory=dict)
    position: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        rows = [row.as_dict() for row in self.rows]
        errors = {str(member): text for member, text in self.errors.items()}
        own = {"group_id": self.group_id, "rows": rows, "errors": errors}
        return {**own, "position": None if self.position is None else dict(self.position)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupRecord:
        """ValueError for anything that `as_dict` does not give."""
        try:
            rows = tuple(map(RolloutRow.from_dict, data["rows"]))
            errors = {int(member): str(text) for member, text in data["errors"].items()}
            position = data["position"]
            return cls(_id_of(data), rows, errors, None if position is None else dict(position))
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"RolloutJournal: the record is damaged: {error!r:.300}") from error


class RolloutJournal:
    """A journal to append to; a context manager. One process at a time has it open.

    path: of the file. resume: go on with one that exists, its torn end cut off; otherwise it must
    not exist, be empty, or be a journal without a group. made_with: JSON values that say how the
    rollouts are made; one that is resumed must have been made with the same, unless it holds no
    group. fsync_seconds: how often what is written is forced to the disk: at every record (0), at
    records so many seconds apart, or only when it is closed (None). That is what a crash of the
    machine may lose; a killed process loses nothing of it.
    ValueError for a file that is no such journal, is damaged before its end, or was made with
    something else; RuntimeError where another process has it open.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool = False,
        made_with: Mapping[str, Any] | None = None,
        fsync_seconds: float | None = 0.0,
    ) -> None:
        what, self.path = "RolloutJournal", Path(path)
        check(what, JOURNAL_RULES, {"fsync_seconds": fsync_seconds})
        self._fsync_seconds, self._synced = fsync_seconds, time.monotonic()
        # A round trip, so that what is compared is what JSON keeps.
        made = json.loads(json.dumps(dict(made_with or {})))
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RuntimeError(f"{what}: {self.path} is open in another process") from error
            size = os.fstat(self._file).st_size
            rule = "a new file, or one to go on with (resume)"
            ok = resume or not size or _holds_no_group(self.path)
            require(what, "path", str(self.path), ok, rule)
            with self.path.open("rb") as file:
                records = _Records(file, self.path)
                self._done = {_id_of(record) for record, _ in records}
                found, self._end = records.made_with, records.end
            ok = not self._done or found == made
            require(what, "made_with", made, ok, f"that of {self.path}: {found}")
            if self._end < size:
                cut = size - self._end
                logger.warning("%s: the last %d bytes are torn and cut off", self.path, cut)
            if found != made:
                found, self._end = None, 0
            os.ftruncate(self._file, self._end)
            #: Of the last record that has one, or None.
            self.position: Mapping[str, Any] | None = records.position
            if found is None:
                self._write({"vtts_rollouts": _VERSION, "made_with": made})
                _sync_folder(self.path)
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._done

    def __len__(self) -> int:
        """Finished groups."""
        return len(self._done)

    def append(self, record: GroupRecord) -> None:
        """Add a finished group; ValueError for one that is there already. After an error, of a full
        or failing disk say, the file is as it was."""
        is_new = record.group_id not in self._done
        require("RolloutJournal", "group_id", record.group_id, is_new, "of a group not yet there")
        self._write(record.as_dict())
        self._done.add(record.group_id)
        self.position = record.position or self.position

    def _write(self, record: Mapping[str, Any]) -> None:
        left = memoryview(_line(record))
        written = 0
        try:
            while left:
                num = os.write(self._file, left)
                left, written = left[num:], written + num
            every, now = self._fsync_seconds, time.monotonic()
            if every is not None and now - self._synced >= every:
                os.fsync(self._file)
                self._synced = now
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._end += written

    def close(self) -> None:
        """Force all to the disk; may be called again."""
        if self._file >= 0:
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> RolloutJournal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_journal(path: str | Path) -> Iterator[GroupRecord]:
    """The finished groups of a journal, in the order in which they ended; one that is being written
    may be read. A torn end is passed over. ValueError as those of RolloutJournal."""
    path = Path(path)
    with path.open("rb") as file:
        for data, at in _Records(file, path):
            try:
                record = GroupRecord.from_dict(data)
            except ValueError as error:
                raise ValueError(f"{path}, byte {at}: {error}") from error
            yield record


def _holds_no_group(path: Path) -> bool:
    """Whether a file has the whole header of a journal, and no group."""
    with path.open("rb") as file:
        records = _Records(file, path)
        try:
            return next(iter(records), None) is None and records.made_with is not None
        except ValueError:
            return False


class _Records:
    """Iterates (group record, first byte) of a file. end: behind the last whole record so far.
    made_with: of its header, None while there is none. position: the latest."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.end = 0
        self.made_with: Mapping[str, Any] | None = None
        self.position: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], int]]:
        begin, torn = 0, False
        while line := self._file.readline(_MAX_RECORD_BYTES):
            at, begin = begin, begin + len(line)
            record = _parsed(line)
            if record is None:
                torn = True
                continue
            where = f"byte {self.end} of {self._path}"
            rule = "a record: it is damaged, and records follow; cut the file there to go on"
            require("RolloutJournal", where, "other bytes", not torn, rule)
            self.end = begin
            if self.made_with is None:
                version, made = record.get("vtts_rollouts"), record.get("made_with")
                ok = version == _VERSION and isinstance(made, dict)
                rule = f"a journal of rollouts, version {_VERSION}"
                require("RolloutJournal", str(self._path), version, ok, rule)
                self.made_with = made
                continue
            position = record.get("position")
            ok = position is None or isinstance(position, dict)
            require("RolloutJournal", f"position, byte {at}", position, ok, "an object or null")
            self.position = position or self.position
            yield record, at
        # What is cut off must be ours: the beginning of a header, or what a crash made of one.
        known = self.made_with is not None or self._begins_header()
        rule = f"a journal of rollouts, version {_VERSION}"
        require("RolloutJournal", "path", str(self._path), known, rule)

    def _begins_header(self) -> bool:
        self._file.seek(0)
        data = self._file.read(_MAX_ZEROS + 1)
        if not data.strip(b"\0"):
            return len(data) <= _MAX_ZEROS
        digits = all(byte in b"0123456789abcdef" for byte in data[:8])
        return digits and _HEADER.startswith(data[8 : 8 + len(_HEADER)])


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None where it is torn or damaged."""
    digits, text = line[:8], line[9:-1]
    if line[8:9] != b" " or line[-1:] != b"\n" or digits != b"%08x" % zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _id_of(record: Mapping[str, Any]) -> str:
    group_id = record.get("group_id")
    require("RolloutJournal", "group_id", group_id, isinstance(group_id, str), "a text")
    return str(group_id)


def _sync_folder(path: Path) -> None:
    """Make the name of a new file last."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def errors_of(members: Sequence[object]) -> dict[int, str]:
    """Sentences of the members that failed."""
    return {
        member: f"{type(error).__name__}: {error}"
        for member, error in enumerate(members)
        if isinstance(error, Exception)
    }
