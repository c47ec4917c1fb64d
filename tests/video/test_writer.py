"""write_video: what it encodes comes back; what it cannot is said."""

from __future__ import annotations

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


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    made = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path in made:
        write_video(path, frames(8), source_fps=10, crf=30, gop=4, preset="ultrafast")
    assert made[0].read_bytes() == made[1].read_bytes()
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
        ({"frames": []}, "at least one frame"),
        ({"frames": frames(2, 31, 48)}, "even sides"),
        ({"frames": [frames(1)[0], frames(1, 16, 16)[0]]}, "all alike"),
        ({"frames": frames(2).astype(np.float32)}, "uint8"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"frames": frames(), "source_fps": 10, **options}
    with pytest.raises(ValueError, match=f"^write_video: .*{words}"):
        write_video(tmp_path / "c.mp4", given.pop("frames"), **given)


@pytest.mark.parametrize(
    ("name", "options", "kind", "words"),
    [
        ("none/c.mp4", {}, FileNotFoundError, "No such file"),
        ("full.mp4", {}, OSError, "No space left on device"),
        ("c.zzz", {}, ValueError, "output format"),
        ("c.mp4", {"codec": "no_such_codec"}, ValueError, "no_such_codec"),
        ("c.mp4", {"codec": "utvideo", "pixel_format": "gbrp"}, ValueError, "does not support"),
    ],
)
def test_what_pyav_refuses(
    name: str, options: dict[str, Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    with pytest.raises(kind, match=words):
        write_video(tmp_path / name, frames(), source_fps=10, **options)
