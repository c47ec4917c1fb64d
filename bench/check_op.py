"""One op's cases against the equation on this device; exit status 1 if one errs too much.

    python bench/check_op.py OP [--device D] [--dtype D] [--backend NAME] [--most N]

Small and awkward shapes first, then the real ones. Outputs are filled with NaN beforehand.
"""

from __future__ import annotations

import argparse
import sys

from op_cases import CASES, check

from vtts_rt.bench.setting import add_compute_flags, check_compute
from vtts_rt.models.registry import DTYPES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=CASES)
    add_compute_flags(parser, threads=None, dtype_help="default: all")
    parser.add_argument("--backend", help="only this one")
    parser.add_argument("--most", type=int, help="cases of each size, at most")
    args = parser.parse_args()
    check_compute(args)
    num, wrong = 0, 0
    for scale in ("check", "bench"):
        done = 0
        for case, backend, error in check(args.op, args.device, scale, DTYPES.get(args.dtype)):
            if args.backend not in (None, backend):
                continue
            if args.most is not None and done >= args.most:
                break
            done += 1
            num += 1
            if not error.within:
                wrong += 1
                print(f"WRONG {args.op}, {backend}, {case.name}, {case.dtype}: {error}")
    print(f"{args.op}: {num} cases, {wrong} wrong")
    return 1 if wrong or not num else 0


if __name__ == "__main__":
    sys.exit(main())
