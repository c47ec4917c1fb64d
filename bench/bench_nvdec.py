"""Frames from NVDEC to patch rows: does a copy pass through the host on the way?

    python bench/bench_nvdec.py [--video FILE] [--frames N] [--result-dir DIR]

Decodes with DALI on the GPU, keeps the frames in a FrameStore, resizes and patches them, all under
torch's profiler, and sums its memory copies between host and device. What remains are the encoded
packets, tables of jobs and one answer a batch (does the guard match): far less than one frame.
Where there is no NVDEC or no DALI the result says so and nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vtts_rt.bench.setting import add_compute_flags, origin, results_name, write_result
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.types import PixelBox
from vtts_rt.video import FrameStore, open_video
from vtts_rt.video.decoders import dali_refusal

ROOT = Path(__file__).resolve().parents[1]
CLIP = ROOT / "vtts_rt" / "assets" / "clip.mp4"


def refusal() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    try:
        import av  # noqa: F401
    except ImportError:
        return "PyAV, which finds the packets, is not installed: pip install av"
    return dali_refusal(0)


def copied_bytes(trace: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Of a chrome trace: copies by kind ("HtoD", "DtoH", "DtoD"), their number, sum and largest."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "gpu_memcpy":
            kinds[event["name"].split()[1]].append(int(event["args"]["bytes"]))
    return {k: {"num": len(v), "bytes": sum(v), "largest": max(v)} for k, v in kinds.items()}


def measure(video: Path, num_frames: int) -> dict[str, Any]:
    store = FrameStore(1 << 30)
    with open_video(video, decoder="dali", device=0) as source:
        meta = source.metadata
        step = max(1, meta.num_frames // num_frames)
        indices = list(range(0, meta.num_frames, step))[:num_frames]
        store.frames(source, indices[:2])  # what is built at first use
        store.clear()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            frames = store.frames(source, indices)
            box, size = PixelBox(0, 0, meta.width, meta.height), (224, 224)
            jobs = [PatchifyJob(f, f, box, size) for f in frames]
            rows = patchify(jobs, GEOMETRY)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            copies = copied_bytes(json.loads(path.read_text()))
    return {
        "decoder": meta.decoder,
        "frames": len(indices),
        "frame_bytes": meta.height * meta.width * 3,
        "on_device": all(getattr(f, "is_cuda", False) for f in frames) and rows.is_cuda,
        "frames_by_pyav": getattr(source, "frames_by_pyav", None),
        "copies": copies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path, default=CLIP)
    parser.add_argument("--frames", type=int, default=32)
    add_compute_flags(parser, devices=("cuda",), dtypes=(), threads=None)
    parser.add_argument("--result-dir", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    why = refusal()
    report = {
        "theme": "nvdec",
        **origin(threads=0),
        "refusal": why,
        **({} if why else measure(args.video, args.frames)),
    }
    print(json.dumps(report, indent=1))
    if why:
        print(f"nothing measured: {why}")
        return
    write_result(args.result_dir / results_name("nvdec"), report)


if __name__ == "__main__":
    main()
