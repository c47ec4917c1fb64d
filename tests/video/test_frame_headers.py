"""What packet headers of VP8, VP9 and MJPEG say, against what FFmpeg's decoders make of them."""

from __future__ import annotations

import random
from pathlib import Path

import av
import pytest
from video.zoo import GOP, encoded, hide_vp8, packets_of
from video.zoo_sound import MJPEG, SOUND, VP8, VP9

from vtts_rt.video.frame_headers import frame_header, shows_nothing, vp9_frames

CASES = [name for name in SOUND if name.startswith(("vp8", "vp9", "mjpeg"))]
RAW = {"mjpeg, junk in the packets"}  # what stands around an image is not understood


@pytest.mark.parametrize("name", CASES)
def test_headers_say_what_the_decoder_gives(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.{SOUND[name].suffix}"
    SOUND[name].write(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        codec = stream.codec_context.codec.canonical_name
        seen, layouts = set(), set()
        for packet in container.demux(stream):
            if not packet.size:
                continue
            data = bytes(packet)
            header = frame_header(codec, data)
            if header is None:
                assert name in RAW, packet
                continue
            frames = stream.decode(packet)
            assert header.shown == len(frames)
            assert shows_nothing(codec, packet) == (not frames)
            for frame in frames:
                # A size is stated by keyframes at least, later frames may refer to it.
                seen |= header.sizes
                layouts |= header.layouts
                assert not packet.is_keyframe or (frame.height, frame.width) in header.sizes
                assert (frame.height, frame.width) in seen
    assert name in RAW or (seen and (layouts or codec == "vp8"))


@pytest.mark.parametrize("codec", ["vp8", "vp9", "mjpeg"])
def test_cut_and_mutated_packets_are_none_or_a_header(codec: str) -> None:
    options = {"vp8": VP8, "vp9": VP9, "mjpeg": MJPEG}[codec]
    packets = packets_of(encoded(**options))
    rng = random.Random(codec)
    understood = 0
    for packet in (packets[0], packets[1], packets[GOP]):
        for end in range(1, min(len(packet.data), 700)):
            frame_header(codec, packet.data[:end])
        for _ in range(400):
            data = bytearray(packet.data)
            for _ in range(rng.choice((1, 3, 20))):
                data[rng.randrange(min(len(data), 64))] = rng.randrange(256)
            header = frame_header(codec, bytes(data))
            shows_nothing(codec, bytes(data))
            understood += header is not None
    assert understood > 100


@pytest.mark.parametrize("codec", ["vp8", "vp9", "mjpeg"])
def test_nothing_at_all_is_no_header(codec: str) -> None:
    assert frame_header(codec, b"") is None


def bits(*fields: tuple[int, int]) -> bytes:
    """(value, number of bits) one after another, filled up with zeros."""
    text = "".join(f"{value:0{count}b}" for value, count in fields)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


SYNC, HW = (0x498342, 24), ((101 - 1, 16), (75 - 1, 16))  # width first
# frame_marker, profile low and high (a reserved bit behind 3), show_existing_frame 0.
PROFILES = {n: ((2, 2), (n & 1, 1), (n >> 1, 1), *[(0, 1)] * (n == 3), (0, 1)) for n in range(4)}
HIDDEN_INTER = ((1, 1), (0, 1), (0, 1))  # frame_type, show_frame, error_resilient_mode
INTRA_ONLY = (*HIDDEN_INTER, (1, 1), (0, 2))
KEYFRAME = ((0, 1), (1, 1), (0, 1))
SHOWN_INTER = ((1, 1), (1, 1), (0, 1), (0, 2), (0, 8), (0, 12))
SIZE = frozenset({(75, 101)})


@pytest.mark.parametrize(
    ("fields", "shown", "sizes", "layouts"),
    [
        # Intra-only frames have no colour fields in profile 0, and keyframes' in the others.
        ((*PROFILES[0], *INTRA_ONLY, SYNC, (0, 8), *HW), 0, SIZE, set()),
        (
            (*PROFILES[1], *INTRA_ONLY, SYNC, (2, 3), (1, 1), (4, 3), (0, 8), *HW),
            0,
            SIZE,
            {(1, 0, 2, 1, 4)},
        ),
        ((*PROFILES[2], *KEYFRAME, SYNC, (1, 1), (2, 3), (0, 1), *HW), 1, SIZE, {(2, 1, 2, 0, 0)}),
        ((*PROFILES[3], *KEYFRAME, SYNC, (0, 1), (7, 3), (0, 1), *HW), 1, SIZE, {(3, 0, 7, 0)}),
        # The size of the second frame that it refers to; a size of its own.
        ((*PROFILES[0], *SHOWN_INTER, (0, 1), (1, 1)), 1, set(), set()),
        ((*PROFILES[0], *SHOWN_INTER, (0, 3), *HW), 1, SIZE, set()),
        ((*PROFILES[0][:-1], (1, 1), (5, 3)), 1, set(), set()),  # shows a frame of before
    ],
)
def test_headers_of_vp9_made_by_hand(
    fields: tuple[tuple[int, int], ...],
    shown: int,
    sizes: set[tuple[int, int]],
    layouts: set[tuple[int, ...]],
) -> None:
    packet = bits(*fields)
    header = frame_header("vp9", packet)
    assert header is not None
    assert (header.shown, header.sizes, header.layouts) == (shown, sizes, layouts)
    assert shows_nothing("vp9", packet) == (shown == 0)
    for end in range(len(packet)):
        assert frame_header("vp9", packet[:end]) is None


def test_other_codecs_are_not_understood() -> None:
    assert frame_header("h264", b"\0\0\0\1\x65") is None and not shows_nothing("h264", b"\0")
    for codec in ("vp9", "mjpeg"):
        assert frame_header(codec, b"\xff") is None


def test_hidden_frames_of_vp8() -> None:
    packets = hide_vp8(packets_of(encoded(**VP8)), 3, GOP)
    hidden = [n for n, packet in enumerate(packets) if shows_nothing("vp8", packet.data)]
    assert hidden == [3, GOP]


def test_frames_of_a_superframe(tmp_path: Path) -> None:
    SOUND["vp9 altref"].write(tmp_path / "c.webm")
    packets = [packet.data for packet in packets_of(tmp_path / "c.webm")]
    several = [data for data in packets if len(vp9_frames(data)) > 1]
    assert several and len(packets) == 60
    for data in several:
        first, last = (frame_header("vp9", f) for f in (vp9_frames(data)[0], vp9_frames(data)[-1]))
        assert first is not None and last is not None
        assert (first.shown, last.shown) == (0, 1)
        assert shows_nothing("vp9", vp9_frames(data)[0]) and not shows_nothing("vp9", data)
