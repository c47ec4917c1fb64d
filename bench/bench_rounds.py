"""Measure the rounds and file the result under bench/results.

python bench/bench_rounds.py [flags of `vtts-rt bench rounds`]
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtts_rt.bench import main

RESULTS = Path(__file__).resolve().parent / "results"

if __name__ == "__main__":
    sys.exit(main(["rounds", "--result-dir", str(RESULTS), *sys.argv[1:]]))
