"""`vtts-rt bench KIND`: what rounds, requests, kernels and decoders cost, and how they err."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vtts_rt.checks import CommandParser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vtts-rt bench`; argv without the program's name. Returns the exit code."""
    from vtts_rt.bench import device, errors, feed, ops, rounds, serve, soak, video
    from vtts_rt.bench.setting import results_name

    benches = {
        "rounds": rounds,
        "serve": serve,
        "soak": soak,
        "ops": ops,
        "errors": errors,
        "device": device,
        "decode": video,
        "feed": feed,
    }
    parser = CommandParser(prog="vtts-rt bench", description=__doc__)
    kinds = parser.add_subparsers(dest="bench", required=True)
    for name, module in benches.items():
        about = (module.__doc__ or "").split("\n")[0]
        module.add_flags(kinds.add_parser(name, help=about, description=about))
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    module = benches[args.bench]
    result = module.measure(args)
    module.print_table(result)
    places = [] if args.output_json is None else [args.output_json]
    if args.result_dir is not None:
        places.append(args.result_dir / results_name(module.theme(args)))
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
    failures: list[str] = result.get("failures", [])
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
