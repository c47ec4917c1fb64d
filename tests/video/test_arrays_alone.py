"""Arrays need no decoder: a machine that only serves frames does without PyAV."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.modules["av"] = None  # importing it fails
import numpy as np
from vtts_rt import Runtime, SamplingParams
from vtts_rt.video import open_video

frames = np.random.default_rng(0).integers(0, 256, (12, 56, 84, 3), np.uint8)
with Runtime.from_pretrained("tiny") as runtime:
    sampling = SamplingParams(max_tokens=3)
    answer = runtime.ask(frames, "What is it?", source_fps=2.0, sampling=sampling)
assert answer.rounds[0].reuse.frames_decoded > 0
try:
    open_video("clip.mp4")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_arrays_are_answered_without_pyav_and_files_say_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("open_video: files are decoded by PyAV: pip install av (")
