"""One file opened once, the frames of a first look at it decoded once, for all its rows.

Shape letters: H height, W width (px).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtts_rt.config import ResolvedPerception
from vtts_rt.data.ahead import Stopped, Ticket
from vtts_rt.data.order import FileRows
from vtts_rt.data.rows import BadRow, PlacedRow, Row
from vtts_rt.perception.plan import frame_times
from vtts_rt.perception.policy_official import uniform_indices
from vtts_rt.perception.strategy import plan_round
from vtts_rt.types import Frame, VideoMetadata
from vtts_rt.video import FrameSource, FrameStore, open_video

# Why a file is skipped: it is not there, it cannot be opened, it cannot be decoded, it was
# replaced or removed between the two; or a row's label lies outside the frame.
SKIP_REASONS = ("missing", "unreadable", "undecodable", "changed", "mislabelled")
# Counts of FileFrames: frames_decoded were delivered by the decoder, frames_codec_decoded had to be
# decoded for that, frames_reused came from the store, frames_substituted are copies of a neighbour.
COUNTED = (
    "videos_opened",
    "frames_decoded",
    "frames_codec_decoded",
    "frames_reused",
    "frames_substituted",
)


# One white pixel: an error of opening it is no fault of a file.
ONE_PIXEL = b"P6\n1 1\n255\n\xff\xff\xff"


def check_openable(
    found: Sequence[PlacedRow | BadRow], **opening: Any
) -> Iterator[PlacedRow | BadRow]:
    """Each of these, or why not: a media file that cannot be opened, or a box outside its frame.

    Each file is opened once, as many at a time as there are processors; nothing is decoded.
    opening: further arguments of `open_video`. RuntimeError where no decoder is installed.
    """
    open_video(ONE_PIXEL, **opening).close()

    def metadata_of(media: Path) -> VideoMetadata | str:
        try:
            with open_video(media, **opening) as source:
                return source.metadata
        except Exception as error:  # a decoder may raise anything
            return str(error) or repr(error)

    files = dict.fromkeys(item.media for item in found if isinstance(item, PlacedRow))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = dict(zip(files, pool.map(metadata_of, files), strict=True))
    for item in found:
        if isinstance(item, BadRow):
            yield item
        elif isinstance(metadata := seen[item.media], str):
            yield item.bad(f"row: media must be a file that can be opened: {metadata}")
        else:
            try:
                item.row.sized(metadata.height, metadata.width)
            except ValueError as error:
                yield item.bad(str(error))
            else:
                yield item


@dataclass(slots=True)
class FileFrames:
    """The frames of a file, or the failure (reason, sentence) that left none.

    frame_indices: distinct and ascending; frames: as many, (H, W, 3) uint8 RGB, read-only.
    counts: by the names of COUNTED.
    """

    metadata: VideoMetadata | None = None
    frame_indices: tuple[int, ...] = ()
    timestamps_seconds: tuple[float, ...] = ()
    frames: tuple[Frame, ...] = ()
    failure: tuple[str, str] | None = None
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class FrameReader:
    """Reads files; safe to call from several threads.

    frames: how many, evenly spread, or the settings whose first look they are. store: where the
    frames are looked up and kept, if anywhere. opening: further arguments of `open_video`.
    """

    frames: int | ResolvedPerception
    store: FrameStore | None = None
    opening: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, file: FileRows, ticket: Ticket) -> FileFrames:
        """Errors of the file are in the result; `Stopped` is raised."""
        result = FileFrames()
        before = _identity(file.media)
        try:
            with open_video(file.media, **self.opening) as source:
                result.counts["videos_opened"] = 1
                self._read(source, file.media_type, result, ticket)
        except Stopped:
            raise
        except Exception as error:  # a decoder may raise anything; the next file is read
            result.frames = ()
            result.failure = (_reason(file.media, before, result), str(error) or repr(error))
        return result

    def first_look(self, metadata: VideoMetadata, media_type: str = "video") -> list[int]:
        """The distinct frame indices of a first look, ascending."""
        if metadata.is_image or media_type == "image":
            return [0]
        if isinstance(self.frames, int):
            num_samples = min(self.frames, metadata.num_frames)
            return sorted(set(uniform_indices(metadata.num_frames, num_samples)))
        plan = plan_round(self.frames.strategy, self.frames, [metadata], [], 0)
        return sorted(set(plan.frame_indices))

    def _read(
        self, source: FrameSource, media_type: str, result: FileFrames, ticket: Ticket
    ) -> None:
        metadata = source.metadata
        indices = self.first_look(metadata, media_type)
        ticket.reserve(len(indices) * metadata.height * metadata.width * 3)
        try:
            if self.store is None:
                found: dict[int, Frame] = {}
                for index, frame in source.read(indices):
                    ticket.check()
                    if isinstance(frame, np.ndarray):
                        frame.flags.writeable = False  # rows of one file share it
                    found[index] = frame
                    result.counts["frames_decoded"] += 1
                frames = [found[index] for index in indices]
            else:
                frames = self._stored(self.store, source, indices, result)
        finally:
            result.counts["frames_codec_decoded"] = source.frames_codec_decoded
            result.counts["frames_substituted"] = source.frames_substituted
        result.metadata = metadata
        result.frame_indices = tuple(indices)
        result.timestamps_seconds = tuple(frame_times(metadata)[indices].tolist())
        result.frames = tuple(frames)

    @staticmethod
    def _stored(
        store: FrameStore, source: FrameSource, indices: Sequence[int], result: FileFrames
    ) -> list[Frame]:
        def observe(delivered: Sequence[int], _: int) -> None:
            result.counts["frames_decoded"] += len(delivered)

        frames = store.frames(source, indices, observe)
        result.counts["frames_reused"] = len(indices) - result.counts["frames_decoded"]
        return frames


@dataclass(frozen=True, slots=True, eq=False)
class RolloutItem:
    """One rollout group's question, with the frames that its first round looks at.

    row, data_set, task, media: the question, boxes as fractions of the frame, the manifest's entry
        it is from and the task of that, and its file.
    row_number: of the row among all rows of the manifest, from 0, the same in every epoch.
    metadata: of the opened video; `metadata.video_id` names its content.
    frame_indices, timestamps_seconds: of the frames, ascending, seconds from the first frame.
    frames: (H, W, 3) uint8 RGB each, read-only, shared with the other rows of the video.
    epoch, index: where the item stands: the index counts rows of the shard, skipped ones too.
    group_size: answers to be sampled for it. opening: arguments that `open_video` had.
    """

    row: Row
    data_set: str
    task: str
    media: Path
    row_number: int
    metadata: VideoMetadata
    frame_indices: tuple[int, ...]
    timestamps_seconds: tuple[float, ...]
    frames: tuple[Frame, ...]
    epoch: int
    index: int
    group_size: int
    opening: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def group_id(self) -> str:
        """A name for the rollout group of this item, of its own in every epoch, and for every row
        and every time that a row comes up."""
        return group_id(self.epoch, self.index, self.row_number)

    @property
    def seed(self) -> int:
        """A seed for the samples of this item, in [0, 2**63): another one in every epoch, and for
        every row and every time that a row comes up. Members of a group share it (`member` tells
        their noise apart)."""
        place = f"{self.epoch} {self.index} {self.row_number}".encode()
        return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of an Ask that the item knows; the video is opened as here, so that a
        store holds the same frames for both."""
        return {
            "videos": str(self.media),
            "question": self.row.question,
            "options": self.row.options,
            **self.opening,
        }


def group_id(epoch: int, index: int, row_number: int) -> str:
    """As `RolloutItem.group_id`."""
    return f"{epoch}.{index}.{row_number}"


def _identity(media: Path) -> object:
    from vtts_rt.video.container import file_identity

    try:
        return file_identity(media)
    except (OSError, ValueError):
        return None


def _reason(media: Path, before: object, result: FileFrames) -> str:
    """Which of SKIP_REASONS a failure is."""
    if before is None:
        return "missing"
    if _identity(media) != before:
        return "changed"
    return "undecodable" if result.counts["videos_opened"] else "unreadable"
