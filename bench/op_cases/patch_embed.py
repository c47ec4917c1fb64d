"""patch_embed: frames to the vision tower's first features, against official rows and a product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from op_cases.case import DTYPES, Build, Case, Scale, bench_dtype, built_later
from op_cases.patchify import LOOKS, Look, jobs_of, num_source_bytes, places_of
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.ops.linear import linear
from vtts_rt.ops.patch_embed import PatchEmbedWeight, patch_embed, patch_embed_ref
from vtts_rt.ops.patch_jobs import num_rows
from vtts_rt.ops.patchify import patchify
from vtts_rt.types import ResizeKernel

# Of Qwen2.5-VL's tower, and of the 118 M bench model's.
OUTPUTS = {"cuda": 1280, "cpu": 384}


def cases(device: str, scale: Scale) -> Iterator[Build]:
    """At "check" scale odd numbers of outputs, with a bias and another order of tokens."""
    if scale == "check":
        looks = LOOKS["check"]
        for name in ("as it is, one frame twice", "several"):
            for dtype in DTYPES:
                yield _case(name, looks[name], ["float"], device, dtype, 37)
        for dtype in (torch.float16, torch.bfloat16):
            yield _case("several", looks["several"], ["fixed", "pil", "float"], device, dtype, 40)
        yield _case("one pixel up", looks["one pixel up"], [], device, torch.float16, 1)
        return
    for name, seen in LOOKS[device].items():
        yield _case(name, seen, [], device, bench_dtype(device), OUTPUTS[device], False)


def _refused(dtype: torch.dtype, num_outputs: int) -> tuple[str, ...]:
    """Backends that fold take 16-bit types, the CUDA one eight outputs at a time."""
    if dtype is torch.float32:
        return ("triton", "cuda")
    return ("cuda",) if num_outputs % 8 else ()


@built_later
def _case(
    name: str,
    looks: Sequence[Look],
    resize: Sequence[ResizeKernel],
    device: str,
    dtype: torch.dtype,
    num_outputs: int,
    awkward: bool = True,
) -> Case:
    jobs = jobs_of(looks, device, *resize)
    generator = torch.Generator().manual_seed(num_outputs)
    # Rows are about 1 in size: so are the products.
    row_size = GEOMETRY.row_size
    weight = torch.randn(num_outputs, row_size, generator=generator) / row_size**0.5
    weight = weight.to(device, dtype)
    bias = torch.randn(num_outputs, generator=generator).to(device, dtype) if awkward else None
    places = places_of(jobs, device) if awkward else None
    embed = PatchEmbedWeight(weight, GEOMETRY, bias)

    def run(backend: str) -> tuple[Tensor]:
        return (patch_embed(jobs, embed, places=places, backend=backend),)

    def eager() -> tuple[Tensor]:
        rows = patchify(jobs, GEOMETRY, dtype=dtype, places=places)
        return (linear(rows, weight, bias, backend="torch"),)

    rows = num_rows(jobs, GEOMETRY)
    return Case(
        name=f"{name} x {num_outputs}",
        dtype=dtype,
        run=run,
        exact=lambda: (patch_embed_ref(jobs, embed, places=places),),
        eager=eager,
        num_bytes=num_source_bytes(jobs) + (weight.numel() + rows * num_outputs) * dtype.itemsize,
        native=(torch.float32,),
        num_flops=2 * rows * row_size * num_outputs,
        without=_refused(dtype, num_outputs),
    )
