"""Mutated files through DALI, in a process of its own: it neither crashes nor hangs, and what comes
is a frame of that file or one sentence.

    python tests/video/test_dali_fuzz.py SEED NUM    # more of it, by hand
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

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


def fuzz(seed: int, num: int) -> None:
    from video.zoo import encoded, packets_of
    from video.zoo_sound import MJPEG, VP8, VP9

    from vtts_rt.video import open_video

    codecs = {"vp8": VP8, "vp9": VP9, "mjpeg": MJPEG}
    outcomes: dict[str, int] = {}
    rng = random.Random(seed)
    for name, (container, codec) in BASES.items():
        data = encoded(container, 16, **codecs[codec], hw=(48, 64))
        starts = [data.index(packet.data[:64]) for packet in packets_of(data)]
        for number in range(num):
            content = mutated(data, starts, rng)
            print(f"{name} {seed} {number}", flush=True)  # the last line tells what killed it
            try:
                with open_video(content, decoder="dali") as source:
                    meta = source.metadata
                    wanted = rng.sample(range(meta.num_frames), min(5, meta.num_frames))
                    frames = dict(source.read(wanted))
                    assert sorted(frames) == sorted(wanted)
                    for frame in frames.values():
                        assert frame.shape == (meta.height, meta.width, 3)
                    outcome = f"frames of {meta.decoder}"
            except (ValueError, RuntimeError) as error:
                assert type(error) in (ValueError, RuntimeError), repr(error)
                outcome = "a sentence"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes)


@pytest.mark.slow
@pytest.mark.skipif(dali_refusal(None) is not None, reason=str(dali_refusal(None)))
def test_dali_survives_mutations() -> None:
    done = subprocess.run(
        [sys.executable, __file__, "7", "40"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    told = done.stdout.splitlines()
    assert done.returncode == 0, (told[-1:], done.stderr[-1500:])
    assert "frames of dali" in told[-1] and "a sentence" in told[-1]


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
