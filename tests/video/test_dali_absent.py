"""Without the DALI package everything else works, and asking for it says what to install."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
sys.modules["nvidia.dali"] = None  # as if it were not installed
from vtts_rt.cli import main
from vtts_rt.video import open_video

said = {}
for decoder in ("auto", "pyav"):
    with open_video(sys.argv[1], decoder=decoder) as source:
        said[decoder] = [source.metadata.decoder, len(dict(source.read(range(12))))]
try:
    open_video(sys.argv[1], decoder="dali")
except RuntimeError as error:
    said["dali"] = str(error)
said["status"] = main(["ask", sys.argv[1], "What moves?", "--max-tokens", "2", "--rounds", "1"])
said["refused"] = main(["ask", sys.argv[1], "What moves?", "--decoder", "dali"])
said["env"] = main(["env"])
print(json.dumps(said))
"""


@pytest.mark.slow
def test_only_dali_itself_is_missing(make_clip: Callable[..., Path], tmp_path: Path) -> None:
    path = make_clip("c.webm", 12, codec="libvpx-vp9")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["auto"] == said["pyav"] == ["pyav", 12]
    sentence = (
        "open_video: decoder dali cannot be used: nvidia-dali is not installed: "
        "pip install 'vtts_rt[dali]'"
    )
    assert said["dali"] == sentence
    assert (said["status"], said["refused"], said["env"]) == (0, 1, 0)
    assert done.stderr.strip().splitlines()[-1] == f"vtts-rt: {sentence}"
    assert "dali on cpu: no (nvidia-dali is not installed: pip install" in done.stdout
