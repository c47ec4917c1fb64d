"""linear: decoding steps and prefills; torch's own product is the other backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from vtts_rt.bench.ops.case import DTYPES, Case, Scale, bench_dtype
from vtts_rt.ops.linear import linear, linear_ref

# Rows, channels, outputs: 7B's gate_up and o_proj on a GPU; on a CPU the 118 M bench model's head,
# gate_up and down, alone, with drafts and in a prefill.
SHAPES = {
    "check": ((1, 1, 1), (1, 1030, 65), (3, 48, 33), (16, 130, 7), (17, 65, 129), (0, 8, 8)),
    "cuda": ((1, 3584, 37888), (256, 3584, 37888), (1, 3584, 3584)),
    "cpu": (
        *((rows, 512, 151936) for rows in (1, 9, 72)),
        *((rows, 512, 2816) for rows in (1, 9, 72, 1024)),
        (1, 1408, 512),
        (1024, 1408, 512),
    ),
}


def cases(device: str, scale: Scale) -> Iterator[Case]:
    """At "check" scale rows that are not adjacent, with a bias and without."""
    check = scale == "check"
    for shape in SHAPES["check" if check else device]:
        for dtype in DTYPES if check else (bench_dtype(device),):
            for with_bias in (False, True) if check else (False,):
                yield _case(device, dtype, *shape, with_bias, 2 if check else 1)


def _case(
    device: str,
    dtype: torch.dtype,
    rows: int,
    channels: int,
    outputs: int,
    with_bias: bool,
    step: int,
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, weight = normal(rows, channels * step)[:, :channels], normal(outputs, channels)
    bias = normal(outputs) if with_bias else None
    return Case(
        name=f"{rows} x {channels} -> {outputs}{', bias' if with_bias else ''}",
        dtype=dtype,
        run=lambda backend: (linear(x, weight, bias, backend=backend),),
        exact=lambda: (linear_ref(x, weight, bias),),
        eager=lambda: (F.linear(x, weight, bias),),
        num_bytes=(weight.numel() + x.numel() + rows * outputs) * dtype.itemsize,
        num_flops=2 * rows * channels * outputs,
    )
