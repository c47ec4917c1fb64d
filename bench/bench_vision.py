"""The vision tower against transformers' on the same rows and weights, in ms and GFLOP/s.

    python bench/bench_vision.py [--pairs 1,5,7] [--dtype D] [--runs N] [--threads N]
        [--output FILE]

The 118 M bench model on the CPU (on a GPU: bench_device.py); a pair is 480 patch rows
(280 x 336 px), as in a question about the bench clip. Runs alternate between the contenders, so
that a busy moment of the machine hits both; features are compared before anything is timed.
GFLOP/s count the products with weight matrices only, from their shapes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from vtts_rt.bench.model import MODEL_ID, allow_broken_torchvision, bench_model
from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    dtype_of,
    origin,
    results_name,
    write_result,
)
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.registry import DTYPES, load_model
from vtts_rt.models.vision import MERGE_UNIT, VisionTransformer

ROOT = Path(__file__).resolve().parents[1]
GRID_HW = 20, 24  # patches: 280 x 336 px, 480 rows a pair
# Of features up to 2: sums in another order; in 16 bits some units in the last place.
MAX_DIFFERENCE = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.06}


def product_flops(tower: VisionTransformer, num_rows: int) -> int:
    """Floating-point operations of all products with weight matrices for `num_rows` patch rows."""
    flops = 0
    for name, module in tower.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = num_rows // MERGE_UNIT if name.startswith("merger") else num_rows
            flops += 2 * rows * module.in_features * module.out_features
    return flops


def contenders(
    folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Callable[[torch.Tensor, int], torch.Tensor]], int]:
    """Name -> function of rows and pairs, returning features; and the operations of a pair."""
    allow_broken_torchvision()
    loader = transformers.Qwen2_5_VLForConditionalGeneration
    theirs = loader.from_pretrained(folder, dtype=dtype).model.visual.eval()
    model = load_model(folder, dtype=dtype)
    model.pack()
    ours = model.visual

    def transformers_features(rows: torch.Tensor, num_pairs: int) -> torch.Tensor:
        return theirs(rows, grid_thw=torch.tensor([(1, *GRID_HW)] * num_pairs)).pooler_output

    def our_features(rows: torch.Tensor, num_pairs: int) -> torch.Tensor:
        return ours(rows, [(1, *GRID_HW)] * num_pairs)

    functions = {"transformers": transformers_features, "vtts_rt": our_features}
    return functions, product_flops(ours, GRID_HW[0] * GRID_HW[1])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default="1,5,7", help="frame pairs in a pass, comma-separated")
    parser.add_argument("--runs", type=int, default=7)
    add_compute_flags(parser, devices=("cpu",))
    cache = Path.home() / ".cache" / "vtts_rt" / "bench"
    parser.add_argument("--cache-dir", type=Path, default=cache)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    check_compute(args)
    folder = bench_model(args.cache_dir)
    dtype = dtype_of(args, folder)

    functions, flops = contenders(folder, DTYPES[dtype])
    results = []
    for num_pairs in map(int, args.pairs.split(",")):
        generator = torch.Generator().manual_seed(num_pairs)
        num_rows = num_pairs * GRID_HW[0] * GRID_HW[1]
        rows = torch.randn(num_rows, GEOMETRY.row_size, generator=generator)
        rows = rows.to(DTYPES[dtype])
        features = [function(rows, num_pairs) for function in functions.values()]
        difference = float((features[0] - features[1]).abs().max())
        assert difference < MAX_DIFFERENCE[dtype], f"features differ by {difference}"
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(args.runs):
            for name, function in functions.items():
                began = time.perf_counter()
                function(rows, num_pairs)
                seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            best = min(times)
            result = {
                "name": name,
                "num_pairs": num_pairs,
                "median_ms": round(1e3 * statistics.median(times), 1),
                "min_ms": round(1e3 * best, 1),
                "gflops": round(1e-9 * flops * num_pairs / best, 1),
                "speedup": round(min(seconds["transformers"]) / best, 2),
                "max_difference": difference,
            }
            results.append(result)
            print(
                "{name:14} {num_pairs} pairs {min_ms:8.1f} ms  {gflops:6.1f} GFLOP/s".format(
                    **result
                )
            )

    report = {
        "theme": "vision",
        **origin(args.threads),
        "setting": {
            "model_id": MODEL_ID,
            "dtype": dtype,
            "rows_of_a_pair": GRID_HW[0] * GRID_HW[1],
            "product_gflop_of_a_pair": round(1e-9 * flops, 2),
            "runs": args.runs,
            "gflops_and_speedup": "from the shortest run",
        },
        "results": results,
    }
    output = args.output or ROOT / "bench" / "results" / results_name(
        "vision" if dtype == "float32" else f"vision{dtype}"
    )
    write_result(output, report)


if __name__ == "__main__":
    main()
