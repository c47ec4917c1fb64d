"""The embedded model answers the same whichever decoder its frames come from.

A few clips of `bench/bench_agreement.py`, which asks about 200 of each codec.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from video.zoo import MEAN_DIFFERENCE

from vtts_rt import Runtime
from vtts_rt.data.needle import write_needle
from vtts_rt.perception.clue import option_letter
from vtts_rt.types import SamplingParams
from vtts_rt.video import open_video
from vtts_rt.video.decoders import dali_refusal

CLIPS = 2
SEED = 40000  # of the bench; the first and only one tried
NUM_COMPARED = 8


@pytest.mark.slow
@pytest.mark.skipif(dali_refusal(None) is not None, reason=str(dali_refusal(None)))
def test_needles_are_found_through_either_decoder(tmp_path: Path) -> None:
    rows = write_needle(tmp_path, SEED, CLIPS, "held_out", codec="libvpx-vp9")
    by_clip = {row.media: row for row in rows}  # one question a clip
    assert len(by_clip) == CLIPS
    same, answered, most, pixels_differ = 0, 0, 0, False
    with Runtime.from_pretrained("tiny", device="cpu") as runtime:
        for media, row in by_clip.items():
            path = tmp_path / media
            with open_video(path, decoder="pyav") as a, open_video(path, decoder="dali") as b:
                assert (a.metadata.decoder, b.metadata.decoder) == ("pyav", "dali")
                wanted = np.linspace(0, a.metadata.num_frames - 1, NUM_COMPARED).round().astype(int)
                expected, seen = dict(a.read(wanted)), dict(b.read(wanted))
            off = np.stack([np.abs(expected[i].astype(np.int16) - seen[i]) for i in expected])
            assert off.mean() <= MEAN_DIFFERENCE
            most, pixels_differ = max(most, int(off.max())), pixels_differ or bool(off.any())
            options = []
            for decoder in ("pyav", "dali"):
                runtime.clear_caches()
                answer = runtime.ask(
                    path,
                    row.question,
                    options=row.options,
                    sampling=SamplingParams(max_tokens=96),
                    decoder=decoder,
                )
                options.append(option_letter(answer.rounds[-1].answer or "", row.options))
            answered += options[0] is not None
            same += options[0] == options[1]
    print(f"{same} of {CLIPS} the same; pixels at most {most} apart")
    # Otherwise nothing was compared: the chroma filters differ, and the model answers.
    assert pixels_differ and answered >= CLIPS - 1
    assert same >= CLIPS - 1
