"""DALI on the CPU against PyAV: pixels, which frame is which, and what is left to PyAV."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clip_writer import write_video
from video.zoo import at_once

from vtts_rt import Runtime, SamplingParams
from vtts_rt.data.backgrounds import ProceduralBackground
from vtts_rt.types import PixelBox
from vtts_rt.video import FrameStore, dali_pipeline, open_video
from vtts_rt.video.dali import MAX_DIFFERENCE, MEAN_DIFFERENCE, DaliSource
from vtts_rt.video.decoders import dali_refusal
from vtts_rt.video.packets import PacketReader

Make = Callable[..., Path]
Code = Callable[[np.ndarray], int]

CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "vp9": ("c.webm", {"codec": "libvpx-vp9", "gop": 12}),
    "vp9 in mp4": ("c.mp4", {"codec": "libvpx-vp9", "gop": 5}),
    "vp8": ("c.mkv", {"codec": "libvpx", "gop": 12}),
    "mjpeg": ("c.avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "mjpeg 4:4:4": ("c.mov", {"codec": "mjpeg", "pixel_format": "yuvj444p"}),
}
clips = pytest.mark.parametrize("kind", CLIPS)


def dali(path: Path | bytes) -> DaliSource:
    source = open_video(path, decoder="dali")
    assert isinstance(source, DaliSource), "left to PyAV"
    return source


def natural(num_frames: int, height: int = 90, width: int = 160) -> Iterator[np.ndarray]:
    """Frames like footage: coloured texture and shapes that move."""
    scene = ProceduralBackground(np.random.default_rng(1), height, width)
    box = PixelBox(0, 0, width, height)
    return (scene.region(i / 10, box) for i in range(num_frames))


def differences(path: Path, every: int = 1) -> tuple[int, float]:
    """(largest, mean) absolute difference of the frames of both decoders."""
    with open_video(path, decoder="pyav") as theirs, dali(path) as ours:
        indices = range(0, ours.metadata.num_frames, every)
        expected, got = dict(theirs.read(indices)), dict(ours.read(indices))
    off = np.stack([np.abs(got[i].astype(int) - expected[i]) for i in indices])
    return int(off.max()), float(off.mean())


# -- pixels -----------------------------------------------------------------------------------


@clips
def test_pixels_within_the_stated_tolerance_of_pyav(kind: str, tmp_path: Path) -> None:
    name, options = CLIPS[kind]
    write_video(tmp_path / name, natural(24), source_fps=10, **options)
    largest, mean = differences(tmp_path / name)
    assert largest <= MAX_DIFFERENCE and mean <= MEAN_DIFFERENCE
    # Chroma of 4:2:0 is spread in another way; where there is nothing to spread all is equal.
    assert (mean == 0) == (options.get("pixel_format") == "yuvj444p")


def vp9(path: Path, **tags: int) -> Path:
    """Natural VP9 with the colour tags of its codec context, converted accordingly."""
    matrix = {1: "ITU709", 9: None}.get(tags.get("colorspace", 2), "ITU601")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10, options={"cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for pixels in natural(6):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix)))
        container.mux(stream.encode())
    return path


def test_the_matrix_of_hd_video_is_corrected(tmp_path: Path) -> None:
    path = vp9(tmp_path / "c.mkv", colorspace=1, color_range=1)
    largest, mean = differences(path)
    assert largest <= MAX_DIFFERENCE and mean <= MEAN_DIFFERENCE
    with dali(path) as source:
        source._correction = None
        bare = dict(source.read([3]))[3]
    with open_video(path) as source:
        assert np.abs(bare.astype(int) - dict(source.read([3]))[3]).mean() > 1.5 * MEAN_DIFFERENCE


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"color_range": 2}, "full range"),
        ({"colorspace": 7, "color_range": 1}, "colour matrix 7"),
    ],
)
def test_colours_that_dali_would_show_wrong_are_left_to_pyav(
    tags: dict[str, int], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = vp9(tmp_path / "c.mkv", **tags)
    with caplog.at_level(logging.INFO), open_video(path, decoder="dali") as source:
        assert source.metadata.decoder == "pyav"
    assert f"decoded by PyAV, not DALI ({reason}" in caplog.text


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_files_are_upright(degrees: int, tmp_path: Path) -> None:
    path = tmp_path / "c.mp4"
    options = {"codec": "mjpeg", "pixel_format": "yuvj444p", "rotation_degrees": degrees}
    write_video(path, natural(3), source_fps=10, **options)
    with dali(path) as source:
        meta = source.metadata
        assert (meta.height, meta.width) == ((90, 160) if degrees == 180 else (160, 90))
    assert differences(path) == (0, 0.0)


@pytest.mark.cuda
@pytest.mark.skipif(dali_refusal(0) is not None, reason=str(dali_refusal(0)))
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mjpeg"])
def test_nvdec_s_frames_stay_on_the_gpu(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "c.mkv"
    options = {"pixel_format": "yuvj420p"} if codec == "mjpeg" else {"gop": 12}
    write_video(path, natural(30, 180, 320), source_fps=10, codec=codec, **options)
    indices = [0, 7, 13, 14, 29]
    with open_video(path, decoder="dali", device=0) as source, open_video(path) as plain:
        assert source.metadata.decoder == "dali"
        expected = dict(plain.read(indices))
        for i, frame in source.read(indices):
            assert frame.is_cuda and frame.dtype == torch.uint8
            off = np.abs(frame.cpu().numpy().astype(int) - expected[i])
            assert off.max() <= MAX_DIFFERENCE and off.mean() <= MEAN_DIFFERENCE


# -- which frame is which ---------------------------------------------------------------------


@clips
def test_frames_in_any_order(kind: str, make_clip: Make, code_of: Code) -> None:
    name, options = CLIPS[kind]
    path = make_clip(name, 60, **options)
    rng = random.Random(kind)
    with dali(path) as source:
        assert {i: code_of(f) for i, f in source.read(range(60))} == {i: i for i in range(60)}
        for _ in range(12):
            wanted = rng.sample(range(60), rng.randint(1, 9))
            frames = dict(source.read(wanted))
            assert sorted(frames) == sorted(wanted)
            assert all(code_of(frame) == i for i, frame in frames.items())
        assert source.frames_by_pyav == 0 and source.frames_substituted == 0


@clips
def test_a_frame_is_the_same_whatever_is_read_with_it(kind: str, tmp_path: Path) -> None:
    name, options = CLIPS[kind]
    write_video(tmp_path / name, natural(30), source_fps=10, **options)
    with dali(tmp_path / name) as source:
        whole = dict(source.read(range(30)))
        for wanted in ([29], [3, 17], [11, 12, 13]):
            for i, frame in source.read(wanted, passing=range(30)):
                np.testing.assert_array_equal(frame, whole[i])


def test_passed_frames_are_by_products(make_clip: Make, code_of: Code) -> None:
    with dali(make_clip("c.webm", 60, codec="libvpx-vp9", gop=12)) as source:
        frames = dict(source.read([30], passing=range(60)))
        assert sorted(frames) == list(range(24, 31))  # from the keyframe on, no further
        assert all(code_of(frame) == i for i, frame in frames.items())


def test_a_look_costs_its_groups_of_pictures(make_clip: Make) -> None:
    path = make_clip("long.mkv", 250, codec="libvpx", gop=10)
    with dali(path) as source:
        before = source.frames_codec_decoded
        assert len(dict(source.read(range(120, 130)))) == 10
        assert source.frames_codec_decoded - before == 10 + 1  # and the guard


def test_large_reads_come_in_batches(
    make_clip: Make, code_of: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtts_rt.video.dali.MAX_BATCH_BYTES", 5 * 48 * 64 * 3)
    sizes = []
    decode = dali_pipeline.decode

    def counted(samples: Any, device: Any) -> Any:
        sizes.append(sum(len(sample.frames) for sample in samples))
        return decode(samples, device)

    with dali(make_clip("c.webm", 60, codec="libvpx-vp9", gop=12)) as source:
        monkeypatch.setattr("vtts_rt.video.dali.decode", counted)
        assert {i: code_of(f) for i, f in source.read(range(60))} == {i: i for i in range(60)}
    assert max(sizes) == 5


def test_threads_share_a_source(make_clip: Make, code_of: Code) -> None:
    wrong: list[int] = []
    with dali(make_clip("c.webm", 60, codec="libvpx-vp9", gop=12)) as source:

        def reads(seed: int) -> None:
            wanted = random.Random(seed).sample(range(60), 20)
            wrong.extend(i for i, frame in source.read(wanted) if code_of(frame) != i)

        at_once(reads, range(4))
    assert not wrong


# -- what DALI does not decode ----------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "mpeg4"])
def test_other_codecs_are_pyav_s_inside_the_same_call(codec: str, make_clip: Make) -> None:
    path = make_clip("c.mp4", 12, codec=codec)
    with open_video(path, decoder="dali") as source, open_video(path) as plain:
        assert source.metadata.decoder == "pyav"
        # It shares the caches of what PyAV was asked for.
        assert source.metadata.video_id == plain.metadata.video_id


def test_the_video_ids_of_decoders_differ(make_clip: Make) -> None:
    path = make_clip("c.webm", 12, codec="libvpx-vp9")
    with dali(path) as source, open_video(path) as plain:
        assert source.metadata.video_id != plain.metadata.video_id
        assert source.metadata.decoder == "dali"
    with dali(path.read_bytes()) as again:
        assert again.metadata.video_id == source.metadata.video_id


def tampered(monkeypatch: pytest.MonkeyPatch, ordinal: int, spoil: Callable[[Any], Any]) -> None:
    """Reading packet `ordinal` gives what `spoil` makes of it from now on."""
    take = PacketReader.take

    def taking(self: PacketReader) -> Any:
        taken = take(self)
        if taken is None or taken[0] != ordinal:
            return taken
        packet = av.Packet(spoil(bytearray(bytes(taken[1]))))
        packet.stream = taken[1].stream
        return ordinal, packet

    monkeypatch.setattr(PacketReader, "take", taking)


def hide(data: bytearray) -> bytes:
    data[0] &= ~0x10  # VP8: "this frame is not shown" (RFC 6386, 9.1)
    return bytes(data)


def test_a_packet_that_shows_nothing_shifts_no_frame(
    make_clip: Make, code_of: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip("c.mkv", 60, codec="libvpx", gop=12)
    other = make_clip("other.mkv", 100, codec="libvpx", gop=12)
    wanted = [24, 25, 27, 40]
    with dali(path) as source, dali(other) as noise:
        list(noise.read(range(60, 100)))  # its pixels stay in DALI's memory
        # The index does not know: to it packet 26 holds frame 26.
        tampered(monkeypatch, 26, hide)

        def read() -> list[int]:
            return [code_of(frame) for _, frame in sorted(source.read(wanted))]

        assert read() == wanted
        assert source.frames_by_pyav == 1, "27, behind the packet; the others are DALI's"
        # Headers are read and the guard is looked at: either is enough, without both it is wrong.
        with monkeypatch.context() as only_guard:
            only_guard.setattr(DaliSource, "_fits", lambda self, ordinal, packet: True)
            assert read() == wanted
            only_guard.setattr(DaliSource, "_passes", lambda self, frames: True)
            assert read() != wanted


def test_frames_that_are_not_shown_are_not_counted(tmp_path: Path) -> None:
    write_video(tmp_path / "plain.mkv", natural(40), source_fps=10, codec="libvpx", gop=12)
    path = tmp_path / "c.mkv"
    with av.open(str(tmp_path / "plain.mkv")) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                data = bytearray(bytes(packet))
                for pts, part in ((packet.pts - 50, hide(data)), (packet.pts, bytes(packet))):
                    copy = av.Packet(part)
                    copy.pts = copy.dts = pts + 50
                    copy.stream, copy.time_base = stream, packet.time_base
                    copy.is_keyframe = packet.is_keyframe
                    # A hidden picture before some of those that are shown, never a keyframe.
                    if pts == packet.pts or (pts // 100 % 5 == 4 and not packet.is_keyframe):
                        container.mux(copy)
    with dali(path) as source, open_video(path) as plain:
        index = source._source.index
        assert index.num_packets > index.num_frames == 40
        got, expected = dict(source.read(range(40))), dict(plain.read(range(40)))
        off = [np.abs(got[i].astype(int) - expected[i]).mean() for i in range(40)]
        assert max(off) <= MEAN_DIFFERENCE and source.frames_by_pyav == 0


def test_the_guard_is_spoilt_in_memory_that_is_used_again(make_clip: Make) -> None:
    with dali(make_clip("c.mkv", 30, codec="libvpx", gop=12)) as source:
        frames = torch.stack([source._guard, source._guard])
        assert source._passes(frames) and not source._passes(frames)


@pytest.mark.parametrize("kind", ["vp9", "vp8", "mjpeg"])
def test_what_does_not_decode_is_pyav_s_and_the_rest_dali_s(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, options = CLIPS[kind]
    path = tmp_path / name
    write_video(path, natural(36), source_fps=10, **options)
    with dali(path) as source:
        sound = dict(source.read(range(36)))
        reader = source._packets
        reader.start_at(0)
        packets = {ordinal: bytes(packet) for ordinal, packet in iter(reader.take, None)}
    data = path.read_bytes()
    body = packets[17]
    assert data.count(body) == 1
    shown = bytes([body[0] & 0x10])  # VP8: a packet of zeros would be one that is not shown
    broken = data.replace(body, shown + bytes(len(body) - 1))
    with caplog.at_level(logging.WARNING), dali(broken) as source, open_video(broken) as plain:
        got = dict(source.read(range(36)))
        expected = dict(plain.read(range(36)))
        last_of_group = 17 if kind == "mjpeg" else 23
        for i in range(36):
            shown = expected if 17 <= i <= last_of_group else sound
            np.testing.assert_array_equal(got[i], shown[i], err_msg=str(i))
        assert source.frames_by_pyav == last_of_group - 17 + 1
        assert source.frames_substituted == plain.frames_substituted > 0
        # The same frames whatever is asked for together.
        for wanted in ([20], [10, 20, 30], [16, 17]):
            for i, frame in source.read(wanted):
                np.testing.assert_array_equal(frame, got[i])
    assert caplog.text.count("PyAV decodes what DALI does not") == 1


def test_a_file_that_changes_while_open(make_clip: Make, tmp_path: Path) -> None:
    path = tmp_path / "c.webm"
    path.write_bytes(make_clip("c.webm", 40, codec="libvpx-vp9", gop=12).read_bytes())
    with dali(path) as source:
        frames = source.read([1, 30])
        path.write_bytes(make_clip("d.webm", 41, codec="libvpx-vp9", gop=9).read_bytes())
        with pytest.raises(RuntimeError, match="changed or removed while it was open"):
            list(frames)


def test_a_closed_source_says_so(make_clip: Make) -> None:
    source = dali(make_clip("c.webm", 40, codec="libvpx-vp9", gop=12))
    frames = source.read([1, 30])
    source.close()
    source.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(frames)
    with pytest.raises(RuntimeError, match="was closed"):
        source.read([0])
    with pytest.raises(ValueError, match=r"integers in 0..39"):
        source.read([40])


# -- through the runtime ----------------------------------------------------------------------


def test_the_store_keeps_dali_s_frames(make_clip: Make, code_of: Code) -> None:
    store = FrameStore(1 << 20)
    with dali(make_clip("c.webm", 60, codec="libvpx-vp9", gop=12)) as source:
        for _ in range(2):
            frames = store.frames(source, [5, 40, 5])
            assert [code_of(frame) for frame in frames] == [5, 40, 5]
    assert store.frames_decoded == 2
    store.check_integrity()
    store.close()


@pytest.mark.slow
def test_equal_pixels_give_equal_tokens(tmp_path: Path) -> None:
    path = tmp_path / "c.webm"
    write_video(path, natural(40, 112, 168), source_fps=10, codec="libvpx-vp9", gop=12)
    with dali(path) as source:
        frames = np.stack([frame for _, frame in sorted(source.read(range(40)))])
    with Runtime.from_pretrained("tiny") as runtime:
        asked = {"question": "What moves?", "sampling": SamplingParams(max_tokens=16)}
        by_dali = runtime.ask(path, decoder="dali", **asked)
        by_array = runtime.ask(frames, source_fps=10.0, **asked)
    assert by_dali.videos[0].decoder == "dali"
    for one, other in zip(by_dali.rounds, by_array.rounds, strict=True):
        assert one.token_ids == other.token_ids and one.frames == other.frames
