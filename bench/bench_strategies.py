"""File what each strategy keeps from round to round, and the embedded model's accuracy under each.

python bench/bench_strategies.py [--seed S] [--plans N] [--num N] [--device D] [--dtype D]
[--threads N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vtts_rt.bench.model import qwen_tokenizer
from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    dtype_of,
    origin,
    results_name,
    write_result,
)
from vtts_rt.config import RuntimeConfig
from vtts_rt.evaluation.strategies import accuracy, kept
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.tokenizer import Tokenizer
from vtts_rt.runtime import Runtime

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=30000, help="of clues and clips")
    parser.add_argument("--plans", type=int, default=50, help="random clues")
    parser.add_argument("--num", type=int, default=80, help="clips")
    add_compute_flags(parser, threads=1)
    args = parser.parse_args()
    check_compute(args)
    dtype = dtype_of(args, "tiny")
    result = {
        **origin(args.threads),
        "dtype": dtype,
        "task": "strategies",
        "seed": args.seed,
        "plans": args.plans,
        "num": args.num,
        # Prompts are as long as they are for the models whose budgets these are.
        "kept": kept(Tokenizer(qwen_tokenizer(), CHAT), GEOMETRY, seed=args.seed, num=args.plans),
    }
    config = RuntimeConfig(threads=args.threads)
    with Runtime.from_pretrained("tiny", dtype=dtype, device=args.device, config=config) as runtime:
        result["accuracy"] = accuracy(runtime, seed=args.seed, num=args.num)
    write_result(RESULTS / results_name("strategies"), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
