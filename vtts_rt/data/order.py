"""Which rows a rank reads and in which order: functions of the rows, a seed and an epoch.

Keyed hashes order things, not a random generator: the order of a seed is the same under every
version of Python and numpy.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vtts_rt.data.rows import BadRow, DataSet, OnBad, PlacedRow, Row, scan_manifest, sift
from vtts_rt.types import require

Remainder = Literal["keep", "drop", "pad"]
REMAINDERS: tuple[Remainder, ...] = ("keep", "drop", "pad")
Part = tuple[int, int]  # (number, how many)


def deal(weights: Sequence[int], num_parts: int) -> list[list[int]]:
    """Numbers 0 .. len(weights)-1 dealt to `num_parts` parts, ascending in each.

    The heaviest first, each to the part with the least so far (Graham's LPT rule, 1969): sums of
    two parts differ by at most one weight, so by at most 1 where all weights are 1.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for number in sorted(range(len(weights)), key=lambda n: -weights[n]):
        load, part = loads[0]
        parts[part].append(number)
        heapq.heapreplace(loads, (load + weights[number], part))
    return [sorted(part) for part in parts]


def shuffled(numbers: Iterable[int], *key: object) -> list[int]:
    """The numbers in an order that depends on them and on `key` alone."""

    def rank(number: int) -> tuple[bytes, int]:
        text = "\0".join(map(repr, (*key, number)))
        return hashlib.blake2b(text.encode(), digest_size=8).digest(), number

    return sorted(numbers, key=rank)


class FileRows(NamedTuple):
    """A file, and the numbers of rows that come one after another and ask about it."""

    media: Path
    media_type: str
    rows: tuple[int, ...]


class RowOrder:
    """The rows of a manifest, dealt to parts by whole videos and ordered by epoch.

    seed: None leaves videos, and the rows of each, as they come in the manifest.
    remainder, batch_size: what an epoch's length depends on, see `length`.
    """

    def __init__(
        self, rows: Sequence[PlacedRow], seed: int | None, remainder: Remainder, batch_size: int
    ) -> None:
        self.rows = rows
        self._seed = seed
        self._remainder = remainder
        self._batch_size = batch_size
        videos: dict[tuple[Path, str], list[int]] = {}
        for number in range(len(rows)):
            videos.setdefault(self._file(number), []).append(number)
        self._videos = list(videos.values())

    def epoch(self, part: Part, epoch: int) -> list[int]:
        """The row numbers of a part in the order of an epoch; those of a video stay together."""
        videos, seed = self._dealt(part[1])[part[0]], self._seed
        if seed is None:
            return [row for video in videos for row in self._videos[video]]
        order = shuffled(videos, seed, epoch, "video")
        return [row for video in order for row in shuffled(self._videos[video], seed, epoch, "row")]

    def length(self, part: Part) -> int:
        """Items of a part in an epoch: its rows, or as many whole batches as every part gives.

        0 where "drop" or "pad" cannot give every part a batch.
        """
        loads = [sum(len(self._videos[v]) for v in videos) for videos in self._dealt(part[1])]
        size = self._batch_size
        if self._remainder == "keep":
            return loads[part[0]]
        if self._remainder == "drop" or min(loads) == 0:
            return min(loads) // size * size
        return -(-max(loads) // size) * size

    def files(self, order: Sequence[int], places: Iterable[int]) -> Iterator[FileRows]:
        """The files of some places, ascending, of an order that begins again at its end."""
        numbers: list[int] = []
        for place in places:
            number = order[place % len(order)]
            if numbers and self._file(numbers[0]) != self._file(number):
                yield FileRows(*self._file(numbers[0]), tuple(numbers))
                numbers = []
            numbers.append(number)
        if numbers:
            yield FileRows(*self._file(numbers[0]), tuple(numbers))

    def fingerprint(self) -> str:
        """A hash of what the rows say, wherever their media lie."""
        digest = hashlib.blake2b(digest_size=16)
        for found in self.rows:
            said = [found.data_set, found.task, found.row.as_dict()]
            digest.update(json.dumps(said, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def _file(self, number: int) -> tuple[Path, str]:
        return self.rows[number].media, self.rows[number].row.media_type

    def _dealt(self, num_parts: int) -> list[list[int]]:
        return deal([len(rows) for rows in self._videos], num_parts)


def placed_rows(
    manifest: str | Path | Sequence[DataSet],
    on_bad: OnBad,
    check_row: Callable[[Row, str], object] | None,
) -> tuple[list[PlacedRow], int]:
    """The rows of a manifest, and how many rows and entries were left out, as RolloutDataFeed's
    `on_bad` says. ValueError where there are none."""
    try:
        sets: Sequence[DataSet] = []
        bad: list[BadRow] = []
        if isinstance(manifest, (str, Path)):
            sets, bad = sift(scan_manifest(manifest), on_bad)
        else:
            sets = manifest
        ok = isinstance(sets, Sequence) and all(isinstance(entry, DataSet) for entry in sets)
        require("RolloutDataFeed", "manifest", manifest, ok, "a path or a list of DataSet")
        rows, bad_rows = sift(
            (
                item.check_media() if isinstance(item, PlacedRow) and on_bad == "raise" else item
                for entry in sets
                for item in entry.placed(check_row=check_row)
            ),
            on_bad,
        )
    except OSError as error:
        got = f"{error.filename} ({error.strerror})"
        rule = "and its rows must be in files that can be read"
        raise ValueError(f"RolloutDataFeed: manifest {rule}, got {got}") from error
    require("RolloutDataFeed", "manifest", manifest, bool(rows), "a manifest of at least one row")
    return rows, len(bad) + len(bad_rows)
