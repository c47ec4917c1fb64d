"""patchify against transformers' Qwen2VLVideoProcessor: 32 frames of 1280x720, default budget.

    python bench/bench_patchify.py [--runs N] [--output FILE]

Runs alternate between the contenders, so that a busy moment of the machine hits all of them; the
result is the median. The rows of all contenders are compared bit for bit before anything is timed.
Threads: torch and patchify get the same number, 1 and 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vtts_rt import _C
from vtts_rt.bench.setting import add_compute_flags, origin, results_name, write_result
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.patch_jobs import mean_and_std
from vtts_rt.ops.patchify import PatchBuffer, PatchifyJob, patchify
from vtts_rt.types import PixelBox

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import torchvision_shim  # noqa: E402

NUM_FRAMES, HEIGHT, WIDTH = 32, 720, 1280
THREADS = 1, 2
RESIZED_HW = (560, 1008)  # smart_resize with the processor's default budget


def footage() -> np.ndarray:
    """Moving gradients with some noise, (T, H, W, 3) uint8: neither flat nor all noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    frames = np.empty((NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for t in range(NUM_FRAMES):
        base = np.stack([x + 4 * t, y + 2 * t, x + y], axis=-1) // 4
        frames[t] = (base + rng.integers(0, 24, base.shape)) % 256
    return frames


def contenders(frames: np.ndarray) -> dict[str, Callable[[int], torch.Tensor]]:
    """Name -> function of the number of threads, returning the patch rows."""
    torchvision_shim.install()
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor()
    video = [torch.from_numpy(frames).permute(0, 3, 1, 2)]
    box = PixelBox(0, 0, WIDTH, HEIGHT)
    jobs = [PatchifyJob(frames[i], frames[i + 1], box, RESIZED_HW) for i in range(0, NUM_FRAMES, 2)]
    items = [(job.frame_a, job.frame_b, tuple(box), RESIZED_HW, "fixed") for job in jobs]
    mean, std = map(tuple, mean_and_std(GEOMETRY, torch.device("cpu")).tolist())
    reused = PatchBuffer(GEOMETRY).rows_for(jobs)

    def transformers_rows(num_threads: int) -> torch.Tensor:
        torch.set_num_threads(num_threads)
        result = processor(videos=video, cap_pixels_per_frame=False, return_tensors="pt")
        return result["pixel_values_videos"]

    def on(isa: str) -> Callable[[int], torch.Tensor]:
        def rows(num_threads: int) -> torch.Tensor:
            out = torch.empty_like(reused)
            _C.patchify(items, out.numpy(), GEOMETRY.patch_px, mean, std, isa, num_threads)
            return out

        return rows

    found: dict[str, Callable[[int], torch.Tensor]] = {"transformers": transformers_rows}
    for isa in ("scalar", "avx2", "neon"):
        if _C.isa_supported(isa):
            found[f"patchify {isa}"] = on(isa)
    found["patchify, out= reused"] = lambda n: patchify(
        jobs, GEOMETRY, backend="cpu", num_threads=n, out=reused
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    # The native kernel on the CPU writes float32; bench_processor.py has the others.
    add_compute_flags(parser, devices=("cpu",), dtypes=("float32",), threads=None)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    functions = contenders(footage())
    expected = functions["transformers"](2)
    for name, function in functions.items():
        assert torch.equal(function(2), expected), f"{name}: rows differ from transformers"
    del expected

    times_ms: dict[tuple[str, int], list[float]] = {(n, t): [] for n in functions for t in THREADS}
    for _ in range(args.runs):
        for (name, num_threads), times in times_ms.items():
            began = time.perf_counter()
            functions[name](num_threads)
            times.append(1e3 * (time.perf_counter() - began))

    results = []
    for (name, num_threads), times in times_ms.items():
        median = statistics.median(times)
        against = statistics.median(times_ms["transformers", num_threads])
        results.append(
            {
                "name": name,
                "num_threads": num_threads,
                "median_ms": round(median, 1),
                "min_ms": round(min(times), 1),
                "max_ms": round(max(times), 1),
                "speedup": round(against / median, 2),
            }
        )
        print(f"{name:28} {num_threads} threads {median:8.1f} ms  {against / median:5.2f}x")
    report = {
        "theme": "patchify",
        **origin(threads=max(THREADS)),
        "setting": {
            "num_frames": NUM_FRAMES,
            "source_hw": [HEIGHT, WIDTH],
            "resized_hw": list(RESIZED_HW),
            "runs": args.runs,
            "rows": "bitwise equal for all contenders",
        },
        "results": results,
    }
    write_result(args.output or ROOT / "bench" / "results" / results_name("patchify"), report)


if __name__ == "__main__":
    main()
