from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from feed_tools import NUM_CLIPS, make_manifest, rows_of, write_clip


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for number in range(NUM_CLIPS):
        write_clip(folder / f"{number}.mp4", number)
    return folder


@pytest.fixture()
def manifest(clips_folder: Path, tmp_path: Path) -> Path:
    """Two questions about each of the clips, one video after another."""
    for clip in clips_folder.glob("*.mp4"):
        shutil.copy(clip, tmp_path)
    return make_manifest(tmp_path, rows_of([2] * NUM_CLIPS))
