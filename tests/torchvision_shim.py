"""Lets a CPU build of torch import torchvision wheels that were built for CUDA.

Such a wheel cannot load its own operators and then fails on `import torchvision`, although the
image transforms need none of them. Declaring the two operators it looks up by name is enough.
"""

from __future__ import annotations

import torch

_libraries: list[torch.library.Library] = []


def install() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` unless the real ones can load, or a bench
    has declared them (`bench.model.allow_broken_torchvision`)."""
    if _libraries or torch.cuda.is_available() or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # the declaration lives as long as this object
