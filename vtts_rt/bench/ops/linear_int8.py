"""linear_int8: decoding steps and prefills; torch's product of float32 weights beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from vtts_rt.bench.ops.case import DTYPES, Case, Scale, bench_dtype
from vtts_rt.ops.linear_int8 import linear_int8, linear_int8_ref, quantize_int8
from vtts_rt.ops.quantized import dequantize

# Rows, channels, outputs: on a CPU the 118 M bench model's head, gate_up and down, alone, with
# drafts and in a prefill; 7B's gate_up elsewhere, where only torch runs it.
SHAPES = {
    "check": ((1, 1, 1), (1, 1030, 65), (3, 48, 33), (16, 130, 7), (17, 65, 129), (0, 8, 8)),
    "cuda": ((1, 3584, 37888),),
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
        return torch.randn(shape, generator=generator)

    x = normal(rows, channels * step).to(device, dtype)[:, :channels]
    # Of an output's weights. Near each other: the error of one output says little beside torch's.
    size = torch.logspace(-0.5, 0.5, outputs)[:, None]
    weight, scale = quantize_int8((size * normal(outputs, channels)).to(device))
    bias = normal(outputs).to(device, dtype) if with_bias else None
    wide = dequantize(weight, scale, dtype)
    return Case(
        name=f"{rows} x {channels} -> {outputs}{', bias' if with_bias else ''}",
        dtype=dtype,
        run=lambda backend: (linear_int8(x, weight, scale, bias, backend=backend),),
        exact=lambda: (linear_int8_ref(x, weight, scale, bias),),
        eager=lambda: (F.linear(x, wide, bias),),
        num_bytes=weight.numel() + (x.numel() + rows * outputs) * dtype.itemsize,
        num_flops=2 * rows * channels * outputs,
    )
