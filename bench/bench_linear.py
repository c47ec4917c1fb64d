"""linear: the native kernel against torch (MKL), in GFLOP/s, at the shapes of the bench model.

    python bench/bench_linear.py [--dtype DTYPE] [--runs N] [--threads N] [--output FILE]

Rows times a matrix of float32 or bfloat16 on the CPU, packed for the native kernel. Runs alternate,
so that a busy moment of the machine hits both; products are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    origin,
    results_name,
    write_result,
)
from vtts_rt.models.registry import DTYPES
from vtts_rt.ops.linear import linear
from vtts_rt.ops.packed import Matrix, pack

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("torch", "cpu")
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1.6e-2, 0.25)}  # relative, absolute
CASES = [  # what it is, rows, channels, outputs
    ("head, one token", 1, 512, 151936),
    ("head, a token and 8 drafts", 9, 512, 151936),
    ("head, 8 requests with drafts", 72, 512, 151936),
    ("gate and up, 8 requests with drafts", 72, 512, 2816),
    ("gate and up, a later look", 540, 512, 2816),
    ("gate and up, a first look", 1024, 512, 2816),
    ("down, a first look", 1024, 1408, 512),
    ("vision qkv, two pairs", 960, 384, 1152),
    ("vision gate and up, two pairs", 960, 384, 2048),
    ("vision merger, two pairs", 240, 1536, 1536),
]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=25)
    add_compute_flags(
        parser,
        devices=("cpu",),
        dtypes=("float32", "bfloat16"),  # what the kernel takes
        dtype_help="default: float32",
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    check_compute(args)

    name = args.dtype or "float32"
    dtype = DTYPES[name]
    theme = "linear" if name == "float32" else f"linear{name}"
    results = []
    for about, num_rows, num_channels, num_outputs in CASES:
        x = torch.randn(num_rows, num_channels).to(dtype)
        weight = torch.randn(num_outputs, num_channels).to(dtype)
        weights = {"torch": weight, "cpu": Matrix(pack(weight), num_outputs)}
        products = [linear(x, weights[backend], backend=backend) for backend in BACKENDS]
        rtol, atol = TOLERANCES[dtype]
        torch.testing.assert_close(*products, rtol=rtol, atol=atol)
        seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for _ in range(args.runs):
            for backend, times in seconds.items():
                began = time.perf_counter()
                linear(x, weights[backend], backend=backend)
                times.append(time.perf_counter() - began)
        medians = {backend: statistics.median(times) for backend, times in seconds.items()}
        gflop = 2e-9 * num_rows * num_channels * num_outputs
        entry = {
            "about": about,
            "rows": num_rows,
            "channels": num_channels,
            "outputs": num_outputs,
            "median_ms": {name: round(1e3 * median, 3) for name, median in medians.items()},
            "gflops": {name: round(gflop / median, 1) for name, median in medians.items()},
            "speedup": round(medians["torch"] / medians["cpu"], 2),
        }
        results.append(entry)
        print(f"{about:36} {entry['gflops']}  {entry['speedup']:.2f}x")
    report = {
        "theme": theme,
        **origin(args.threads),
        "setting": {"dtype": name, "runs": args.runs},
        "results": results,
    }
    output = args.output or ROOT / "bench" / "results" / results_name(theme)
    write_result(output, report)


if __name__ == "__main__":
    main()
