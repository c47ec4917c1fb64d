"""When frames show: stated rates, the last frame's duration, damaged stamps, streams cut anywhere.

Expected numbers are those of ffprobe 5.1 (avg_frame_rate, format=duration, pkt_pts_time) for files
made in the same way, or follow from how the file is made.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clip_writer import write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from video.zoo import (
    FRAMES,
    GOP,
    av_packet,
    encoded,
    ivf_times,
    packets_of,
    paint,
    read_code,
    remux,
)
from video.zoo_broken import MPEG4_GROUPS, X264, X265
from video.zoo_sound import AV1, VP8, VP9

from vtts_rt.video import open_video
from vtts_rt.video.timestamps import mended_times

MPEG2 = {"codec": "mpeg2video", "encoder_options": {"sc_threshold": "1000000000"}}


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 24, 30, 60])
@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("h264", {"codec": "libx264", "b_frames": 2}),
        ("h264", {"codec": "libx264", "b_frames": 0}),
        ("hevc", {"codec": "libx265", "b_frames": 2}),
        ("mpeg2video", {"codec": "mpeg2video"}),
        ("m4v", {"codec": "mpeg4"}),
        ("ivf", {"codec": "libvpx"}),
    ],
)
def test_raw_streams_run_at_the_rate_they_state(
    rate: float | Fraction, container: str, options: dict[str, Any]
) -> None:
    file = io.BytesIO()
    write_video(
        file, map(paint, range(24)), source_fps=float(rate), container_format=container, **options
    )
    with open_video(file.getvalue()) as source:
        meta = source.metadata
        assert meta.source_fps == pytest.approx(float(rate), rel=1e-4)
        assert meta.num_frames == 24
        assert meta.duration_seconds == pytest.approx(24 / float(rate), rel=1e-3)
        np.testing.assert_allclose(
            meta.timestamps_seconds, np.arange(24) / float(rate), rtol=1e-3, atol=1e-6
        )


def test_a_rate_that_is_given_wins_over_that_of_a_raw_stream() -> None:
    with open_video(encoded("h264", codec="libx264"), source_fps=50.0) as source:
        assert source.metadata.source_fps == 50.0
        assert source.metadata.duration_seconds == pytest.approx(FRAMES / 50)


def slides(suffix: str, codec: str) -> bytes:
    """Three frames that show for 0.5, 0.5 and 5 s."""
    file, base = io.BytesIO(), Fraction(1, 1000)
    container = {"mkv": "matroska"}.get(suffix, suffix)
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        if codec == "libx264":
            stream.options = {"bf": "0", "tune": "zerolatency"}
        packets = []
        for n, time in enumerate((0, 500, 1000)):
            frame = av.VideoFrame.from_ndarray(paint(n), format="rgb24")
            frame.pts, frame.time_base = time, base
            packets += stream.encode(frame)
        for n, packet in enumerate([*packets, *stream.encode()]):
            packet.duration = int((5 if n == 2 else 0.5) / packet.time_base)
            out.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mov", "libx264"), ("mkv", "libx264"), ("webm", "libvpx")],
)
def test_the_last_frame_lasts_as_long_as_the_file_says(suffix: str, codec: str) -> None:
    data = slides(suffix, codec)
    with open_video(data) as source:
        meta = source.metadata
        assert meta.duration_seconds == pytest.approx(6.0, abs=0.01)
        assert meta.source_fps == pytest.approx(0.5, rel=0.01)
        np.testing.assert_allclose(meta.timestamps_seconds, [0, 0.5, 1.0], atol=2e-3)
    with open_video(data, start_seconds=3.0) as source:
        assert source.metadata.num_frames == 1
        assert read_code(dict(source.read([0]))[0]) == 2


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_the_last_picture_of_an_animation_lasts_its_delay(suffix: str) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = [image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    pictures[0].save(
        file, suffix, save_all=True, append_images=pictures[1:], duration=[500, 500, 5000]
    )
    with open_video(file.getvalue()) as source:
        assert source.metadata.duration_seconds == pytest.approx(6.0)
        assert source.metadata.source_fps == pytest.approx(0.5)


@pytest.mark.parametrize("container", ["avi", "mpegts", "nut", "flv", "matroska", "mp4"])
def test_a_constant_rate_gives_its_last_frame_a_step(container: str) -> None:
    with open_video(encoded(container, **X264)) as source:
        assert source.metadata.duration_seconds == pytest.approx(FRAMES / 10, abs=0.01)
        assert source.metadata.source_fps == pytest.approx(10.0)


@pytest.mark.parametrize("where", [5, 12, FRAMES - 2])
@pytest.mark.parametrize("stamp", [10**6, 40, 0])
def test_a_spike_moves_no_other_frame(where: int, stamp: int) -> None:
    data = ivf_times(encoded("ivf", **VP8), lambda n: stamp if n == where else n)
    with open_video(data) as source:
        meta = source.metadata
        np.testing.assert_allclose(meta.timestamps_seconds, np.arange(FRAMES) / 10, atol=1e-6)
        assert meta.duration_seconds == pytest.approx(FRAMES / 10)
        codes = [read_code(frame) for _, frame in sorted(source.read(range(FRAMES)), key=first)]
        assert codes == list(range(FRAMES))


def first(pair: tuple[int, Any]) -> int:
    return pair[0]


STEPS = np.arange(60) * 100
# Decode order of groups of a reference and two B-frames.
REORDERED = np.array([0, *(k + n for k in range(1, 58, 3) for n in (2, 0, 1))]) * 100 + 200


@pytest.mark.parametrize("value", [10**9, 10**17, -(10**9)])
@pytest.mark.parametrize("where", [0, *range(1, 57, 5), 57])
def test_a_spike_among_reordered_frames(where: int, value: int) -> None:
    dts = np.arange(len(REORDERED)) * 100
    times = REORDERED.copy()
    if 0 < where < 57:
        times[where] = value
        np.testing.assert_array_equal(mended_times(times, dts), REORDERED)
        times = REORDERED
    clock = dts.copy()
    clock[where] = value
    np.testing.assert_array_equal(mended_times(times, clock), REORDERED)


def test_stamps_that_stray_and_clocks_that_start_over() -> None:
    for astray in ([10**9] * 3, [5] * 3, [7]):
        times = STEPS.copy()
        times[10 : 10 + len(astray)] = astray
        np.testing.assert_array_equal(mended_times(times, times), STEPS)
    for begin in (0, 25):  # the second part starts over, or repeats five frames
        joined = np.concatenate([STEPS[:30], STEPS[begin : begin + 30]])
        np.testing.assert_array_equal(mended_times(joined, joined), STEPS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 40, 1000, 10**6]), min_size=1, max_size=60))
def test_ascending_times_are_left_alone(steps: list[int]) -> None:
    times = np.cumsum(steps)
    np.testing.assert_array_equal(mended_times(times, times), times)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(1 << 61), 1 << 61), min_size=1, max_size=60))
def test_any_stamps_are_survived(stamps: list[int]) -> None:
    times = np.array(stamps, np.int64)
    assert mended_times(times, times).shape == times.shape


@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("mpegts", X264),
        ("mp4", X264),
        ("matroska", X265),
        ("mpegts", MPEG2),
        ("avi", MPEG4_GROUPS),
        ("webm", VP8),
        ("webm", VP9),
        ("mp4", AV1),
        ("flv", {"codec": "flv"}),
    ],
)
@pytest.mark.parametrize("lead", [1, 7])
def test_frames_before_the_first_keyframe_are_its_picture(
    container: str, options: dict[str, Any], lead: int, tmp_path: Path
) -> None:
    path = tmp_path / "c.bin"
    remux(encoded(container, **options), path, lambda p: p[GOP - lead :], container=container)
    want = [GOP] * lead + list(range(GOP, FRAMES))
    ways: list[list[int]] = [[0], [0, len(want) - 1], [lead - 1, lead], list(range(len(want)))]
    for wanted in ways:
        with open_video(path) as source:
            assert source.metadata.num_frames == len(want)
            frames = dict(source.read(wanted))
            assert {i: read_code(f) for i, f in frames.items()} == {i: want[i] for i in wanted}
            assert source.frames_substituted == sum(i < lead for i in wanted)


@pytest.mark.parametrize("best", [0, 1])
def test_of_several_streams_the_best_is_taken(best: int, tmp_path: Path) -> None:
    """As av_find_best_stream: that which the file calls its default, wherever it stands."""
    path = tmp_path / "two.mkv"
    contents = [encoded(**VP9), encoded(**VP9, first=100)]
    with av.open(str(path), "w") as out:
        for n, content in enumerate(contents):
            with av.open(io.BytesIO(content)) as source:
                stream = source.streams.video[0]
                copy: Any = out.add_stream_from_template(stream)
                copy.disposition = av.stream.Disposition(int(n == best))
                base = stream.time_base
        for n, content in enumerate(contents):
            for packet in packets_of(content):
                out.mux(av_packet(packet, out.streams.video[n], base))
    with open_video(path) as source:
        assert read_code(dict(source.read([0]))[0]) == 100 * best
