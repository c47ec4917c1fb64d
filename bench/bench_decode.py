"""A decoding step on the CPU: native kernels against torch's operators, in ms.

    python bench/bench_decode.py [--dtype D] [--keys N] [--runs N] [--threads N] [--output FILE]
    python bench/bench_decode.py --device cuda [--dtype D] [--shape 118m|3b|7b] [--keys N]
        [--runs N]

The second form is the engine on a GPU, bfloat16 by default, with CUDA graphs and without, as a
share of the time in which a copy moves the weights (engine_decode.py). The first:

The shape of the 118 M bench model with random weights; a step takes the embeddings of some rows to
chosen tokens, each sequence attending to --keys keys in shuffled pages. Rows of one sequence are
drafts, sequences of one row a batch. Runs alternate between the contenders, so that a busy moment
of the machine hits both; logits are compared before anything is timed. The floor is the time a sum
takes to read the weights once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from engine_decode import measure
from op_cases.case import bench_dtype
from shapes import SHAPES, model_config, random_model
from timing import copy_bandwidth

from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    origin,
    results_name,
    write_result,
)
from vtts_rt.models.attention import PagedKV, plan_calls
from vtts_rt.models.language import ForwardBatch, LanguageModel
from vtts_rt.models.registry import DTYPES
from vtts_rt.ops.sampling import sample_token
from vtts_rt.sampling import ResolvedSampling

ROOT = Path(__file__).resolve().parents[1]
PAGE_SIZE = 16
CASES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1)]  # sequences, rows of each
CONTENDERS = {
    "torch": "linear=torch,paged_attention=torch,rmsnorm=reference,rotary_kv=torch,swiglu=torch",
    "vtts_rt": "",
}
# Of logits up to 100: sums in another order; in 16 bits some units in the last place.
MAX_DIFFERENCE = {"float32": 1e-3, "float16": 0.5, "bfloat16": 4.0}


class Step:
    """One decoding step of some sequences, ready to be repeated."""

    def __init__(self, model: LanguageModel, num_sequences: int, rows: int, num_keys: int) -> None:
        self.model = model
        config, num_pages = model.config, -(-num_keys // PAGE_SIZE)
        kv_dtype = model.embed_tokens.weight.dtype
        kv_shape = (PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        pool = (config.num_hidden_layers, 2, num_sequences * num_pages, *kv_shape)
        table = torch.randperm(num_sequences * num_pages).view(num_sequences, num_pages)
        index = torch.arange(num_keys - rows, num_keys)
        slots = table[:, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE
        self.batch = ForwardBatch(
            torch.arange(num_sequences * rows),
            None,
            index.repeat(num_sequences).expand(3, -1),
            [rows * i for i in range(num_sequences + 1)],
            PagedKV(
                torch.randn(pool).to(kv_dtype),
                slots.flatten(),
                plan_calls(
                    table.tolist(), [rows] * num_sequences, [num_keys] * num_sequences, PAGE_SIZE
                ),
            ),
        )

    def logits(self) -> torch.Tensor:
        return self.model.logits(self.model(self.batch))

    def __call__(self) -> None:
        for position, row in enumerate(self.logits()):
            sample_token(row, ResolvedSampling(), member=0, round_index=0, position=position)


def seconds(function: Any) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=2800, help="keys of every sequence")
    parser.add_argument("--runs", type=int, default=15)
    add_compute_flags(parser, dtype_help="default: bfloat16, on a CPU float32")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="118m", help="with cuda only")
    args = parser.parse_args()
    check_compute(args)
    kind = DTYPES[args.dtype] if args.dtype else bench_dtype(args.device)
    dtype = str(kind).removeprefix("torch.")

    if args.device == "cuda":
        file(args, f"decode{args.shape}", *on_gpu(args, kind))
        return
    if args.shape != "118m":
        parser.error("--shape needs --device cuda")
    models = {name: random_model(model_config("118m"), "cpu", kind) for name in CONTENDERS}
    models["vtts_rt"].pack()
    model = models["torch"].language
    weights = [p for p in model.parameters() if p.dim() == 2]  # the head once: it is tied
    weight_bytes = sum(p.numel() * p.element_size() for p in weights)
    floor = min(seconds(lambda: [p.sum() for p in weights]) for _ in range(args.runs))
    print(f"weights {weight_bytes / 1e6:.0f} MB, floor {1e3 * floor:.1f} ms", end="")
    print(f" ({weight_bytes / floor / 1e9:.1f} GB/s)")
    results = []
    for num_sequences, rows in CASES:
        step = Step(model, num_sequences, rows, args.keys)
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        expected = None
        for run in range(-1, args.runs):  # the first is not timed: it compares
            for name, backends in CONTENDERS.items():
                os.environ["VTTS_RT_BACKEND"] = backends
                step.model = models[name].language
                if run >= 0:
                    times[name].append(seconds(step))
                    continue
                logits = step.logits()
                expected = logits if expected is None else expected
                difference = float((logits - expected).abs().max())
                assert difference < MAX_DIFFERENCE[dtype], f"{name}: logits differ by {difference}"
        kv_bytes = num_sequences * args.keys * 2 * model.config.num_hidden_layers
        kv_bytes *= model.config.num_key_value_heads * model.config.head_dim * kind.itemsize
        for name, taken in times.items():
            median = statistics.median(taken)
            results.append(
                {
                    "name": name,
                    "sequences": num_sequences,
                    "rows": rows,
                    "median_ms": round(1e3 * median, 2),
                    "min_ms": round(1e3 * min(taken), 2),
                    "gigabytes_per_second": round((weight_bytes + kv_bytes) / median / 1e9, 1),
                    "speedup": round(statistics.median(times["torch"]) / median, 2),
                }
            )
            print(f"{num_sequences} x {rows} rows  {name:8}", end="")
            print("{median_ms:8.1f} ms  min {min_ms:.1f}".format(**results[-1]), end="")
            print("  {gigabytes_per_second:5.1f} GB/s  {speedup:.2f}x".format(**results[-1]))
    setting = {"page_size": PAGE_SIZE, "floor_ms": round(1e3 * floor, 2), "dtype": dtype}
    theme = "decode" if dtype == "float32" else f"decode{dtype}"
    file(args, theme, {"weight_bytes": weight_bytes, **setting}, results)


def on_gpu(
    args: argparse.Namespace, dtype: torch.dtype
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Setting and results of the engine's own decoding."""
    model = random_model(model_config(args.shape), "cuda", dtype)
    bandwidth = copy_bandwidth("cuda")
    print(f"copies {bandwidth / 1e9:.0f} GB/s")
    results = measure(model, bandwidth, num_keys=args.keys, num_steps=4 * args.runs)
    for result in results:
        print("{sequences:3} x {way:22} {ms_per_step:8.2f} ms".format(**result), end="")
        print("  {share_of_floor:6.1%} of the floor".format(**result), end="")
        print("  {share_of_floor_with_kv:6.1%} with KV".format(**result))
    setting = {"shape": args.shape, "dtype": str(dtype).removeprefix("torch.")}
    return {**setting, "copy_bytes_per_second": bandwidth}, results


def file(
    args: argparse.Namespace, theme: str, setting: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    report = {
        "bench": theme,
        **origin(args.threads),
        "setting": {"keys": args.keys, "runs": args.runs, **setting},
        "results": results,
    }
    output = args.output or ROOT / "bench" / "results" / results_name(theme)
    write_result(output, report)


if __name__ == "__main__":
    main()
