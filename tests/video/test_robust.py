"""Awkward and broken files, through PyAV and through DALI: right frames, or one clear sentence.

The zoo holds, by name: corrupt packets in the middle and at the start ("..., packet 17 zeroed"), a
missing index ("without cues", "without index", "fragmented"), B-frames and open groups ("h264",
"hevc open gop"), edit lists ("edits ..."), varying rates, odd sizes, alpha, 10 bits, interlaced,
turned, clocks that start late, jump or stand, hidden frames, sizes that change, several streams.
Files without a duration are those written to a pipe ("without cues").
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from video.zoo import Case, at_once, clip, encoded, read_code, remux
from video.zoo_broken import BROKEN
from video.zoo_sound import H264, MJPEG, SOUND, VP8, VP9

from vtts_rt.types import Decoder
from vtts_rt.video import FrameSource, FrameStore, open_video
from vtts_rt.video.decoders import DALI_CPU_CODECS, dali_refusal

Write = Callable[[str, Case], Path]

decoders = pytest.mark.parametrize(
    "decoder",
    [
        "pyav",
        pytest.param(
            "dali",
            marks=pytest.mark.skipif(
                dali_refusal(None) is not None, reason=str(dali_refusal(None))
            ),
        ),
    ],
)
# What DALI does not decode on the CPU is PyAV's, which is tested once.
BROKEN_BY_DALI = [name for name in BROKEN if name.startswith(DALI_CPU_CODECS)]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """The file of a case, made once."""
    folder = tmp_path_factory.mktemp("zoo")

    @functools.cache
    def made(name: str) -> Path:
        case = {**SOUND, **BROKEN}[name]
        path = folder / f"{len(list(folder.iterdir()))}.{case.suffix}"
        case.write(path)
        return path

    return lambda name, case: made(name)


def read(source: FrameSource, indices: Sequence[int]) -> dict[int, np.ndarray]:
    frames = dict(source.read(indices))
    assert sorted(frames) == sorted(set(indices))
    for frame in frames.values():
        assert frame.shape == (source.metadata.height, source.metadata.width, 3)
        assert frame.dtype == np.uint8
    return frames


def code(frame: np.ndarray, case: Case) -> int:
    return read_code(np.rot90(frame, -case.turned // 90))


def shuffled(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


@decoders
@pytest.mark.parametrize("name", SOUND)
def test_every_frame_of_an_unusual_file(name: str, decoder: Decoder, write: Write) -> None:
    case = SOUND[name]
    with open_video(write(name, case), decoder=decoder) as source:
        meta = source.metadata
        assert (meta.height, meta.width) == case.hw and meta.num_frames == len(case.codes)
        whole = read(source, range(meta.num_frames))
        assert [code(whole[i], case) for i in range(meta.num_frames)] == list(case.codes)
        for i in shuffled(meta.num_frames, name):
            np.testing.assert_array_equal(read(source, [i])[i], whole[i], err_msg=str(i))
        assert source.frames_substituted == 0
        assert meta.timestamps_seconds is not None and meta.duration_seconds > 0
        if case.times is not None:
            np.testing.assert_allclose(meta.timestamps_seconds, case.times, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [(name, "pyav") for name in BROKEN] + [(name, "dali") for name in BROKEN_BY_DALI],
)
def test_broken_packets_spoil_no_other_frames(name: str, decoder: Decoder, write: Write) -> None:
    if decoder == "dali" and (why := dali_refusal(None)) is not None:
        pytest.skip(why)
    case = BROKEN[name]
    with open_video(write(name, case), decoder=decoder) as source:
        count = source.metadata.num_frames
        assert count == len(case.codes)
        whole = read(source, range(count))
        for i in set(range(count)) - case.lost - case.spoilt:
            assert code(whole[i], case) == case.codes[i], i
        for i in case.lost:  # the frame before stands in, or the next one
            assert code(whole[i], case) in case.codes[max(i - 1, 0) : i + 2], i
        assert source.frames_substituted >= len(case.lost)
        for i in shuffled(count, name):
            np.testing.assert_array_equal(read(source, [i])[i], whole[i], err_msg=str(i))


PAIRS = {
    "vp8": ("webm", VP8),
    "vp9": ("webm", VP9),
    "mjpeg": ("avi", MJPEG),
    "h264": ("mp4", H264),
}


@decoders
@pytest.mark.parametrize("codec", PAIRS)
def test_files_read_together_never_mix(codec: str, decoder: Decoder, tmp_path: Path) -> None:
    suffix, options = PAIRS[codec]
    paths = [tmp_path / f"{n}.{suffix}" for n in range(2)]
    for n, path in enumerate(paths):
        clip(path, 24, first=100 * n, **options)
    rng = random.Random(codec)
    store = FrameStore(1 << 20)
    wrong: list[tuple[int, int]] = []
    with (
        open_video(paths[0], decoder=decoder) as a,
        open_video(paths[1], decoder=decoder) as b,
    ):
        streams = [s.read(rng.sample(range(24), 12)) for s in (a, b)]
        for frames in zip(*streams, strict=True):
            for n, (i, frame) in enumerate(frames):
                assert read_code(frame) == 100 * n + i

        def reads(seed: int) -> None:
            order = random.Random(seed)
            for _ in range(6):
                n = order.randrange(2)
                wanted = order.sample(range(24), 5)
                found = store.frames((a, b)[n], wanted)
                wrong.extend(
                    (n, i)
                    for i, frame in zip(wanted, found, strict=True)
                    if read_code(np.asarray(frame)) != 100 * n + i
                )

        at_once(reads, range(4))
    assert not wrong
    store.check_integrity()
    store.close()


@decoders
@pytest.mark.parametrize("how", ["other content", "truncated", "deleted"])
def test_a_file_replaced_while_open_gives_no_more_frames(
    how: str, decoder: Decoder, tmp_path: Path
) -> None:
    path = tmp_path / "c.webm"
    clip(path, 24, **VP9)
    with open_video(path, decoder=decoder) as source:
        frames = source.read([2, 20])
        seen = [next(frames)]
        if how == "other content":
            clip(tmp_path / "d.webm", 24, first=100, **VP9)
            (tmp_path / "d.webm").replace(path)
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[:2000])
        else:
            path.unlink()
        changed = "was changed or removed while it was open"
        with pytest.raises(RuntimeError, match=changed):
            source.read([10])
        # What was decoded before may still come, but nothing of the file that is there now.
        try:
            seen += frames
        except RuntimeError as error:
            assert changed in str(error)
        assert all(read_code(frame) == i for i, frame in seen)


NOTHING: dict[str, Callable[[], bytes]] = {
    "mp4 without moov": lambda: encoded("mp4", **H264).split(b"moov")[0],
    "webm, header only": lambda: encoded("webm", **VP9)[:200],
    "zero bytes": lambda: b"",
    "text": lambda: b"no video at all\n" * 100,
    "avi without frames": lambda: encoded("avi", **MJPEG).split(b"movi")[0],
}


def noise() -> bytes:
    rng = random.Random(0)
    file = io.BytesIO()
    remux(
        encoded("avi", **MJPEG),
        file,
        lambda packets: [p._replace(data=rng.randbytes(len(p.data))) for p in packets],
        container="avi",
    )
    return bytes(file.getvalue())


NOTHING["every packet is noise"] = noise


@decoders
@pytest.mark.parametrize("kind", NOTHING)
def test_files_without_a_frame_are_one_sentence(
    kind: str, decoder: Decoder, tmp_path: Path
) -> None:
    path = tmp_path / "c.bin"
    path.write_bytes(NOTHING[kind]())
    with pytest.raises(ValueError, match="^open_video: video must ") as caught:
        open_video(path, decoder=decoder)
    assert "\n" not in str(caught.value) and "c.bin" in str(caught.value)
