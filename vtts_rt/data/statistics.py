"""Counts of a manifest's rows: by set and over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vtts_rt.data.rows import DataSet, Row, is_file


@dataclass
class Statistics:
    """What rows hold. files: each media file, and whether it is there.

    options: rows by number of options; answers: rows by letter ("text" where there are no options,
    "none"); spans, boxes: rows by number of them. span_seconds, span_shares (of the duration),
    box_shares (of the frame, of boxes in fractions), duration_seconds: one value each.
    spans_past_end: spans that end after the video.
    """

    rows: int = 0
    rows_without_media: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    media_types: Counter[str] = field(default_factory=Counter)
    options: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    spans: Counter[int] = field(default_factory=Counter)
    boxes: Counter[int] = field(default_factory=Counter)
    boxes_in_pixels: int = 0
    spans_past_end: int = 0
    span_seconds: list[float] = field(default_factory=list)
    span_shares: list[float] = field(default_factory=list)
    box_shares: list[float] = field(default_factory=list)
    duration_seconds: list[float] = field(default_factory=list)
    files: dict[Path, bool] = field(default_factory=dict)

    def add(self, task_type: str, media: Path, row: Row) -> None:
        self.rows += 1
        self.tasks[task_type] += 1
        self.media_types[row.media_type] += 1
        self.options[len(row.options)] += 1
        letter = row.answer if row.options else "text"
        self.answers["none" if row.answer is None else str(letter)] += 1
        self.spans[len(row.spans)] += 1
        self.boxes[row.num_boxes] += 1
        self.boxes_in_pixels += len(row.pixel_boxes)
        self.box_shares += [(b.x1 - b.x0) * (b.y1 - b.y0) for b in row.boxes]
        for span in row.spans:
            seconds = span.end_seconds - span.start_seconds
            self.span_seconds.append(seconds)
            if row.duration_seconds is not None:
                self.span_shares.append(seconds / row.duration_seconds)
                self.spans_past_end += span.end_seconds > row.duration_seconds
        if row.duration_seconds is not None:
            self.duration_seconds.append(row.duration_seconds)
        there = self.files.get(media)
        if there is None:
            there = self.files[media] = is_file(media)
        self.rows_without_media += not there

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts by name, and of each list of values least, median, mean and most."""
        out: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Counter):
                out[name] = {str(key): value[key] for key in sorted(value)}
            elif isinstance(value, list):
                out[name] = _spread(value)
            elif isinstance(value, int):
                out[name] = value
        missing = sum(not there for there in self.files.values())
        return {**out, "files": len(self.files), "files_missing": missing}


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "min": min(values),
        "median": median(values),
        "mean": fmean(values),
        "max": max(values),
    }


def statistics(
    rows: Iterable[tuple[DataSet, Path, Row]],
) -> tuple[dict[str, Statistics], Statistics]:
    """(of each data set by its name, of all) for (data set, media file, row)."""
    sets: dict[str, Statistics] = {}
    total = Statistics()
    for data_set, media, row in rows:
        for found in (sets.setdefault(data_set.name, Statistics()), total):
            found.add(data_set.task_type, media, row)
    return sets, total
