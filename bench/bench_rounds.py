"""Measure the rounds and file the result under bench/results.

python bench/bench_rounds.py [flags of `vtts-rt bench rounds`]
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtts_rt.bench import main, results_name

RESULTS = Path("bench") / "results"

if __name__ == "__main__":
    flags = sys.argv[1:]
    if "--output-json" not in flags:
        flags += ["--output-json", str(RESULTS / results_name("rounds"))]
    sys.exit(main(["rounds", *flags]))
