"""What packet headers tell: pictures that none refers to, as FFmpeg skips them, and damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtts_rt.video import open_video
from vtts_rt.video.references import FrameNumbers, is_disposable

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        *((suffix, "libx264") for suffix in ("mp4", "mkv", "ts", "h264")),
        *((suffix, "libx265") for suffix in ("mp4", "mkv", "ts")),
    ],
)
@pytest.mark.parametrize("b_frames", [0, 2, 3])
def test_the_same_packets_as_ffmpeg_skips(
    suffix: str, codec: str, b_frames: int, make_clip: Make
) -> None:
    path = make_clip(f"c.{suffix}", 40, codec=codec, gop=12, b_frames=b_frames)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        packets, shown = [], 0
        for packet in container.demux(stream):
            if packet.size:
                packets.append(is_disposable(stream.codec_context, packet))
            shown += len(stream.decode(packet))
    assert len(packets) == 40
    assert len(packets) - sum(packets) == shown
    assert any(packets) == (b_frames > 0)


def test_what_is_not_understood_is_kept(make_clip: Make) -> None:
    for name, codec in (("c.webm", "libvpx-vp9"), ("c.mkv", "mpeg2video"), ("c.mkv", "ffv1")):
        with av.open(str(make_clip(name, 4, codec=codec))) as container:
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size]
            assert not any(is_disposable(stream.codec_context, p) for p in packets)
    with av.open(str(make_clip("c.mp4", 8, b_frames=2))) as container:
        context = container.streams.video[0].codec_context
        for junk in (b"", b"\0", b"\0\0\0\xff", b"\0\0\0\x01", b"\xff" * 9, b"\0\0\0\x02\x06\x05"):
            packet = av.Packet(junk) if junk else av.Packet(0)
            assert not is_disposable(context, packet)


def test_pixels_are_those_of_a_whole_decode(make_clip: Make) -> None:
    path = make_clip("c.mp4", 60, gop=30, b_frames=3)
    with av.open(str(path)) as container:
        whole = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    with open_video(path) as source:
        frames = dict(source.read(range(0, 60, 7)))
        assert source.frames_codec_decoded < 50
    assert all(np.array_equal(frame, whole[index]) for index, frame in frames.items())


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "libvpx-vp9", "mpeg4"])
def test_a_frame_read_alone_is_the_frame_of_the_whole(codec: str, make_clip: Make) -> None:
    path = make_clip("c.mp4", 30, codec=codec, gop=12)
    with open_video(path) as source:
        whole = dict(source.read(range(30)))
    for index in range(30):
        with open_video(path) as source:
            ((_, frame),) = source.read([index])
            assert source.frames_substituted == 0, index
        np.testing.assert_array_equal(frame, whole[index])


def h264_packets(path: Path) -> tuple[bytes | None, list[bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
        return stream.codec_context.extradata, packets


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
@pytest.mark.parametrize(
    "options",
    [
        {"b_frames": 0},
        {"b_frames": 3},
        {"x264": "open-gop=1:slices=3"},
        {"x264": "tff=1"},
        {"x264": "intra-refresh=1"},
        {"pixel_format": "yuv444p"},
        {"pixel_format": "yuv422p10le"},
        {"x264": "cqm=jvt"},
    ],
)
def test_numbers_of_h264_frames(suffix: str, options: dict[str, Any], make_clip: Make) -> None:
    options = dict(options)
    # Painted frames have nothing in common: left alone, x264 would start anew at each.
    params = {"x264-params": ":".join(["scenecut=0", options.pop("x264", "ref=2")])}
    path = make_clip(f"c.{suffix}", 40, gop=12, encoder_options=params, **options)
    extradata, packets = h264_packets(path)
    numbers = FrameNumbers(extradata)
    assert all(numbers.follows(packet) for packet in packets)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        referred = [
            n
            for n, data in enumerate(packets)
            if n and not is_disposable(context, av.Packet(data)) and data != packets[0]
        ]
    missed = 0
    for n in referred[1:-1]:
        numbers = FrameNumbers(extradata)
        missed += all(numbers.follows(data) for k, data in enumerate(packets) if k != n)
    # Nothing tells of the last one before a picture that starts anew.
    assert missed <= 40 // 12 + 1


def test_parameter_sets_that_change_are_told(make_clip: Make) -> None:
    extradata, packets = h264_packets(make_clip("c.ts", 20, gop=5))
    changed = packets[5].replace(b"\0\0\1\x68", b"\0\0\1\x68\x80", 1)
    numbers = FrameNumbers(extradata)
    assert changed != packets[5] and numbers.follows(packets[4])
    assert not numbers.follows(changed)


@given(data=st.binary(max_size=80), extradata=st.none() | st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_survived(data: bytes, extradata: bytes | None) -> None:
    FrameNumbers(extradata).follows(data)
    for name in ("h264", "hevc"):
        context = SimpleNamespace(name=name, extradata=extradata)
        assert is_disposable(context, data) in (True, False)
