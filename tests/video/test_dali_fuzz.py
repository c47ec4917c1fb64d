"""Mutated files through DALI, in a process of its own: it neither crashes nor hangs, and what comes
is a frame of that file or one sentence.

That a spoilt frame is not one of another file is seen by reading it again after another file was
read: memory that was never written then holds something else.

    python tests/video/test_dali_fuzz.py SEED NUM    # more of it, by hand
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from video.zoo import encoded, packets_of, read_code
from video.zoo_sound import MJPEG, VP8, VP9

from vtts_rt.errors import BadMedia
from vtts_rt.video import open_video
from vtts_rt.video.decoders import dali_refusal

BASES = {
    "webm, vp8": ("webm", "vp8"),
    "webm, vp9": ("webm", "vp9"),
    "mp4, vp9": ("mp4", "vp9"),
    "ivf, vp9": ("ivf", "vp9"),
    "avi, mjpeg": ("avi", "mjpeg"),
    "mov, mjpeg": ("mov", "mjpeg"),
}
DEADLINE_SECONDS = 240
NUM, GROUP = 16, 8


def mutated(data: bytes, starts: list[int], rng: random.Random) -> bytes:
    """Bytes of the container, of packets' bodies, or of packets' headers replaced."""
    out = bytearray(data)
    kind = rng.randrange(3)
    for _ in range(rng.choice((1, 2, 8, 40))):
        if kind == 2:  # sizes, show bits, references
            at = rng.choice(starts) + rng.randrange(12)
        else:
            at = rng.randrange(len(out) if kind else max(1, min(starts)))
        if at < len(out):
            out[at] = rng.randrange(256)
    if rng.random() < 0.15:
        del out[rng.randrange(len(out)) :]
    return bytes(out)


def struck(data: bytes, start: int, rng: random.Random) -> bytes:
    """Bits of one packet's header turned over: its size, whether it shows, what it refers to."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        out[start + rng.randrange(12)] ^= 1 << rng.randrange(8)
    return bytes(out)


def places_of(data: bytes) -> list[int]:
    """Where the packets of a file begin; several may be the same bytes."""
    starts, at = [], 0
    for packet in packets_of(data):
        starts.append(data.index(packet.data, at))
        at = starts[-1] + len(packet.data)
    return starts


def frames_of(content: bytes, wanted: list[int]) -> tuple[str, int, dict[int, np.ndarray]]:
    """(decoder, frames in all, those wanted as far as they are there)."""
    with open_video(content, decoder="dali") as source:
        meta = source.metadata
        wanted = [i for i in wanted if i < meta.num_frames]
        frames = dict(source.read(wanted))
        assert sorted(frames) == sorted(wanted)
        for frame in frames.values():
            assert frame.shape == (meta.height, meta.width, 3)
        return meta.decoder, meta.num_frames, frames


def others_are_whole(
    frames: dict[int, np.ndarray], count: int, sound: dict[int, np.ndarray], place: int
) -> None:
    """What comes before a damaged packet, and from the next group on, is as in the sound file."""
    behind = (place // GROUP + 1) * GROUP
    for i, frame in frames.items():
        at = i if i < place else i + len(sound) - count  # one less where it shows no more
        if at < place or at >= behind:
            np.testing.assert_array_equal(frame, sound[at], err_msg=str((i, place)))


def fuzz(seed: int, num: int) -> None:
    codecs = {"vp8": VP8, "vp9": VP9, "mjpeg": MJPEG}
    outcomes: dict[str, int] = {}
    rng = random.Random(seed)
    for name, (container, codec) in BASES.items():
        data = encoded(container, NUM, **codecs[codec], gop=GROUP)
        another = encoded(container, NUM, **codecs[codec], gop=GROUP, first=100)
        starts = places_of(data)
        everything = list(range(NUM))
        _, _, sound = frames_of(data, everything)
        for number in range(num):
            one = rng.random() < 0.5
            place = rng.randrange(1, NUM)
            content = struck(data, starts[place], rng) if one else mutated(data, starts, rng)
            print(f"{name} {seed} {number}", flush=True)  # the last line tells what killed it
            wanted = rng.choice((everything, rng.sample(everything, 5)))
            try:
                decoder, count, frames = frames_of(content, wanted)
                if one:
                    others_are_whole(frames, count, sound, place)
                _, _, of_another = frames_of(another, everything)
                assert [read_code(of_another[i]) for i in everything] == [
                    100 + i for i in everything
                ]
                _, _, again = frames_of(content, wanted)
                for i, frame in frames.items():
                    np.testing.assert_array_equal(frame, again[i], err_msg=str(i))
                outcome = f"frames of {decoder}"
            except (ValueError, RuntimeError) as error:
                assert type(error) in (BadMedia, RuntimeError), repr(error)
                assert "\n" not in str(error), repr(error)
                outcome = "a sentence"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes)


@pytest.mark.slow
@pytest.mark.skipif(dali_refusal(None) is not None, reason=str(dali_refusal(None)))
def test_dali_survives_mutations() -> None:
    done = subprocess.run(
        [sys.executable, __file__, "7", "15"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    told = done.stdout.splitlines()
    assert done.returncode == 0, (told[-1:], done.stderr[-1500:])
    assert "frames of dali" in told[-1] and "a sentence" in told[-1]


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
