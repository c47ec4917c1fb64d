"""Evaluate the embedded model on held-out needle clips and file the result: accuracy by rounds.

python bench/bench_needle.py [--seed S] [--num N] [--device D] [--dtype D] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    dtype_of,
    origin,
    results_name,
    write_result,
)
from vtts_rt.config import RuntimeConfig
from vtts_rt.evaluation.needle import evaluate
from vtts_rt.runtime import Runtime

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first clip")
    parser.add_argument("--num", type=int, default=500, help="clips")
    add_compute_flags(parser)
    args = parser.parse_args()
    check_compute(args)
    dtype = dtype_of(args, "tiny")
    config = RuntimeConfig(threads=args.threads)
    with Runtime.from_pretrained("tiny", dtype=dtype, device=args.device, config=config) as runtime:
        result = {
            **origin(args.threads),
            "dtype": dtype,
            **evaluate(runtime, seed=args.seed, num=args.num),
        }
    theme = "needle" if dtype == "float32" else f"needle{dtype}"
    write_result(RESULTS / results_name(theme), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
