"""Times of short calls, on a GPU by its own clock and without its L2.

What ran just before leaves its data in a GPU's L2 cache (50 MB on an H100), which a model that
reads 14 GB of weights between two calls of an op would have emptied: it is overwritten first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WARM_UPS = 3
_L2_BYTES = 256 << 20  # more than any L2


class GpuTimer:
    """A clock for pytest-benchmark: after `begin`, two calls tell the seconds between them on the
    current CUDA stream."""

    __name__ = "gpu_timer"

    def begin(self) -> None:
        # The host is ahead by then, so that the events enclose the kernels and no launch overhead.
        torch.cuda._sleep(200_000)
        self._began: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._began is None:
            self._began = event
            return 0.0
        event.synchronize()
        return float(self._began.elapsed_time(event)) / 1e3


def flush_buffer(device: str) -> Tensor:
    """Writing to it empties a GPU's L2; empty for a CPU."""
    return torch.empty(_L2_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)


def median_seconds(
    contenders: Mapping[str, Callable[[], object]], device: str, runs: int
) -> dict[str, float]:
    """Median seconds of each contender; runs alternate, so that a busy moment hits all of them."""
    gpu, flush = GpuTimer(), flush_buffer(device)
    clock = gpu if device == "cuda" else time.perf_counter
    for call in contenders.values():
        for _ in range(WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, call in contenders.items():
            flush.zero_()
            if device == "cuda":
                gpu.begin()
            began = clock()
            call()
            times[name].append(clock() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def copy_sides(device: str) -> tuple[Tensor, Tensor]:
    """Two buffers to copy between, larger than any cache."""
    source = torch.empty((1 << 30) if device == "cuda" else (64 << 20), dtype=torch.int8)
    return source.to(device), torch.empty_like(source, device=device)


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes: memory-bound ops are compared with it."""
    source, target = copy_sides(device)
    seconds = median_seconds({"copy": lambda: target.copy_(source)}, device, 11)["copy"]
    return 2 * source.numel() / seconds


def product_sides(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two square matrices, large enough for a machine's full rate."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return a, b


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of torch's product of square matrices."""
    a, b = product_sides(device, dtype)
    seconds = median_seconds({"product": lambda: a @ b}, device, 11)["product"]
    return 2 * len(a) ** 3 / seconds
