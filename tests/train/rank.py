"""One process of a run of several: `vtts-rt train grpo --config FILE` without its command line."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import torchvision_shim

torchvision_shim.install()
from vtts_rt.train.grpo import read_recipe, run  # noqa: E402

run(read_recipe(sys.argv[1]))
