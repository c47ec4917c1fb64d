"""Threads of a decoder change no frame, not even after a packet that does not decode."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from clip_writer import write_video

from vtts_rt.data.backgrounds import ProceduralBackground
from vtts_rt.types import PixelBox
from vtts_rt.video import open_video, packets
from vtts_rt.video.pyav import PyavSource


@pytest.mark.parametrize(
    ("name", "codec"), [("c.webm", "libvpx-vp9"), ("c.mp4", "libx264"), ("c.mp4", "libx265")]
)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_what_follows_a_broken_packet_is_the_same_in_any_order(
    name: str, codec: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    b_frames = None if codec == "libvpx-vp9" else 0
    scene = ProceduralBackground(np.random.default_rng(1), 90, 160)
    frames = (scene.region(i / 10, PixelBox(0, 0, 160, 90)) for i in range(36))
    write_video(path, frames, source_fps=10, codec=codec, gop=12, b_frames=b_frames)
    monkeypatch.setattr(packets, "num_decoder_threads", lambda: threads)
    with open_video(path) as source:
        assert isinstance(source, PyavSource)
        reader = packets.PacketReader(source.media, source.index)
        reader.start_at(0)
        bodies = {ordinal: bytes(packet) for ordinal, packet in iter(reader.take, None)}
    data, body = path.read_bytes(), bodies[17]
    assert data.count(body) == 1
    broken = data.replace(body, bytes(len(body)))
    with open_video(broken) as source:
        whole = dict(source.read(range(36)))
        assert source.frames_substituted > 0
    with open_video(broken) as source:
        for wanted in ([16, 17], [18], [19], [10, 20, 30], [21, 22], [18, 23]):
            for i, frame in source.read(wanted):
                np.testing.assert_array_equal(frame, whole[i], err_msg=f"{i} of {wanted}")


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (1, 1), (2, 2), (4, 2), (64, 8)])
def test_half_of_the_cores_decode_and_two_where_there_are_two(
    cores: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert packets.num_decoder_threads() == threads
