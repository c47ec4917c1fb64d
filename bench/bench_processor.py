"""patchify and patch_embed where the frames are, against transformers' video processor.

    python bench/bench_processor.py [--device cuda] [--runs N] [--result-dir DIR]

32 frames of 1280x720 that lie on the device, resized to 560x1008. The processor runs on the device
and on the CPU, where it can be imported; *torch operators* are its operations without torchvision.
patch_embed has the tower's first product behind it, hidden size 1280, so its peers get that too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from op_cases.case import bench_dtype
from timing import copy_bandwidth, matmul_rate, median_seconds
from torch import Tensor

from vtts_rt.bench.model import allow_broken_torchvision, moving_frames
from vtts_rt.bench.peer import patch_rows
from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    heading,
    results_name,
    write_result,
)
from vtts_rt.models.registry import DTYPES
from vtts_rt.ops.dispatch import backends
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PATCH_ROW, PixelBox

HIDDEN = 1280


def processor(video: Tensor) -> Callable[[], object] | None:
    """transformers' own on (T, 3, H, W) uint8, or None where it cannot be imported."""
    try:
        allow_broken_torchvision()
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    except (ImportError, RuntimeError) as error:
        print(f"transformers' processor is left out: {error}", file=sys.stderr)
        return None
    made = Qwen2VLVideoProcessor()
    return lambda: made(
        videos=[video], cap_pixels_per_frame=False, return_tensors="pt", device=video.device
    )


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280))
    parser.add_argument("--resized", type=int, nargs=2, default=(560, 1008))
    add_compute_flags(
        parser, threads=torch.get_num_threads(), dtype_help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--result-dir", type=Path)
    args = parser.parse_args()
    check_compute(args)
    args.model = None
    torch.set_num_threads(args.threads)

    low = DTYPES[args.dtype] if args.dtype else bench_dtype(args.device)
    frames = np.stack(list(moving_frames(args.frames, tuple(args.size))))
    on_device = torch.from_numpy(frames).to(args.device)
    hw = (args.resized[0], args.resized[1])
    box = PixelBox(0, 0, args.size[1], args.size[0])
    jobs = [PatchifyJob(on_device[i], on_device[i + 1], box, hw) for i in range(0, args.frames, 2)]
    weight = torch.randn(HIDDEN, PATCH_ROW, device=args.device).to(low) / 40
    embed = PatchEmbedWeight(weight)

    rows_sides: dict[str, Callable[[], object]] = {}
    for name, video in (("device", on_device), ("CPU", torch.from_numpy(frames))):
        side = processor(video.permute(0, 3, 1, 2))
        if side is not None:
            rows_sides[f"processor, {name}"] = side
    rows_sides["torch operators"] = lambda: patch_rows(on_device, hw)

    def ours(backend: str, dtype: torch.dtype) -> Callable[[], object]:
        return lambda: patchify(jobs, dtype=dtype, backend=backend)

    for backend in backends("patchify", args.device):
        if backend != "reference":
            for dtype in dict.fromkeys((torch.float32, low)):
                name = f"patchify {backend}, {str(dtype).removeprefix('torch.')}"
                rows_sides[name] = ours(backend, dtype)

    embed_sides: dict[str, Callable[[], object]] = {
        "torch operators and product": lambda: patch_rows(on_device, hw).to(low) @ weight.T
    }

    def embedded(backend: str) -> Callable[[], object]:
        return lambda: patch_embed(jobs, embed, backend=backend)

    for backend in backends("patch_embed", args.device):
        if backend != "reference":
            embed_sides[f"patch_embed {backend}"] = embedded(backend)

    num_rows = sum(job.num_rows for job in jobs)
    bandwidth, rate = copy_bandwidth(args.device), matmul_rate(args.device, low)
    results = []
    for sides, flops in ((rows_sides, 0), (embed_sides, 2 * num_rows * PATCH_ROW * HIDDEN)):
        seconds = median_seconds(sides, args.device, args.runs)
        peer = next(iter(seconds))
        for name, median in seconds.items():
            width = 4 if "float32" in name else low.itemsize
            size = num_rows * (HIDDEN * low.itemsize if flops else PATCH_ROW * width)
            moved = frames.nbytes + size
            entry: dict[str, Any] = {
                "name": name,
                "median_ms": 1e3 * median,
                "peer": peer,
                "speedup": seconds[peer] / median,
                "gb_per_second": moved / median / 1e9,
                "share_of_copy": moved / median / bandwidth,
                "share_of_product_rate": flops / median / rate,
            }
            results.append(entry)
            print("{name:36} {median_ms:9.3f} ms  {speedup:7.1f}x".format(**entry), end="")
            print("  {gb_per_second:7.0f} GB/s  {share_of_copy:5.0%} of a copy".format(**entry))
    report = {
        **heading("processor", args, ("device", "runs", "frames", "threads")),
        "copy_gb_per_second": bandwidth / 1e9,
        "matmul_gflops": rate / 1e9,
        "results": results,
    }
    if args.result_dir is not None:
        write_result(args.result_dir / results_name("processor"), report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
