"""gelu: hidden channels of the vision towers and their mergers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from vtts_rt.ops.gelu import Form, gelu, gelu_ref

# Rows, channels, form: mergers of Qwen2.5-VL, blocks of Qwen3-VL and Qwen2-VL.
SHAPES: dict[Scale, tuple[tuple[int, int, Form], ...]] = {
    "check": ((1, 40, "exact"), (3, 1027, "exact"), (3, 1027, "tanh"), (3, 1027, "sigmoid")),
    "bench": ((512, 5120, "exact"), (2048, 4304, "tanh"), (2048, 5120, "sigmoid")),
}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """Rows x channels; at "check" scale values of any size."""
    check = scale == "check"
    for shape in SHAPES[scale]:
        for dtype in DTYPES if check else (bench_dtype(device),):
            for size in (1.0, 60.0) if check else (1.0,):
                yield _case(device, dtype, *shape, size)


@built_later
def _case(
    device: str, dtype: torch.dtype, rows: int, channels: int, form: Form, size: float
) -> Case:
    generator = torch.Generator().manual_seed(rows * 7919 + channels)
    x = (size * torch.randn(rows, channels, generator=generator)).to(device, dtype)
    return Case(
        name=f"{rows} x {channels}, {form}, values about {size:g}",
        dtype=dtype,
        run=lambda backend: (gelu(x, form, backend=backend),),
        exact=lambda: (gelu_ref(x, form),),
        eager=lambda: (gelu(x, form, backend="torch"),),
        num_bytes=2 * rows * channels * dtype.itemsize,
        num_flops=20 * rows * channels,
    )
