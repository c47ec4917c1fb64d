"""Small arrays of the host to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A tensor on `device`, for which the host does not wait; on a CPU it shares the memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def stream_of(tensor: Tensor) -> int:
    """The stream that work on `tensor` is enqueued on, 0 on a CPU: part of the key of what is
    cached on a device, so that memory which a cache drops is only used again behind that work."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
