"""Weights of a trainer that a runtime in another process takes where they are.

    python bench/check_ipc.py [--device cuda]

A model here is exported as handles (CUDA IPC; shared memory on the CPU), a worker process with
other weights on the same device updates itself from them, and must then say what a runtime with
the first weights says. Exit status 1 if it does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from vtts_rt import Runtime, SamplingParams, export_weights
from vtts_rt.checks import CommandParser
from vtts_rt.cluster import RolloutCluster
from vtts_rt.models.registry import from_config
from vtts_rt.workers import ProcessWorker

TEXT = "Which pattern is on the red card?"
SAMPLING = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def main() -> int:
    """The exit status."""
    parser = CommandParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    args: argparse.Namespace = parser.parse_args()
    make = partial(Runtime.from_pretrained, "tiny", dtype="float32", device=args.device)
    with make() as ours, RolloutCluster([ProcessWorker(make)]) as cluster:
        own = from_config(ours.engine.model.config, 3).export()
        trained = {name: tensor.to(args.device) for name, tensor in own.items()}
        before = cluster.generate(TEXT, SAMPLING)[0].token_ids
        began = time.perf_counter()
        cluster.update_weights(export_weights(trained))
        seconds = time.perf_counter() - began
        ours.update_weights(trained)
        expected, found = (
            ours.generate(TEXT, SAMPLING).token_ids,
            cluster.generate(TEXT, SAMPLING)[0].token_ids,
        )
    size = sum(tensor.nbytes for tensor in trained.values()) / 2**20
    ok = found == expected != before
    print(f"{size:.0f} MiB of {args.device} weights in {1e3 * seconds:.0f} ms: {'same' if ok else 'NOT the same'} tokens")  # fmt: skip  # noqa: E501
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
