"""Ask the embedded model about needle clips decoded by PyAV and by DALI; file how often it agrees.

python bench/bench_agreement.py [--codec vp9,mjpeg] [--seed S] [--num N] [--device D]
    [--dtype D] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

from vtts_rt.bench.agreement import agreement
from vtts_rt.bench.encodings import codec_names
from vtts_rt.bench.setting import (
    add_compute_flags,
    check_compute,
    commit,
    dtype_of,
    hardware,
    results_name,
)
from vtts_rt.config import EngineConfig
from vtts_rt.results import versions
from vtts_rt.runtime import Runtime

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--codec", default="vp9,mjpeg", help="comma-separated")
    parser.add_argument("--seed", type=int, default=40000, help="of the first clip")
    parser.add_argument("--num", type=int, default=200, help="clips of each codec")
    add_compute_flags(parser, threads=1)
    args = parser.parse_args()
    check_compute(args)
    dtype = dtype_of(args, "tiny")
    codecs = codec_names(args.codec)

    def progress(done: int, same: int) -> None:
        print(f"\r{done}/{args.num} clips, {same} answered the same", end="", file=sys.stderr)

    engine = EngineConfig(threads=args.threads)
    with Runtime.from_pretrained("tiny", dtype=dtype, device=args.device, engine=engine) as runtime:
        found = [
            agreement(runtime, codec=codec, seed=args.seed, num=args.num, on_clip=progress)
            for codec in codecs
        ]
        result = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "commit": commit(),
            "hardware": hardware(args.threads),
            "versions": versions(),
            "dtype": dtype,
            "model": runtime.name,
            "split": "held_out",
            "results": found,
        }
    print(file=sys.stderr)
    path = RESULTS / results_name("agreement")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
