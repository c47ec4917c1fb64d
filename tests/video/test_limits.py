"""MediaLimits: bounds that hold before the work, and deadlines that hold while it goes on."""

from __future__ import annotations

import functools
import http.server
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video import media_attacks as attack
from video.zoo import clip, encoded
from video.zoo_sound import GOP, H264, MJPEG, SOUND, VP9, grown

from vtts_rt import MediaLimits, open_video
from vtts_rt.video import media as media_module
from vtts_rt.video.bounds import check_header
from vtts_rt.video.container import Media
from vtts_rt.video.limits import Opening

# name -> (content, words of the sentence). Each would take gigabytes, or minutes, without bounds.
LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "16,000 x 16,000 PNG": (functools.partial(attack.png, 16000), "max_pixels"),
    "webp of 10^6 frames": (functools.partial(attack.webp, 2, 10**6), "max_frames"),
    "webp of 16,000 x 16,000": (functools.partial(attack.webp, 16000), "max_pixels"),
    "10^6 edits": (
        lambda: attack.mp4(attack.track(20, edits=[(5, 3)] * 10**6)),
        "max_packets",
    ),
    "edits of whole tracks": (
        lambda: attack.mp4(attack.track(5000, keys=[1], edits=[(1, 4000)] * 9000)),
        "max_packets",
    ),
    "edits times samples": (
        lambda: attack.mp4(attack.track(2**20, edits=[(1, 5)] * 5000)),
        "max_packets",
    ),
    "2^31 samples of one size": (
        lambda: attack.mp4(attack.track(10, steps=[(2**31, 1)], listed=2**31)),
        "max_packets",
    ),
    "compressed header": (lambda: attack.mp4(attack.track(10), compressed=True), "not compressed"),
    "sound of 2^41 samples": (
        lambda: attack.mp4(
            attack.track(),
            attack.track(
                handler=b"soun",
                codec=b"sowt",
                steps=[(2**31, 1)],
                size=2,
                listed=2**31,
                chunk_samples=2**31 - 1,
                chunks=1000,
            ),
        ),
        "max_packets",
    ),
    "fragment of 2^28 samples": (
        lambda: attack.mp4(attack.track(0, steps=[])) + attack.fragment(2**28),
        "max_packets",
    ),
    "movie box of 80 MB": (
        lambda: attack.mp4(
            attack.track(), attack.box(b"udta", attack.box(b"name", bytes(80 << 20)))
        ),
        "header of at most",
    ),
    "10^6 cues at the start": (lambda: attack.matroska(10**6, True), "header of at most"),
    "10^6 cues at the end": (lambda: attack.matroska(10**6, False), "header of at most"),
    "avi index read 4,000 times": (lambda: attack.avi(4000, 10_000), "max_packets"),
    "avi index of 10^5 chunks": (lambda: attack.avi(10**5, 1), "chunks of an AVI"),
    "animated png bomb": (functools.partial(attack.png, 9000, 2), "max_pixels"),
    "jpeg of 600 scans": (
        lambda: b"\xff\xd8\xff\xe0\0\x04\0\0" + b"\xff\xda\0\x02" * 600 + b"\xff\xd9",
        "500 JPEG scans",
    ),
}

MEASURED = """
import os, resource, sys, time
os.environ["VTTS_RT_CACHE_DIR"] = "off"
from vtts_rt import open_video
import vtts_rt.video.media
from PIL import Image
Image.init()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
try:
    open_video(sys.argv[1])
except ValueError as error:
    print(peak() - before, error)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("large")

    @functools.cache
    def made(name: str) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}"
        path.write_bytes(LARGE[name][0]())
        return path

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_files_that_expand_are_refused_within_300_mb(
    name: str, large_file: Callable[[str], Path]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(large_file(name))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    megabytes, _, sentence = done.stdout.partition(" ")
    assert sentence.startswith("open_video: video must "), done.stderr
    assert int(megabytes) < 300


QUICK = [
    name
    for name in LARGE
    if not name.startswith(
        ("16,000", "10^6 edits", "movie", "animated png", "webp of 10^6", "10^6 cues at the s")
    )
]


@pytest.mark.parametrize("name", QUICK)
def test_files_that_expand_are_refused_before_ffmpeg_sees_them(
    name: str, large_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module.Media, "open", lambda self: pytest.fail("FFmpeg opens it"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("Pillow decodes it"))
    with pytest.raises(ValueError, match=f"^open_video: video must .*{LARGE[name][1]}") as caught:
        open_video(large_file(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in SOUND if not n.startswith("mjpeg")])
def test_headers_of_sound_files_are_within_bounds(name: str, tmp_path: Path) -> None:
    """What they declare is at most a few times what they hold."""
    path = tmp_path / f"c.{SOUND[name].suffix}"
    SOUND[name].write(path)
    limits = MediaLimits(max_packets=1000, max_frames=400)
    check_header(Media(path), Opening(limits))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("mp4", lambda: encoded("mp4", **H264)),
        ("edits", lambda: attack.mp4(attack.track(30, edits=[(9, 3)] * 3))),
        ("fragments", lambda: attack.mp4(attack.track(0, steps=[])) + attack.fragment(9) * 5),
        ("webm", lambda: encoded("webm", **VP9)),
        ("cues", lambda: attack.matroska(9, False)),
        ("avi", lambda: encoded("avi", **MJPEG)),
        ("indx", lambda: attack.avi(3, 20)),
        ("apng", lambda: attack.png(4, 3)),
    ],
)
def test_mutated_headers_end_in_a_sentence_or_in_nothing(
    kind: str, make: Callable[[], bytes]
) -> None:
    data = make()
    rng = random.Random(kind)
    opening = Opening(MediaLimits(max_packets=5000, max_frames=10))
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 10])):
            place = rng.randrange(min(len(changed), 3000) if rng.random() < 0.7 else len(changed))
            changed[place] = rng.choice([0, 1, 255, 127, rng.randrange(256)])
        if rng.random() < 0.3:
            del changed[rng.randrange(1, len(changed)) :]
        try:
            check_header(Media(bytes(changed)), opening)
        except ValueError as error:
            assert str(error).startswith("open_video: video must ")


# -- each limit ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("files")
    clip(folder / "c.mp4", 20, **H264)  # 48 x 64 px
    picture = np.zeros((48, 64, 3), np.uint8)
    Image.fromarray(picture).save(folder / "p.png")
    np.save(folder / "a.npy", np.zeros((20, 48, 64, 3), np.uint8))
    return {
        "video": folder / "c.mp4",
        "bytes": (folder / "c.mp4").read_bytes(),
        "picture": folder / "p.png",
        "pil": Image.open(folder / "p.png"),
        "array": np.zeros((20, 48, 64, 3), np.uint8),
        "npy": folder / "a.npy",
    }


@pytest.mark.parametrize(
    ("kind", "limit", "bound"),
    [
        (kind, limit, bound)
        for kind in ("video", "bytes", "array", "npy")
        for limit, bound in (("max_pixels", 48 * 64), ("max_frames", 20))
    ]
    + [("picture", "max_pixels", 48 * 64), ("pil", "max_pixels", 48 * 64)]
    + [("video", "max_packets", 20), ("video", "max_bytes", None), ("bytes", "max_bytes", None)]
    + [("picture", "max_bytes", None), ("array", "max_bytes", 20 * 48 * 64 * 3)],
)
def test_each_limit_is_exact(kind: str, limit: str, bound: int | None, files: Any) -> None:
    video = files[kind]
    if bound is None:
        bound = len(video) if isinstance(video, bytes) else video.stat().st_size
    for _ in range(2):  # the second time an index is known
        open_video(video, source_fps=5.0, limits=MediaLimits(**{limit: bound})).close()
        with pytest.raises(ValueError, match=f"^open_video: video must .*MediaLimits.{limit}"):
            open_video(video, source_fps=5.0, limits=MediaLimits(**{limit: bound - 1}))


def test_a_frame_that_grows_in_the_middle_is_never_decoded() -> None:
    """The limit holds in the decoder, for every later packet too."""
    data = grown(MJPEG)  # 48 x 64, then 72 x 96 px
    with open_video(data, limits=MediaLimits(max_pixels=48 * 64)) as source:
        frames = dict(source.read(range(24)))
        assert source.frames_substituted == 24 - GOP
        for i in range(GOP, 24):
            np.testing.assert_array_equal(frames[i], frames[GOP - 1])


@pytest.mark.parametrize(
    "wrong",
    [{"max_pixels": 0}, {"max_frames": 1.5}, {"max_open_seconds": 0}, {"max_bytes": True},
     {"max_packets": "9"}],
)  # fmt: skip
def test_wrong_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^MediaLimits: {next(iter(wrong))} must be"):
        MediaLimits(**wrong)


def test_limits_and_deadlines_of_a_wrong_type() -> None:
    array = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="^open_video: limits must be a MediaLimits or None"):
        open_video(array, limits=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^open_video: deadline_seconds must be"):
        open_video(array, deadline_seconds=float("nan"))


# -- deadlines -----------------------------------------------------------------------------


class Clock:
    """`time.monotonic` that goes on by `step` seconds whenever it is asked."""

    def __init__(self, step: float) -> None:
        self.now, self.step, self.asked = 1000.0, step, 0

    def __call__(self) -> float:
        self.asked += 1
        self.now += self.step
        return self.now


@pytest.mark.parametrize("kind", ["video", "bytes", "picture", "array", "npy"])
def test_a_deadline_holds_at_every_step_of_opening(
    kind: str, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    monkeypatch.setattr("vtts_rt.video.container.SETTLE_SECONDS", 3600.0)  # hash it every time
    clock = Clock(1.0)
    monkeypatch.setattr("vtts_rt.video.limits.time.monotonic", clock)
    open_video(files[kind], source_fps=5.0, deadline_seconds=1e9).close()
    steps = clock.asked
    assert steps >= 3
    for step in range(1, steps):
        deadline = clock.now + step + 0.5
        with pytest.raises(TimeoutError, match="^open_video: the deadline passed"):
            open_video(files[kind], source_fps=5.0, deadline_seconds=deadline)


def test_frames_are_read_after_the_deadline(files: Any) -> None:
    with open_video(files["video"], deadline_seconds=time.monotonic() + 60) as source:
        assert len(dict(source.read([0, 19]))) == 2


def test_opening_takes_at_most_so_long(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1.0)
    monkeypatch.setattr("vtts_rt.video.limits.time.monotonic", clock)
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    with pytest.raises(ValueError, match="^open_video: video must open within 2.5 s"):
        open_video(files["video"], limits=MediaLimits(max_open_seconds=2.5))


def test_hashing_ends_with_the_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is refused after a few packets is not hashed to its end first."""
    monkeypatch.setenv("VTTS_RT_CACHE_DIR", "off")
    monkeypatch.setattr("vtts_rt.video.index.CHECKED_PACKETS", 8)
    path = tmp_path / "c.mkv"
    clip(path, 24, **VP9)
    with path.open("ab") as file:
        file.truncate(8 << 30)  # a hole: hashing it takes many seconds
    began = time.process_time()
    with pytest.raises(ValueError, match="max_frames"):
        open_video(path, limits=MediaLimits(max_frames=15))
    assert time.process_time() - began < 2.0


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Sends a byte now and then, and never ends."""
    stop = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            while not stop.wait(0.02):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v.mp4"
    stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_deadline_holds_for_a_url_that_never_ends(slow_server: str) -> None:
    with pytest.raises(TimeoutError, match="^open_video: the deadline passed"):
        open_video(slow_server, allow_urls=True, deadline_seconds=time.monotonic() + 0.2)
    with pytest.raises(ValueError, match="max_bytes"):
        open_video(slow_server, allow_urls=True, limits=MediaLimits(max_bytes=3))
