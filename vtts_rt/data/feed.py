"""RolloutDataFeed: rows of a manifest with their frames, decoded ahead, for RL rollouts."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from vtts_rt.checks import Rule, check
from vtts_rt.config import MediaLimits, ResolvedPerception
from vtts_rt.data.ahead import Ahead
from vtts_rt.data.frames import (
    COUNTED,
    ONE_PIXEL,
    FileFrames,
    FrameReader,
    RolloutItem,
    group_id,
)
from vtts_rt.data.order import REMAINDERS, Part, Remainder, RowOrder, placed_rows
from vtts_rt.data.rows import ON_BAD, BadRows, DataSet, OnBad, Row
from vtts_rt.types import DECODERS, Decoder, require
from vtts_rt.video import FrameStore, open_video

__all__ = ["RolloutDataFeed", "RolloutItem"]

logger = logging.getLogger(__name__)

_WHAT = "RolloutDataFeed"
_COUNT: Rule = (lambda n: _is_int(n) and n >= 1, "an integer >= 1")
_RULES: dict[str, Rule] = {
    "frames": (
        # A feed has no model that would know the settings that a PerceptionConfig leaves to it.
        lambda f: isinstance(f, ResolvedPerception) or _COUNT[0](f),
        "an integer >= 1 or a ResolvedPerception (`Runtime.perception` makes one)",
    ),
    **dict.fromkeys(("group_size", "num_workers", "prefetch", "prefetch_bytes"), _COUNT),
    "batch_size": (lambda n: n is None or _COUNT[0](n), "an integer >= 1, or None"),
    "shuffle_seed": (lambda n: n is None or _is_int(n), "an integer or None"),
    "shard": (
        lambda s: len(s) == 2 and all(map(_is_int, s)) and 0 <= s[0] < s[1],
        "(rank, world size) with 0 <= rank < world size",
    ),
    "remainder": (REMAINDERS.__contains__, f"one of {', '.join(REMAINDERS)}"),
    "frame_store": (lambda s: s is None or isinstance(s, FrameStore), "a FrameStore or None"),
    "decoder": (DECODERS.__contains__, f"one of {', '.join(DECODERS)}"),
    "on_bad": (ON_BAD.__contains__, f"one of {', '.join(ON_BAD)}"),
    "check_row": (lambda f: f is None or callable(f), "a function of a row and its task, or None"),
}
STATE_VERSION = 2
POSITION = ("epoch", "rows_passed", "delivered")


class RolloutDataFeed(IterableDataset[Any]):
    """An iterator over the rows of a manifest, each with the decoded frames of a first look.

    Rows of one video come one after another, so that it is opened and decoded once an epoch, for
    all of them and for the whole rollout group of each. An iteration gives what is left of the
    epoch; once that is all given, the next one is the next epoch. One iteration at a time.

    manifest: path of a manifest (`data/rows.py`), or its data sets.
    frames: number of frames a video, evenly spread (all where it has fewer), or a
        ResolvedPerception (`Runtime.perception`): the frames of its first round. An image is one
        frame.
    group_size: answers that will be sampled for each row (GRPO's G); items carry it.
    batch_size: items in a list; None gives single items.
    shuffle_seed: order of videos, and of the rows of each, anew every epoch; None keeps the
        manifest's. The order depends on seed and epoch alone.
    shard: (rank, world size). Whole videos are dealt to the ranks, as even in rows as that allows,
        and stay with their rank, so that what its caches hold comes back.
    remainder: "keep" gives every row once; ranks may then differ in length, and a last batch may
        be short. "drop" and "pad" give the same number of whole batches on every rank: as many as
        the smallest shard fills, or as many as the largest needs, a shard starting over at
        its end. In both, the rows that follow stand in for skipped ones.
    num_workers: decoding threads. prefetch: most videos decoded ahead; prefetch_bytes: most
        bytes of their frames (a video that alone is larger is decoded alone).
    frame_store: where frames are looked up and kept; a Runtime that shares it finds them.
    decoder, device, limits: as `open_video`.
    on_bad: "raise" refuses a manifest with a row or entry that cannot be taken or has no media
        file, BadRows tells all of them; iterating raises BadRows at the first file that cannot be
        read, with its rows, and can go on there once it is mended. "skip" leaves out what cannot
        be taken, logs how many and counts them as "malformed"; a file that is missing, broken or
        replaced while it is read, and a box outside its frame, is skipped with its rows, logged
        once, counted, and listed in `skipped`.
    check_row: called with each row, before its media are opened, and its task; a row for which it
        raises ValueError cannot be taken.

    In worker processes of a DataLoader (with
    `batch_size=None` there where there is one here) each takes a part of the shard.
    Raises ValueError for a bad argument; iterating raises RuntimeError where no decoder is
    installed or, where bad rows are skipped, not one row can be read.
    """

    def __init__(
        self,
        manifest: str | Path | Sequence[DataSet],
        *,
        frames: int | ResolvedPerception = 16,
        group_size: int = 1,
        batch_size: int | None = None,
        shuffle_seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        remainder: Remainder = "keep",
        num_workers: int = 2,
        prefetch: int = 8,
        prefetch_bytes: int = 256 << 20,
        frame_store: FrameStore | None = None,
        decoder: Decoder = "auto",
        device: int | None = None,
        limits: MediaLimits | None = None,
        on_bad: OnBad = "raise",
        check_row: Callable[[Row, str], object] | None = None,
    ) -> None:
        given = locals()
        check(_WHAT, _RULES, {name: given[name] for name in _RULES})
        self.group_size, self.batch_size, self.epoch = group_size, batch_size, 0
        self._seed = shuffle_seed
        self._shard: Part = (shard[0], shard[1])
        self._remainder = remainder
        bounds = {"max_jobs": prefetch, "max_bytes": prefetch_bytes}
        self._ahead = {"num_threads": num_workers, **bounds}
        self._opening: dict[str, Any] = {"decoder": decoder, "device": device}
        if limits is not None:
            self._opening["limits"] = limits
        self._reader = FrameReader(frames, frame_store, self._opening)
        self._on_bad = on_bad
        self._rows, malformed = placed_rows(manifest, on_bad, check_row)
        self._order = RowOrder(self._rows, shuffle_seed, remainder, batch_size or 1)
        self._fingerprint = self._order.fingerprint()
        self._goal(self._shard)
        # The position: rows passed in the epoch up to the last that was delivered, and items
        # delivered. `_part` is the shard that they are counted in.
        self._num_passed, self._delivered, self._part = 0, 0, self._shard
        self._turn = 0  # another one ends an iteration in work
        self._counts, self._skipped = Counter[str](), dict[int, str]()
        self._rows_skipped = Counter({"malformed": malformed} if malformed else {})
        self._files_skipped: set[Path] = set()
        self._wait_seconds = 0.0

    # -- iteration --------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        return self.without(lambda _: False)

    def without(self, is_done: Callable[[str], bool]) -> Iterator[RolloutItem | list[RolloutItem]]:
        """As an iteration, but of items whose `RolloutItem.group_id` is done nothing is read: they
        are passed over and count as delivered."""
        part, size = self._current_part(), self.batch_size or 1
        moved = self._num_passed > 0 and part != self._part
        _require("shard", part, not moved, f"{self._part}, with which the epoch was begun")
        open_video(ONE_PIXEL, **self._opening).close()  # a missing decoder is reported here
        order, goal = self._order.epoch(part, self.epoch), self._goal(part)
        self._part = part
        self._turn += 1
        turn, skipped_before = self._turn, self._rows_skipped.copy()
        batch: list[RolloutItem] = []
        try:
            with closing(self._items(order, goal, is_done)) as items:
                for item in items:
                    batch.append(item)
                    if len(batch) == size:
                        self._deliver(batch)
                        yield batch if self.batch_size else item
                        batch = []
                    if self._turn != turn:
                        raise RuntimeError(
                            "RolloutDataFeed: this iteration is over, the feed was iterated or set "
                            "elsewhere since: one at a time"
                        )
            if batch:
                self._deliver(batch)
                yield batch
            if self._remainder == "keep":
                self._num_passed = goal  # rows skipped at the end
        finally:
            # Run to its end, or left with all of the epoch given.
            if self._turn == turn and self._done() >= goal:
                self._report(self._rows_skipped - skipped_before)
                self._start(self.epoch + 1)

    def __len__(self) -> int:
        """Batches of an epoch (items without a batch size), rows that will be skipped included."""
        return -(-self._goal(self._shard) // (self.batch_size or 1))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the one that the feed is in goes on where it is."""
        _require("epoch", epoch, _is_int(epoch) and epoch >= 0, "an integer >= 0")
        if epoch != self.epoch:
            self._start(epoch)

    def _items(
        self, order: list[int], goal: int, is_done: Callable[[str], bool]
    ) -> Generator[RolloutItem, None, None]:
        """The items from where the feed is to the end of the epoch."""
        passed, missing, idle = self._num_passed, goal - self._done(), 0
        while missing > 0:
            # Just the rows that are missing; those that make up for skipped ones come after.
            stop = passed + missing
            names = (
                (i, group_id(self.epoch, i, order[i % len(order)])) for i in range(passed, stop)
            )
            due = [index for index, name in names if not is_done(name)]
            if len(due) < missing:
                missing, idle = len(due), 0
            with closing(self._read_ahead(order, due)) as entries:
                for index, (number, found) in zip(due, entries, strict=False):
                    self._delivered += index - passed  # those that are done
                    passed = index + 1
                    item, failure = None, found.failure
                    if failure is None:
                        try:
                            item = self._item(number, found, index)
                        except ValueError as error:
                            failure = ("mislabelled", str(error))
                    if item is not None:
                        yield item
                        missing, idle = missing - 1, 0
                    elif failure is not None:
                        self._skip(number, *failure)
                        idle += 1
            self._delivered += stop - passed
            passed = stop
            if idle >= len(order):
                number, sentence = next(iter(self._skipped.items()))
                raise RuntimeError(
                    f"RolloutDataFeed: none of {len(order)} rows can be read: check the paths of "
                    f"the manifest ({self._rows[number].media}: {sentence})"
                )
            if self._remainder == "keep":
                return

    def _read_ahead(
        self, order: list[int], places: list[int]
    ) -> Generator[tuple[int, FileFrames], None, None]:
        """(row number, what its file gave) for some places of an order, ascending."""
        ahead = Ahead(self._order.files(order, places), self._reader, **self._ahead)
        try:
            while True:
                began = time.perf_counter()
                entry = next(ahead, None)
                self._wait_seconds += time.perf_counter() - began
                if entry is None:
                    return
                file, found = entry
                self._counts.update(found.counts)
                yield from ((number, found) for number in file.rows)
                del entry, found  # not held while the next one is waited for
        finally:
            for found in ahead.close():
                self._counts.update(found.counts)

    def _item(self, number: int, found: FileFrames, index: int) -> RolloutItem:
        placed = self._rows[number]
        assert found.metadata is not None
        return RolloutItem(
            row=placed.row.sized(found.metadata.height, found.metadata.width),
            data_set=placed.data_set,
            task=placed.task,
            media=placed.media,
            row_number=number,
            metadata=found.metadata,
            frame_indices=found.frame_indices,
            timestamps_seconds=found.timestamps_seconds,
            frames=found.frames,
            epoch=self.epoch,
            index=index,
            group_size=self.group_size,
            opening=self._opening,
        )

    def _deliver(self, batch: list[RolloutItem]) -> None:
        """Just before the consumer has it: from here on it counts as delivered."""
        self._num_passed = batch[-1].index + 1
        self._delivered += len(batch)
        self._counts["items_delivered"] += len(batch)
        self._counts["frames_delivered"] += sum(len(item.frames) for item in batch)

    def _done(self) -> int:
        """How much of the epoch's goal has been reached."""
        return self._num_passed if self._remainder == "keep" else self._delivered

    def _start(self, epoch: int) -> None:
        self.epoch, self._num_passed, self._delivered = epoch, 0, 0
        self._turn += 1

    def _goal(self, part: Part) -> int:
        """Items of an epoch; ValueError where not every rank would have a batch."""
        goal = self._order.length(part)
        rule = f"whole videos enough for a batch on each of {part[1]} shards"
        ok = goal > 0 or self._remainder == "keep"
        _require("manifest", f"{len(self._rows)} rows", ok, rule)
        return goal

    def _current_part(self) -> Part:
        """The shard, or what a worker process of a DataLoader takes of it."""
        rank, world = self._shard
        if (worker := get_worker_info()) is None:
            return rank, world
        self._check_alone()
        return rank * worker.num_workers + worker.id, world * worker.num_workers

    # -- state ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the feed is, for JSON: after the last item delivered, not the last prefetched."""
        part = self._part if self._num_passed else self._current_part()
        position = (self.epoch, self._num_passed, self._delivered)
        return {**self._made_with(part), **dict(zip(POSITION, position, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the feed was that gave `state`. ValueError as `check_state`."""
        self.check_state(state)
        self._start(state["epoch"])
        self._part = self._current_part()
        self._num_passed, self._delivered = state["rows_passed"], state["delivered"]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """ValueError where `state` is of a feed with another manifest, seed, shard, remainder or
        batch size, or none."""
        ours = self._made_with(self._current_part())
        ok = isinstance(state, Mapping) and set(state) == {*ours, *POSITION}
        _require("state", state, ok, "what `state_dict` gave")
        for name, value in ours.items():
            _require(f"{name} of the state", state[name], state[name] == value, f"{value!r}")
        position = [state[name] for name in POSITION]
        ok = all(_is_int(value) and value >= 0 for value in position)
        _require(f"{', '.join(POSITION)} of the state", position, ok, "integers >= 0")

    def _made_with(self, part: Part) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        return {
            "version": STATE_VERSION,
            "manifest": self._fingerprint,
            "shuffle_seed": self._seed,
            "shard": list(part),
            "remainder": self._remainder,
            "batch_size": self.batch_size,
        }

    def __getstate__(self) -> dict[str, Any]:
        self._check_alone()
        return self.__dict__

    def _check_alone(self) -> None:
        rule = "None where the feed goes to another process"
        _require("frame_store", self._reader.store, self._reader.store is None, rule)

    # -- what happened ----------------------------------------------------------------------

    @property
    def skipped(self) -> list[tuple[Row, str]]:
        """Every row that was skipped so far, once, and the sentence that says why."""
        return [(self._rows[number].row, why) for number, why in self._skipped.items()]

    def stats(self) -> dict[str, Any]:
        """Counts since the feed was made, over all epochs.

        items_delivered, frames_delivered: to the consumer, a video's frames once for every row.
        videos_opened, frames_decoded, frames_codec_decoded, frames_reused, frames_substituted:
        as `COUNTED`, once for all rows of a video; what is prefetched counts when it is its turn or
        the iteration ends. rows_skipped: by reason; "malformed" are those that `on_bad` left out
        when the feed was made. wait_ms: wall-clock ms waited for frames.
        """
        names = (*COUNTED, "items_delivered", "frames_delivered")
        return {
            **{name: self._counts[name] for name in names},
            "rows_skipped": dict(self._rows_skipped),
            "wait_ms": 1e3 * self._wait_seconds,
        }

    def _skip(self, number: int, reason: str, sentence: str) -> None:
        """Or raise BadRows, with all rows of a file that cannot be read."""
        media = self._rows[number].media
        if self._on_bad == "raise":
            of_file = [row for row in self._rows if row.media == media]
            bad = [self._rows[number]] if reason == "mislabelled" else of_file
            raise BadRows([row.bad(f"row: media is {reason}: {sentence}") for row in bad])
        if reason == "mislabelled":
            logger.warning("row %d, of %s, is skipped: %s", number, media, sentence)
        elif media not in self._files_skipped:
            logger.warning("%s is skipped with its rows, %s: %s", media, reason, sentence)
            self._files_skipped.add(media)
        self._rows_skipped[reason] += 1
        self._skipped[number] = sentence

    def _report(self, skipped: Counter[str]) -> None:
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
            logger.warning("epoch %d: rows skipped: %s", self.epoch, reasons)


def _require(argument: str, got: object, ok: bool, rule: str) -> None:
    require(_WHAT, argument, got, ok, rule)


def _is_int(value: object) -> bool:
    return type(value) is int  # a state goes into JSON
