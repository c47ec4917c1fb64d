"""linear_fp8: decoding steps and prefills; torch's product of bfloat16 weights beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from vtts_rt.bench.ops.case import DTYPES, Case, Scale, bench_dtype
from vtts_rt.ops.linear_fp8 import linear_fp8, linear_fp8_ref, quantize_fp8
from vtts_rt.ops.quantized import dequantize

# Rows, channels, outputs: 7B's gate_up, o_proj and down, 3B's gate_up; on a CPU the 118 M bench
# model's gate_up.
SHAPES = {
    "check": ((1, 1, 1), (1, 1030, 5), (3, 48, 33), (16, 130, 7), (17, 65, 129), (0, 8, 8)),
    "cuda": (
        *((rows, 3584, 37888) for rows in (1, 8, 16, 64, 256, 2048)),
        (1, 3584, 3584),
        (1, 18944, 3584),
        (1, 2048, 22016),
    ),
    "cpu": ((1, 512, 2816), (16, 512, 2816), (512, 512, 2816)),
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
    size = torch.logspace(-3, 3, outputs)[:, None]  # of an output's weights
    weight, scale = quantize_fp8((size * normal(outputs, channels)).to(device))
    bias = normal(outputs).to(device, dtype) if with_bias else None
    decoded = dequantize(weight, scale, dtype)
    return Case(
        name=f"{rows} x {channels} -> {outputs}{', bias' if with_bias else ''}",
        dtype=dtype,
        run=lambda backend: (linear_fp8(x, weight, scale, bias, backend=backend),),
        exact=lambda: (linear_fp8_ref(x, weight, scale, bias),),
        eager=lambda: (F.linear(x, decoded, bias),),
        num_bytes=weight.numel() + (x.numel() + rows * outputs) * dtype.itemsize,
        num_flops=2 * rows * channels * outputs,
    )
