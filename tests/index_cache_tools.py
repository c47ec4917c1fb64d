"""What tests of the index cache share."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtts_rt.types import VideoMetadata
from vtts_rt.video import container, index_cache, open_video
from vtts_rt.video.container import Media
from vtts_rt.video.facts import VideoFacts, learn_facts


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and files that count as settled at once."""
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", str(folder))
    monkeypatch.setattr(container, "SETTLE_SECONDS", 0.0)
    forget()
    return folder


def forget() -> None:
    """As in a new process."""
    container._hashes.clear()
    index_cache._cache_in.cache_clear()


def learned(video: Path | bytes, source_fps: float | None = None) -> VideoFacts:
    media = Media(video)
    with media.open() as opened:
        return learn_facts(media, opened, source_fps)


def fields(facts: VideoFacts) -> dict[str, Any]:
    """By value, arrays with their dtypes."""
    whole = dataclasses.asdict(facts)
    for name, value in whole.pop("index").items():
        is_array = isinstance(value, np.ndarray)
        whole[name] = (value.tobytes(), value.dtype, value.shape) if is_array else value
    return whole


def opened(video: Path) -> tuple[VideoMetadata, bytes]:
    with open_video(video) as source:
        return source.metadata, dict(source.read([7]))[7].tobytes()


def make_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(*arguments: Any) -> Any:
        raise AssertionError("the content is read")

    monkeypatch.setattr(Media, "open", reads)
    of_content = container.content_hash

    def hashes(open_content: Any, *arguments: Any) -> str:
        return of_content(open_content, *arguments) if in_memory(open_content) else reads()

    def in_memory(open_content: Any) -> bool:
        with open_content() as file:
            return isinstance(file, io.BytesIO)

    monkeypatch.setattr(container, "content_hash", hashes)
