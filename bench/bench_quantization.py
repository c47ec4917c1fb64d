"""What 8-bit weights bring and cost on a CPU: decoding steps of the 118 M bench model, and the
accuracy of the embedded model on held-out needle clips.

    python bench/bench_quantization.py [--num N] [--runs N] [--threads N] [--output FILE]

Steps alternate between float32 and int8. Accuracies are evaluated at the same time, each by a
process of one thread: its times are not filed.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_decode import PAGE_SIZE, Step, seconds
from shapes import model_config, random_model

from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    origin,
    results_name,
    write_result,
)
from vtts_rt.config import RuntimeConfig
from vtts_rt.evaluation.needle import evaluate
from vtts_rt.models.quantize import quantize_language
from vtts_rt.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = {"float32": None, "int8": "int8"}
CASES = [(1, 1), (1, 4), (1, 9), (8, 1)]  # sequences, rows of each


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all matrices that a step reads; the embedding only where it is the head too."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if model.lm_head is not None:
        del tensors["embed_tokens.weight"]
    return sum(t.numel() * t.element_size() for t in tensors.values() if t.dim() > 1)


@torch.inference_mode()
def decode(runs: int, keys: int) -> list[dict[str, Any]]:
    """Medians of a decoding step, ms, for each contender and case."""
    config = model_config("118m")
    models = {}
    for name, quantization in CONTENDERS.items():
        model = random_model(config, "cpu", torch.float32)
        if quantization is not None:
            quantize_language(model.language, quantization)
        model.pack()
        models[name] = model.language
    results = []
    for num_sequences, rows in CASES:
        steps = {name: Step(model, num_sequences, rows, keys) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for run in range(-1, runs):  # the first is not timed
            for name, step in steps.items():
                taken = seconds(step)
                if run >= 0:
                    times[name].append(taken)
        for name, taken in times.items():
            entry = {
                "name": name,
                "sequences": num_sequences,
                "rows": rows,
                "median_ms": round(1e3 * statistics.median(taken), 2),
                "min_ms": round(1e3 * min(taken), 2),
                "weight_bytes": weight_bytes(models[name]),
            }
            results.append(entry)
            print(entry)
    return results


def accuracy(name: str, num: int) -> dict[str, Any]:
    """`vtts-rt eval needle --together` of the embedded model, without its times."""
    with Runtime.from_pretrained(
        "tiny", device="cpu", quantization=CONTENDERS[name], config=RuntimeConfig(threads=1)
    ) as runtime:
        result = evaluate(runtime, seed=0, num=num, together=True)
    for entry in result["rounds"]:
        del entry["ms"]
    return {"name": name, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num", type=int, default=200, help="needle clips")
    parser.add_argument("--keys", type=int, default=2800, help="keys of every sequence")
    parser.add_argument("--runs", type=int, default=25)
    add_compute_flags(parser, devices=("cpu",), dtypes=("float32",))  # int8 is for these
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    check_compute(args)
    torch.set_num_threads(args.threads)
    decoded = decode(args.runs, args.keys)
    with ProcessPoolExecutor(len(CONTENDERS), get_context("spawn")) as pool:
        accuracies = list(pool.map(accuracy, CONTENDERS, [args.num] * len(CONTENDERS)))
    report = {
        "theme": "quantization",
        **origin(args.threads),
        "setting": {"runs": args.runs, "keys": args.keys, "page_size": PAGE_SIZE},
        "decode": decoded,
        "accuracy": accuracies,
    }
    output = args.output or ROOT / "bench" / "results" / results_name("quantization")
    write_result(output, report)


if __name__ == "__main__":
    main()
