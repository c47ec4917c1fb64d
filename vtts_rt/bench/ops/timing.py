"""Times of short calls: medians of alternating runs, on a GPU by its own clock and without its L2.

What ran just before leaves its data in a GPU's L2 cache (50 MB on an H100), which a model that
reads 14 GB of weights between two calls of an op would have emptied: it is overwritten first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

_L2_BYTES = 256 << 20  # more than any L2
_WARM_UPS = 3


def median_seconds(
    contenders: Mapping[str, Callable[[], object]], device: str, runs: int
) -> dict[str, float]:
    """Median seconds of each contender; runs alternate, so that a busy moment hits all of them."""
    clock = _gpu_seconds if device == "cuda" else _cpu_seconds
    flush = torch.empty(_L2_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)
    for call in contenders.values():
        for _ in range(_WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, call in contenders.items():
            flush.zero_()
            times[name].append(clock(call))
    return {name: statistics.median(found) for name, found in times.items()}


def _cpu_seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _gpu_seconds(call: Callable[[], object]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # The host is ahead by then, so that the events enclose the kernels and no launch overhead.
    torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes: what memory-bound ops are held against."""
    source = torch.empty((1 << 30) if device == "cuda" else (64 << 20), dtype=torch.int8)
    source = source.to(device)
    target = torch.empty_like(source)
    seconds = median_seconds({"copy": lambda: target.copy_(source)}, device, 11)["copy"]
    return 2 * source.numel() / seconds


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of torch's product of square matrices."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds({"product": lambda: a @ b}, device, 11)["product"]
    return 2 * size**3 / seconds
