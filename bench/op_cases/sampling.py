"""sampling: tokens and log-probabilities, greedy, sampled, filtered and mixed, with odd logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.sampling import processed_logits, sample
from vtts_rt.sampling import ResolvedSampling

GREEDY, HOT = ResolvedSampling(), ResolvedSampling(temperature=1.3, seed=2**63 - 1)
FILTERED = ResolvedSampling(temperature=0.7, top_k=50, top_p=0.9, seed=5)
WIDE = ResolvedSampling(temperature=1.0, top_k=10**6, seed=11)
NARROW = ResolvedSampling(temperature=1.0, top_p=1e-6, seed=12)
KINDS = {
    "greedy": [GREEDY],
    "sampled": [HOT],
    "filtered": [FILTERED],
    "mixed": [HOT, GREEDY, WIDE, FILTERED, NARROW],
}
# Rows, vocabulary.
SHAPES = {
    "check": ((1, 1), (5, 7), (6, 1030), (2, 2048)),
    "bench": ((1, 151_936), (16, 151_936)),
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale logits of every type with ties, infinities and rows that are not adjacent;
    else of the type that models are served in."""
    check = scale == "check"
    for rows, size in SHAPES[scale]:
        for kind, params in KINDS.items():
            for dtype in DTYPES if check else (bench_dtype(device),):
                yield _case(device, dtype, rows, size, kind, params, check)


@built_later
def _case(
    device: str,
    dtype: torch.dtype,
    rows: int,
    size: int,
    kind: str,
    params: Sequence[ResolvedSampling],
    check: bool,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + size)
    logits = 3 * torch.randn(rows, size + 3 * check, generator=generator)
    if check:
        logits = logits.round(decimals=1)[:, :size]  # ties
        logits[::2, ::3] = -torch.inf
        logits[::2, size // 2] = 1.0  # a row of nothing else has no distribution
    logits = logits.to(device, dtype)
    chosen = [params[row % len(params)] for row in range(rows)]
    coordinates = {
        "members": [2**40 * (row % 2) + row for row in range(rows)],
        "rounds": [row % 3 for row in range(rows)],
        "positions": [7 * row for row in range(rows)],
    }

    def run(backend: str) -> tuple[torch.Tensor, ...]:
        return sample(logits, chosen, **coordinates, backend=backend)

    def exact() -> tuple[torch.Tensor, ...]:
        tokens, _ = run("reference")
        processed = [processed_logits(*row) for row in zip(logits, chosen, strict=True)]
        logprobs = torch.stack(processed).double().log_softmax(1)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    return Case(
        name=f"{rows} x {size}, {kind}",
        dtype=dtype,
        run=run,
        exact=exact,
        eager=lambda: run("reference"),
        num_bytes=logits.numel() * dtype.itemsize,
    )
