"""A frame of a damaged file is the same however, with whatever and how often it is read."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence

import av
import numpy as np
import pytest
from clip_writer import write_video
from video.zoo import packets_of
from video.zoo_damaged import CODECS, KINDS, damaged, sound

from vtts_rt.video import open_video, packets
from vtts_rt.video.unwritten import UnwrittenParts
from vtts_rt.video.unwritten import _planes as unwritten_planes

# What decoders do not fill of a frame is other memory every time.
BY_CHANCE = ("flashsv",)
FILES = [
    (codec, container, kind)
    for codec, (containers, _) in CODECS.items()
    if codec not in BY_CHANCE
    for container in containers
    for kind in KINDS
]
# One file a codec in `make test`, of those that showed frames by chance or by the way to them.
CHOSEN = [
    ("h264", "matroska", "flip", 0),  # a picture that nothing refers to, with another frame_num
    ("h264", "avi", "flip", 8),  # one that says that nothing refers to it
    ("h264 pyramid", "mp4", "drop", 1),  # a gap that FFmpeg fills without a word
    ("h264 slices", "mpegts", "drop", 3),  # a parameter set that decoders keep
    ("h264 slices", "mpegts", "drop", 9),  # a broken B-picture that changes what follows it
    ("h264 slices", "mpegts", "drop", 7000),  # concealed from pictures that nothing refers to
    ("h264 interlaced", "mp4", "cut", 0),
    ("h264 refresh", "matroska", "cut", 6),  # what was broken before a recovery point
    ("hevc", "mp4", "flip", 6),  # a slice that ends early without an error
    ("hevc", "mp4", "cut", 6007),  # a packet that ends within its header
    ("hevc open gop", "matroska", "empty", 5000),  # what nothing refers to throws out references
    ("hevc open gop", "matroska", "flip", 5001),
    ("hevc open gop", "matroska", "cut", 6101),  # a picture that decoders skip after a seek
    ("mpeg2", "matroska", "drop", 2),
    ("mpeg2", "mpegts", "cut", 8),  # one that the decoder shows without a word
    ("mpeg4", "mp4", "empty", 1),
    ("msmpeg4", "avi", "empty", 0),
    ("vp8", "webm", "empty", 1),
    ("vp9", "mp4", "flip", 0),
    ("av1", "mp4", "empty", 0),
    ("mjpeg", "matroska", "flip", 3),
    ("ffv1", "matroska", "drop", 0),
    ("prores", "mov", "flip", 0),
    ("huffyuv", "avi", "cut", 2),
    ("qtrle", "mov", "cut", 0),
]
Reads = Sequence[Iterable[int]]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads decoders get: the last of the list."""
    numbers = [1]
    monkeypatch.setattr(packets, "num_decoder_threads", lambda: numbers[-1])
    return numbers


def assert_same(data: bytes, reads: Reads, whole: dict[int, np.ndarray]) -> None:
    with open_video(data) as source:
        for wanted in reads:
            for i, frame in source.read(list(wanted)):
                np.testing.assert_array_equal(frame, whole[i], err_msg=f"{i} of {wanted}")


def compare_ways(data: bytes, rng: random.Random, threads: list[int], fresh: int) -> None:
    threads.append(1)
    with open_video(data) as source:
        count = source.metadata.num_frames
        whole = dict(source.read(range(count)))
    everything = range(count)
    order = rng.sample(everything, count)
    windows = [range(a, min(count, a + rng.randrange(1, 6))) for a in order[:8]]
    sets = [rng.sample(everything, min(count, rng.randrange(1, 8))) for _ in range(5)]
    for number, reads in (
        (1, [everything]),
        (2, [everything]),
        (4, [everything]),
        (2, [everything[::7]]),
        (2, [[i] for i in order]),
        (2, windows),
        (4, windows),
        (2, sets),
        *((2, [[i]]) for i in order[:fresh]),
    ):
        threads.append(number)
        assert_same(data, reads, whole)


@pytest.mark.parametrize(("codec", "container", "kind", "seed"), CHOSEN)
def test_one_frame_whatever_way(
    codec: str, container: str, kind: str, seed: int, threads: list[int]
) -> None:
    compare_ways(damaged(codec, container, kind, seed), random.Random(seed), threads, fresh=2)


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "container", "kind"), FILES)
def test_one_frame_whatever_way_many_files(
    codec: str, container: str, kind: str, threads: list[int]
) -> None:
    for seed in range(3):
        try:
            data = damaged(codec, container, kind, seed)
            compare_ways(data, random.Random(seed), threads, fresh=6)
        except ValueError as error:
            assert str(error).startswith("open_video: video must ")


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("h264", "mp4"),
        ("h264 open gop", "mpegts"),
        ("h264 pyramid", "mp4"),
        ("h264 refresh", "mpegts"),
        ("hevc open gop", "matroska"),
        ("mpeg2", "mpeg"),  # demuxers stamp its packets otherwise after a seek
        ("vp8", "webm"),
        ("mjpeg", "avi"),
    ],
)
def test_sound_files_are_read_exactly(codec: str, container: str, threads: list[int]) -> None:
    data = sound(codec, container)
    compare_ways(data, random.Random(0), threads, fresh=2)
    with open_video(data) as source:
        for i in random.Random(1).sample(range(30), 10):
            assert len(dict(source.read([i]))) == 1
        assert source.frames_substituted == 0
        # Groups without a keyframe of their own, and frames without a place to seek to, are
        # decoded once more.
        if codec not in ("h264 refresh", "mpeg2"):
            assert not source._damaged


def test_errors_of_threads_at_work_do_not_outlast_a_seek(threads: list[int]) -> None:
    data = bytearray(sound("h264 slices", "mp4"))
    data[data.find(packets_of(bytes(data))[24].data) + 10] ^= 0x40
    compare_ways(bytes(data), random.Random(1000), threads, fresh=2)


def test_unwritten_parts_of_hevc_are_damage() -> None:
    data = damaged("hevc", "mp4", "flip", 6)
    with open_video(data) as source:
        list(source.read(range(30)))
        assert source._damaged == {20}


@pytest.mark.parametrize(("value", "unwritten"), [(0, True), (128, True), (127, False), (1, False)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv422p10le"])
@pytest.mark.parametrize("hw", [(64, 96), (36, 50), (8, 8)])
def test_unwritten_parts(
    value: int, unwritten: bool, pixel_format: str, hw: tuple[int, int]
) -> None:
    frame = av.VideoFrame(hw[1], hw[0], pixel_format)
    planes = unwritten_planes(frame)
    shift = 2 if pixel_format.endswith("10le") else 0
    rng = np.random.default_rng(0)
    for plane in planes:
        plane[:] = rng.integers(200, 255, plane.shape)
    parts = UnwrittenParts()
    assert not parts.are_in(frame)
    top, left = (hw[0] - 1) // 8 * 8, (hw[1] - 1) // 8 * 8
    for plane, size in zip(planes, frame.planes, strict=True):
        rows, columns = top * size.height // hw[0], left * size.width // hw[1]
        plane[rows:, columns:] = value << shift
    assert parts.are_in(frame) == unwritten
    planes[0][-1, hw[1] - 1] = 200
    assert not parts.are_in(frame)


@pytest.mark.slow
def test_one_frame_whatever_way_of_larger_hevc(threads: list[int]) -> None:
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (24, 80, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    frames = (texture[:, 4 * n : 4 * n + 320] for n in range(36))
    options = {"gop": 12, **CODECS["hevc"][1]}
    write_video(file, frames, source_fps=10.0, container_format="mp4", **options)
    sound_packets = packets_of(file.getvalue())
    for seed in range(20):
        random_ = random.Random(seed)
        data = bytearray(file.getvalue())
        for packet in random_.sample(sound_packets, 2):
            at = data.find(packet.data)
            data[random_.randrange(at + 20, at + len(packet.data))] ^= 1 << random_.randrange(8)
        compare_ways(bytes(data), random_, threads, fresh=6)


def test_lost_frames_count_whenever_they_are_read() -> None:
    data = damaged("h264", "matroska", "cut", 0)
    with open_video(data) as source:
        frames = dict(source.read(range(source.metadata.num_frames)))
        lost = source.frames_substituted
        assert lost > 0
        for i in frames:
            list(source.read([i]))
        assert source.frames_substituted == 2 * lost
