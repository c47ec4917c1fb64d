"""One process of a run of several: `vtts-rt train grpo --config FILE` without its command line.

A second argument is how many members of each group of the last process fail.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import torchvision_shim

torchvision_shim.install()
from vtts_rt import Runtime  # noqa: E402
from vtts_rt.train.grpo import read_recipe, run  # noqa: E402

num_lost = int(sys.argv[2]) if len(sys.argv) > 2 else 0
rollouts = Runtime.rollouts


def with_losses(*args: Any, **options: Any) -> Any:
    group = rollouts(*args, **options)
    lost = tuple(RuntimeError("lost") for _ in range(num_lost))
    return replace(group, members=(*lost, *group.members[num_lost:]))


if int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
    Runtime.rollouts = with_losses  # type: ignore[method-assign]
run(read_recipe(sys.argv[1]))
