"""patch_embed: the vision tower's first product, straight from frames.

    out[p, o] = sum_k patchify(jobs)[p, k] weight[o, k] + bias[o]

The normalisation can move into the weight, because pixel values 0..255 are exact in every type:

    folded[o, k] = round(weight[o, k] / s_c),  folded_bias[o] = bias[o] - sum_k folded[o, k] m_c
    out[p, o] = sum_k pixels[p, k] folded[o, k] + folded_bias[o]

The bias comes from the rounded weight: 1.0 to 1.25 times the error of rounded rows, and 2 to 11
times with that of the unrounded one. Not so in float32, where sums of pixels up to 255 that cancel
would cost twice the error of sums of normalised values: nothing folds there.

Backends: "cpu" makes rows in strips that stay in cache; "triton" keeps pixels as bytes between two
kernels and folds; "unfused" is patchify in the weight's type, then a product. The ones that fold
run on a GPU by name only: why, docs/ops.md says.

Legend: P patch rows, T merged tokens (P / 4), O outputs, K values of a row
(1176 or 1536).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtts_rt.config import backend_override
from vtts_rt.ops import cuda_core, native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_refuses, triton_supports
from vtts_rt.ops.linear import linear, linear_ref
from vtts_rt.ops.patch_jobs import Batch, PatchifyJob, checked, launch, mean_and_std, too_many
from vtts_rt.ops.patchify import patchify, patchify_ref
from vtts_rt.types import Geometry, require

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FOLDING = {"triton", "cuda"}


def fold_patch_embed(
    weight: Tensor, geometry: Geometry, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A weight (O, K) and bias (O,) for pixels: (folded, folded_bias) of the file's head, in the
    weight's dtype and in float32, both contiguous."""
    values = mean_and_std(geometry, weight.device)
    mean, std = values.repeat_interleave(geometry.row_size // 3, dim=1)
    folded = (weight.detach().float() / std).to(weight.dtype).contiguous()
    moved = folded.double() @ mean.double()
    return folded, (-moved if bias is None else bias.detach().double() - moved).float()


class PatchEmbedWeight:
    """A weight and bias, folded when a backend first asks for it and again when they change.

    weight: (O, K) float32, float16 or bfloat16; geometry: of the rows; bias: (O,), same dtype and
    device as weight, or None. ValueError for another shape, dtype or device.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> None:
        shape, row_size = tuple(weight.shape), geometry.row_size
        usable = weight.dim() == 2 and shape[1] == row_size and weight.dtype in _DTYPES
        rule = f"(O, {row_size}) float32, float16 or bfloat16"
        require("patch_embed", "weight", f"{shape} {weight.dtype}", usable, rule)
        if bias is not None:
            alike = (bias.shape, bias.dtype, bias.device)
            usable = alike == (weight.shape[:1], weight.dtype, weight.device)
            got = f"{tuple(bias.shape)} {bias.dtype} on {bias.device}"
            rule = f"({shape[0]},) {weight.dtype} on {weight.device}"
            require("patch_embed", "bias", got, usable, rule)
        self.weight = weight
        self.geometry = geometry
        self.bias = bias
        self._folded: tuple[Tensor, Tensor] | None = None
        self._state: tuple[object, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.weight, self.bias) if x is not None]

    def folded(self) -> tuple[Tensor, Tensor]:
        """`fold_patch_embed` of weight and bias as they are now."""
        state = tuple(
            (x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version) for x in self.tensors
        )
        if self._folded is None or state != self._state:
            self._folded = fold_patch_embed(self.weight, self.geometry, self.bias)
            self._state = state
        return self._folded


def patch_embed_ref(
    jobs: Sequence[PatchifyJob], embed: PatchEmbedWeight, *, places: Tensor | None = None
) -> Tensor:
    """Official float32 rows times the weight in float64: the yardstick of the backends. Returns
    (P, O) float64 on the weight's device."""
    rows = patchify_ref(jobs, embed.geometry, places=places)
    return linear_ref(rows.to(embed.weight.device), embed.weight, embed.bias)


def _native(
    batch: Batch, embed: PatchEmbedWeight, places: Tensor | None, num_threads: int
) -> Tensor:
    from vtts_rt import _C

    out = torch.empty(batch.num_rows, len(embed.weight))
    _C.patch_embed(
        batch.items(),
        embed.weight.detach().numpy(),
        None if embed.bias is None else embed.bias.detach().numpy(),
        out.numpy(),
        batch.geometry.patch_px,
        *batch.mean_and_std(),
        num_threads=num_threads or torch.get_num_threads(),
    )
    if places is None:
        return out
    tokens = out.view(len(places), -1)
    return torch.empty_like(tokens).index_copy_(0, places.long(), tokens).view(out.shape)


def _native_refuses(batch: Batch, embed: PatchEmbedWeight, *rest: object) -> str | None:
    if not all(x.is_contiguous() for x in embed.tensors):
        return "a weight or bias that is not contiguous"
    return native.refusal(*embed.tensors)


def _triton(
    batch: Batch, embed: PatchEmbedWeight, places: Tensor | None, num_threads: int
) -> Tensor:
    from vtts_rt.kernels import patch_embed as kernel

    shape = batch.num_rows, batch.geometry.row_size
    pixels = torch.empty(shape, dtype=torch.uint8, device=batch.device)
    launch(batch, places, pixels)
    with torch.cuda.device_of(pixels):  # type: ignore[no-untyped-call]
        return kernel.patch_embed(pixels, *embed.folded())  # type: ignore[no-any-return]


def _cuda(batch: Batch, embed: PatchEmbedWeight, places: Tensor | None, num_threads: int) -> Tensor:
    return cuda_core.patch_embed(batch, places, *embed.folded())


def _unfused(
    batch: Batch, embed: PatchEmbedWeight, places: Tensor | None, num_threads: int
) -> Tensor:
    dtype = embed.weight.dtype
    rows = patchify(batch.jobs, batch.geometry, dtype=dtype, places=places, num_threads=num_threads)
    return linear(rows, embed.weight, embed.bias)


def _folding_refuses(batch: Batch, embed: PatchEmbedWeight, *rest: object) -> str | None:
    if embed.weight.dtype is torch.float32:
        return "float32, which folding would make less exact"
    return triton_refuses(*embed.tensors) or too_many(batch)


_OP = register(
    "patch_embed",
    Backend("cpu", native.supports, _native, _native_refuses),
    Backend("unfused", anything, _unfused),
    Backend("triton", triton_supports, _triton, _folding_refuses),
    Backend("cuda", cuda_core.supports, _cuda, _folding_refuses),
)


def numerics(weight: Tensor) -> str:
    """Which results "auto" gives for `weight`: "rows" where official rows are multiplied
    for any number of them, "folded" where VTTS_RT_BACKEND names a backend that folds."""
    wide = weight.dtype is torch.float32
    return "folded" if backend_override("patch_embed") in _FOLDING and not wide else "rows"


def patch_embed(
    jobs: Sequence[PatchifyJob],
    embed: PatchEmbedWeight,
    *,
    places: Tensor | None = None,
    backend: str = "auto",
    num_threads: int = 0,
) -> Tensor:
    """linear(patchify(jobs, embed.geometry), embed.weight, embed.bias).

    embed: on the device of the jobs' frames; one for all calls, as it folds once.
    places, num_threads: of `patchify`; rows of the result move as its rows do.
    backend: "auto", "cpu" (native: float32 on the CPU, contiguous, no gradient wanted; the bits of
        native patchify and linear), "unfused", "triton" or "cuda" (CUDA frames, 16-bit weights, no
        gradient wanted; the latter with O a multiple of 8). "auto" on a CPU takes the native one
        where it can, else "unfused".

    Returns (P, O) of weight's dtype and device; (0, O) without jobs.
    Raises ValueError on jobs as `patchify` does, on a weight of another device and on tensors that
    a backend asked for by name does not take, RuntimeError on an unusable backend.
    """
    on = embed.weight.device
    batch = checked("patch_embed", jobs, embed.geometry, places)
    require("patch_embed", "num_threads", num_threads, num_threads >= 0, ">= 0")
    chosen, _ = _OP.choose(on.type, backend, batch, embed)
    if not jobs:
        return embed.weight.new_empty(0, len(embed.weight))
    require("patch_embed", "weight", f"on {on}", on == batch.device, f"on {batch.device} as frames")
    out: Tensor = chosen.run(batch, embed, places, num_threads)
    return out
