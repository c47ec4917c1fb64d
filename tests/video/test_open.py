"""What open_video takes, and one clear sentence for everything else."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clip_writer import write_video

from vtts_rt.errors import BadMedia
from vtts_rt.video import open_video

Make = Callable[..., Path]
Code = Callable[[np.ndarray], int]


@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_arrays_and_tensors(wrap: Callable, painted: Callable) -> None:
    frames = np.stack([painted(i) for i in range(6)])
    with open_video(wrap(frames), source_fps=4.0) as source:
        meta = source.metadata
        assert (meta.num_frames, meta.source_fps, meta.duration_seconds) == (6, 4.0, 1.5)
        assert (meta.height, meta.width, meta.decoder) == (48, 64, "array")
        np.testing.assert_array_equal(meta.timestamps_seconds, np.arange(6) / 4)
        got = dict(source.read([5, 0, 5]))
        assert sorted(got) == [0, 5]
        np.testing.assert_array_equal(got[5], frames[5])
        got[5][:] = 0  # the caller's own copy
        np.testing.assert_array_equal(dict(source.read([5]))[5], frames[5])
    strided = open_video(frames[::2, :, ::2], source_fps=4.0)
    np.testing.assert_array_equal(dict(strided.read([1]))[1], frames[2, :, ::2])


@pytest.mark.parametrize("source_fps", [None, 4.0])
def test_arrays_with_times(source_fps: float | None, painted: Callable) -> None:
    frames = np.stack([painted(i) for i in range(5)])
    times = [7.0, 7.5, 9.0, 9.25, 11.0]
    for given in (times, tuple(times), np.array(times), torch.tensor(times)):
        with open_video(frames, timestamps_seconds=given, source_fps=source_fps) as source:
            meta = source.metadata
            np.testing.assert_array_equal(meta.timestamps_seconds, np.array(times) - 7)
            # The last frame shows for a frame of the rate, else for the mean step.
            assert meta.duration_seconds == pytest.approx(4.25 if source_fps else 5.0)
            assert meta.source_fps == pytest.approx(source_fps or 1.0)
    clip = open_video(frames, timestamps_seconds=times, start_seconds=1.9, end_seconds=2.1)
    assert [int(i) for i in dict(clip.read([0, 1]))] == [0, 1]
    np.testing.assert_array_equal(dict(clip.read([1]))[1], frames[2])
    assert open_video(frames[:1], timestamps_seconds=[3.0], source_fps=2.0).metadata.num_frames == 1


@pytest.mark.parametrize(
    ("video", "times", "words"),
    [
        ("array", [0.0, 1.0], "timestamps_seconds must be 3 finite seconds.*got '2 numbers'"),
        ("array", [0.0, 1.0, 1.0], "strictly ascending.*got '1.0 s before 1.0 s'"),
        ("array", [0.0, 2.0, 1.0], "strictly ascending"),
        ("array", [0.0, 1.0, float("nan")], "finite"),
        ("array", [0.0, 1.0, float("inf")], "finite"),
        ("array", ["a", "b", "c"], "timestamps_seconds must be"),
        ("array", [[0.0, 1.0, 2.0]], "timestamps_seconds must be"),
        ("array", 3.0, "timestamps_seconds must be"),
        ("array", {}, "timestamps_seconds must be"),
        ("one frame", [0.0], "source_fps must be given with the time of one frame"),
        ("image", [0.0], "timestamps_seconds must be None for an image"),
        ("file", [0.0, 1.0, 2.0], "timestamps_seconds must be None, as only arrays"),
    ],
)
def test_bad_times(video: str, times: Any, words: str, make_clip: Make) -> None:
    array = np.zeros((3, 8, 8, 3), np.uint8)
    videos = {"array": array, "one frame": array[:1], "image": array[0]}
    given = make_clip("c.mp4", 3) if video == "file" else videos[video]
    with pytest.raises(ValueError, match=f"^open_video: {words}" if video != "array" else words):
        open_video(given, timestamps_seconds=times)


def test_npy_files(tmp_path: Path, painted: Callable) -> None:
    frames = np.stack([painted(i) for i in range(3)])
    np.save(tmp_path / "a.npy", frames)
    for video in (tmp_path / "a.npy", (tmp_path / "a.npy").read_bytes()):
        with open_video(video, source_fps=2.0) as source:
            assert source.metadata.video_id == open_video(frames, source_fps=2.0).metadata.video_id
            np.testing.assert_array_equal(dict(source.read([2]))[2], frames[2])
    data = (tmp_path / "a.npy").read_bytes()
    longer = data.replace(b"(3, 48, 64, 3), }          ", b"(3000000000, 48, 64, 3), } ")
    assert longer != data and len(longer) == len(data)
    for wrong in (data[:-1], data[:40], data[:10], data.replace(b"|u1", b"|O "), longer):
        with pytest.raises(ValueError, match="^open_video: video must be a .npy file"):
            open_video(wrong, source_fps=2.0)
    for seed in range(100):
        changed = bytearray(data)
        changed[random.Random(seed).randrange(128)] = random.Random(-seed).randrange(256)
        with contextlib.suppress(ValueError):
            open_video(bytes(changed), source_fps=2.0)
    np.save(tmp_path / "f.npy", frames.astype(np.float32))
    with pytest.raises(ValueError, match="^open_video: video must be uint8"):
        open_video(tmp_path / "f.npy", source_fps=2.0)


def test_array_ids_follow_pixels_and_shape() -> None:
    a = np.zeros((4, 6, 2, 3), np.uint8)
    ids = {
        open_video(v, source_fps=1).metadata.video_id
        for v in (a, a.copy(), a.reshape(4, 2, 6, 3), a + 1, a[0])
    }
    assert len(ids) == 4


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm"])
def test_image_files(suffix: str, tmp_path: Path, painted: Callable) -> None:
    path = tmp_path / f"i%03d.{suffix}"  # no pattern, just a name
    data = io.BytesIO()
    write_video(
        data,
        [painted(9)],
        source_fps=1,
        codec=suffix,
        pixel_format="bgr24" if suffix == "bmp" else "rgb24",
        container_format="image2pipe",
    )
    path.write_bytes(data.getvalue())
    for video in (path, str(path), data.getvalue()):
        with open_video(video, start_seconds=1, end_seconds=2) as source:
            meta = source.metadata
            assert meta.is_image and meta.num_frames == 1 and meta.duration_seconds == 0.0
            np.testing.assert_array_equal(dict(source.read([0]))[0], painted(9))


def test_pil_images_are_turned_upright(painted: Callable) -> None:
    image = pytest.importorskip("PIL.Image")
    stored = io.BytesIO()
    exif = image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to show
    image.fromarray(painted(9)).save(stored, "jpeg", exif=exif, quality=95)
    want = np.rot90(painted(9), -1)
    for video in (image.open(stored), stored.getvalue()):
        got = dict(open_video(video).read([0]))[0]
        assert got.shape == want.shape
        assert np.abs(got.astype(int) - want).mean() < 4


def test_clip_ranges(make_clip: Make, code_of: Code) -> None:
    path = make_clip("c.mp4", 40, gop=12, b_frames=3)
    ids = set()
    # (start, end) -> the frames on screen; 0.1 s each.
    for start, end, first, count in [
        (1.0, 2.0, 10, 10),
        (1.05, 2.05, 10, 11),
        (None, 0.5, 0, 5),
        (3.75, None, 37, 3),
        (1.01, 1.02, 10, 1),
        (3.0, 99.0, 30, 10),
    ]:
        with open_video(path, start_seconds=start, end_seconds=end) as source:
            meta = source.metadata
            assert meta.num_frames == count
            codes = {i: code_of(f) for i, f in source.read(range(count))}
            assert codes == {i: first + i for i in range(count)}
            begin = start or 0.0
            want = np.maximum((first + np.arange(count)) / 10 - begin, 0)
            np.testing.assert_allclose(meta.timestamps_seconds, want, atol=1e-6)
            assert meta.duration_seconds == pytest.approx(min(end or 4.0, 4.0) - begin)
            with pytest.raises(ValueError, match=f"0..{count - 1}"):
                source.read([count])
            ids.add(meta.video_id)
    ids.add(open_video(path).metadata.video_id)
    assert len(ids) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_seconds": 4.0}, "before the end"),
        ({"start_seconds": -1.0}, "start_seconds must be"),
        ({"start_seconds": float("nan")}, "start_seconds must be"),
        ({"end_seconds": float("nan")}, "end_seconds must be"),
        ({"end_seconds": 0.0}, "end_seconds must be"),
        ({"start_seconds": 2.0, "end_seconds": 1.0}, "end_seconds must be"),
        ({"source_fps": 0.0}, "source_fps must be"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, make_clip: Make) -> None:
    with pytest.raises(ValueError, match=f"open_video: .*{words}"):
        open_video(make_clip("c.mp4", 40), **options)


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as c:
        stream = c.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        c.mux(stream.encode(frame))
        c.mux(stream.encode(None))
    return path


def bad_file(kind: str, folder: Path, clip: bytes) -> Path:
    path = folder / f"{kind}.mp4"
    head = clip[: clip.find(b"mdat") + 20]
    content = {
        "empty": b"",
        "garbage": random.Random(0).randbytes(5000),
        "zeros": bytes(5000),
        "text": b"hello world\n" * 500,
        "truncated": clip[: len(clip) // 2],
        "no frames": clip[:32],
        "head only": head,
        "webp's head": b"RIFF\0\0\0\0WEBPVP8X",
    }
    if kind in content:
        path.write_bytes(content[kind])
    elif kind == "directory":
        path.mkdir()
    elif kind == "playlist":
        (folder / "other.ts").write_bytes(clip)
        path = folder / "list.m3u8"
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nother.ts\n#EXT-X-ENDLIST\n")
    elif kind == "script":
        path.write_text("ffconcat version 1.0\nfile other.mp4\n")
    elif kind == "text named .txt":
        path = folder / "t.txt"
        path.write_bytes(content["text"])
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "empty",
        "directory",
        "garbage",
        "zeros",
        "text",
        "truncated",
        "no frames",
        "head only",
        "webp's head",
        "playlist",
        "script",
        "text named .txt",
    ],
)
def test_bad_files(kind: str, tmp_path: Path, make_clip: Make) -> None:
    clip = make_clip("c.mp4", 40).read_bytes()
    path = bad_file(kind, tmp_path, clip)
    with pytest.raises(ValueError, match="^open_video: video must .*, got ") as caught:
        open_video(path)
    assert "\n" not in str(caught.value)
    if path.is_file():
        with pytest.raises(ValueError, match="^open_video: "):
            open_video(path.read_bytes())


def test_audio_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold a video stream, got audio-only file"):
        open_video(audio_only(tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "source_fps must be"),
        (np.zeros((0, 8, 8, 3), np.uint8), "non-empty"),
        (np.zeros((2, 3, 8, 8), np.uint8), "shape"),
        (np.zeros((2, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8), np.uint8), "shape"),
        (None, "NoneType"),
        (7, "int"),
        ("a\0b", "existing"),
        ("x" * 5000, "existing"),
        ("", "existing"),
    ],
)
def test_bad_values(video: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^open_video: .*{words}"):
        open_video(video)


@pytest.mark.parametrize(
    "url", ["http://localhost:9/v.mp4", "https://x/v.mp4", "file:///etc/passwd", "rtsp://x/y"]
)
def test_urls_are_refused_unless_allowed(url: str) -> None:
    with pytest.raises(ValueError, match="unless URLs are allowed"):
        open_video(url)


def test_allowed_urls(make_clip: Make, tmp_path: Path) -> None:
    path = make_clip("c.mp4", 40)
    with open_video(path.as_uri(), allow_urls=True) as source:
        assert source.metadata.num_frames == 40
    for url, words in [
        ("http://127.0.0.1:9/v.mp4", "can be fetched"),
        ("rtsp://127.0.0.1:9/v", "an http, https or file URL"),
        ("file://elsewhere/v.mp4", "this machine"),
        ((tmp_path / "none.mp4").as_uri(), "existing"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_video(url, allow_urls=True)


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_very_short(num_frames: int, make_clip: Make, code_of: Code) -> None:
    with open_video(make_clip("s.mp4", num_frames)) as source:
        meta = source.metadata
        assert meta.num_frames == num_frames
        assert meta.duration_seconds == pytest.approx(num_frames / 10)
        assert [code_of(f) for _, f in source.read(range(num_frames))] == list(range(num_frames))


@pytest.mark.parametrize(("height", "width"), [(47, 65), (64, 256), (500, 2), (1, 250), (250, 1)])
def test_unusual_sizes(height: int, width: int, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    write_video(tmp_path / "s.mov", frames, source_fps=5, codec="png", pixel_format="rgb24")
    with open_video(tmp_path / "s.mov") as source:
        got = dict(source.read([0, 2]))
        np.testing.assert_array_equal(got[2], frames[2])


@pytest.mark.parametrize("bad", [-1, 40, 1.5, None, "3"])
def test_bad_indices_raise_at_the_call(bad: Any, make_clip: Make) -> None:
    with (
        open_video(make_clip("c.mp4", 40)) as source,
        pytest.raises(ValueError, match="integers in 0..39"),
    ):
        source.read([0, bad])


@pytest.mark.parametrize("name", ["c.mp4", "c.mkv", "c.ts", "c.avi"])
def test_mutated_files_end_in_a_sentence_or_in_frames(name: str, make_clip: Make) -> None:
    clip = make_clip(name, 20, gop=6, b_frames=2).read_bytes()
    rng = random.Random(name)
    outcomes = set()
    for _ in range(25):
        data = bytearray(clip)
        for _ in range(rng.choice([1, 4, 30])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            with open_video(bytes(data)) as source:
                num_frames = source.metadata.num_frames
                wanted = [i for i in (0, 7, 13, num_frames - 1) if i < num_frames]
                frames = dict(source.read(wanted))
                assert sorted(frames) == sorted(set(wanted))
                outcomes.add("frames")
        except (ValueError, RuntimeError) as error:
            assert type(error) in (BadMedia, RuntimeError), error
            outcomes.add("sentence")
    assert "frames" in outcomes
