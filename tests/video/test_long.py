"""Two hours at 30 frames a second: opened in bounded memory, looked into at the cost of a look."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from bench_open import repeated
from video.zoo import clip, read_code

from vtts_rt.types import Decoder
from vtts_rt.video import open_video
from vtts_rt.video.container import MAX_THREADS, PIECE_BYTES
from vtts_rt.video.decoders import dali_refusal

SECONDS, FPS, GOP = 7200, 30, 60
NUM_FRAMES = SECONDS * FPS
CYCLE = 240  # frames that are encoded; the file repeats them
PADDING_BYTES = 256 << 20
FILES = {
    "h264.mp4": {"codec": "libx264", "b_frames": 0},
    "h264.mkv": {"codec": "libx264", "b_frames": 2},
    "vp8.mkv": {"codec": "libvpx"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    for name, options in FILES.items():
        suffix = "mkv" if name.startswith("vp8") else "mp4"
        short = folder / f"short.{suffix}"
        clip(short, CYCLE, hw=(32, 48), source_fps=float(FPS), gop=GOP, **options)
        repeated(short, folder / name, NUM_FRAMES // CYCLE)
    return folder


def test_opening_takes_bounded_memory(folder: Path) -> None:
    # An MP4 box that readers skip, with a hole in the file for its content: hashed like all else.
    path = folder / "padded.mp4"
    shutil.copyfile(folder / "h264.mp4", path)
    with path.open("ab") as file:
        file.write(PADDING_BYTES.to_bytes(4, "big") + b"free")
        file.truncate(file.tell() - 8 + PADDING_BYTES)
    tracemalloc.start()
    try:
        with open_video(path) as source:
            meta = source.metadata
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert meta.num_frames == NUM_FRAMES
    assert meta.duration_seconds == pytest.approx(SECONDS, rel=1e-3)
    # Nine columns of 8 bytes a packet, each twice for a while, and the pieces that are hashed.
    bound = 2 * 9 * 8 * NUM_FRAMES + MAX_THREADS * PIECE_BYTES + (4 << 20)
    assert peak < bound < PADDING_BYTES // 4


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
@pytest.mark.parametrize("name", FILES)
def test_ten_frames_in_the_middle_cost_their_groups(
    name: str, decoder: Decoder, folder: Path
) -> None:
    if decoder == "dali" and (why := dali_refusal(None)) is not None:
        pytest.skip(why)
    middle = NUM_FRAMES // 2
    wanted = [middle + step for step in (0, 1, 2, 30, 59, 300, 301, 302, 330, 359)]
    with open_video(folder / name, decoder=decoder) as source:
        assert source.metadata.decoder == ("dali" if name == "vp8.mkv" else "pyav") or (
            decoder == "pyav"
        )
        before = source.frames_codec_decoded
        frames = dict(source.read(wanted))
        # Both groups of 60, what a decoder holds back, and a guard.
        assert source.frames_codec_decoded - before <= 2 * GOP + 20
        assert {i: read_code(f) for i, f in frames.items()} == {i: i % CYCLE for i in wanted}
        times = source.metadata.timestamps_seconds
        assert times is not None
        np.testing.assert_allclose(times[wanted], np.array(wanted) / FPS, atol=2e-3)


SCRIPT = """
import sys
from pathlib import Path
from vtts_rt.video import container, media, open_video
container.SETTLE_SECONDS = 0
def rchar():
    return int(Path("/proc/self/io").read_text().split()[1])
before = rchar()
with open_video(sys.argv[1]) as source:
    opened = rchar() - before
    assert source.metadata.num_frames == int(sys.argv[2])
    frames = dict(source.read([int(sys.argv[2]) // 2]))
print(opened, rchar() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc/self/io")
@pytest.mark.parametrize("name", FILES)
def test_a_second_process_opens_it_without_reading_it(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", str(tmp_path))
    size = (folder / name).stat().st_size

    def opened() -> tuple[int, int]:
        command = [sys.executable, "-c", SCRIPT, str(folder / name), str(NUM_FRAMES)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        first, second = map(int, done.stdout.split())
        return first, second

    assert opened()[0] >= size  # hashed, and of Matroska passed over once more
    again, with_a_frame = opened()
    index = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert again < index + size // 20
    # A frame in the middle: an MP4's own table and a piece of the file.
    assert with_a_frame < index + size
