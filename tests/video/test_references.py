"""Packets that no picture refers to are those that FFmpeg's own skipping leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from vtts_rt.video import open_video
from vtts_rt.video.references import is_disposable

Make = Callable[..., Path]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
@pytest.mark.parametrize("b_frames", [0, 2, 3])
def test_the_same_packets_as_ffmpeg_skips(suffix: str, b_frames: int, make_clip: Make) -> None:
    path = make_clip(f"c.{suffix}", 40, gop=12, b_frames=b_frames)
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
    for name, codec in (("c.webm", "libvpx-vp9"), ("c.mkv", "mpeg4")):
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
