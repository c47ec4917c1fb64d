"""write_video: what it encodes comes back; what it cannot is said."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtts_rt.video import open_video
from vtts_rt.video.writer import write_video


def frames(n: int = 4, height: int = 32, width: int = 48) -> np.ndarray:
    return np.stack([np.full((height, width, 3), 30 * i, np.uint8) for i in range(n)])


def test_lossless_round_trip_and_count(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    path = tmp_path / "c.mov"
    assert write_video(path, iter(clip), source_fps=24, codec="png", pixel_format="rgb24") == 5
    with open_video(path) as source:
        assert source.metadata.source_fps == pytest.approx(24)
        got = dict(source.read(range(5)))
    np.testing.assert_array_equal(np.stack([got[i] for i in range(5)]), clip)


def test_file_objects_and_repeatable_bytes() -> None:
    made = []
    for _ in range(2):
        file = io.BytesIO()
        write_video(file, frames(8), source_fps=10, crf=30, gop=4, b_frames=2, preset="ultrafast")
        made.append(file.getvalue())
    assert made[0] == made[1]
    with open_video(made[0]) as source:
        assert source.metadata.num_frames == 8


def test_ntsc_rate_survives(tmp_path: Path) -> None:
    write_video(tmp_path / "c.mp4", frames(4), source_fps=30000 / 1001)
    with open_video(tmp_path / "c.mp4") as source:
        assert source.metadata.source_fps == pytest.approx(30000 / 1001, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source_fps": 0}, "source_fps must be"),
        ({"rotation_degrees": 45}, "multiple of 90"),
        ({"codec": "no_such_codec"}, "no_such_codec"),
        ({"codec": "utvideo", "pixel_format": "gbrp"}, "one the container takes"),
        ({"frames": []}, "at least one frame"),
        ({"frames": frames(2, 31, 48)}, "even sides"),
        ({"frames": [frames(1)[0], frames(1, 16, 16)[0]]}, "all alike"),
        ({"frames": frames(2).astype(np.float32)}, "uint8"),
        ({"timestamps_seconds": [0.0, 1.0]}, "one each"),
        ({"timestamps_seconds": [0.0, 1.0, 1.0, 2.0]}, "strictly ascending"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"frames": frames(), "source_fps": 10, **options}
    with pytest.raises(ValueError, match=f"^write_video: .*{words}"):
        write_video(tmp_path / "c.mp4", given.pop("frames"), **given)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^write_video: .*No such file"):
        write_video(tmp_path / "none" / "c.mp4", frames(), source_fps=10)


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_full_disk_is_told_as_one(container: str) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        write_video("/dev/full", frames(), source_fps=10, container_format=container)
    assert caught.value.errno == errno.ENOSPC and caught.value.__cause__ is not None


class FullFile(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_an_error_of_a_file_object_is_kept(container: str) -> None:
    with pytest.raises(OSError) as caught:
        write_video(FullFile(), frames(), source_fps=10, container_format=container)
    assert caught.value.errno == errno.ENOSPC


def test_no_right_to_write(tmp_path: Path) -> None:
    (tmp_path / "c.mp4").mkdir()
    with pytest.raises(ValueError, match="^write_video: path_or_file must be .*Is a directory"):
        write_video(tmp_path / "c.mp4", frames(), source_fps=10)
    if os.geteuid() == 0:
        return  # who may write everywhere
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_video(tmp_path / "d.mp4", frames(), source_fps=10)


def test_a_suffix_that_names_no_container(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^write_video: container_format must be given"):
        write_video(tmp_path / "c.zzz", frames(), source_fps=10)
