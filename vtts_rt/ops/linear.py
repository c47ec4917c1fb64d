"""linear: rows times a matrix of weights.

    out[n, o] = scale[o] * sum_c x[n, c] * weight[o, c] + bias[o]

Weights are of the rows' type, or int8 with a scale for each output: a quarter of the bytes of
float32, half of bfloat16. The only error beside that of a product is then the rounding of the
weights, once.

The native kernel sums in float32 and rounds once. Few rows (decoding): the cost is reading the
weights, which it does once for all rows. Many (prefill, vision tower): the cost is arithmetic. It
reads weights in panels (`vtts_rt.ops.packed`): of one that is not packed it makes them on the way,
which gives the same bits, but takes a time of its own.

A row's values are the same to the bit whatever other rows stand beside it and however many threads
run.

Legend: N rows, C input channels, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register
from vtts_rt.ops.packed import PANEL, Matrix, channels_together, pack
from vtts_rt.ops.quantized import exact_product, product_in_parts, scaled
from vtts_rt.types import require

LARGEST = 127.0  # of int8 weights: -128 is not used, they are symmetric


def linear_ref(x: Tensor, weight: Tensor | Matrix, bias: Tensor | None = None) -> Tensor:
    """The equation in float64: the yardstick of the backends. Returns (..., O) float64."""
    matrix = _matrix(weight)
    scale = matrix.scale
    ones = torch.ones(matrix.num_outputs, device=x.device)
    return exact_product(x, matrix.plain(), ones if scale is None else scale, bias)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest weights in bytes, each output's largest at 127: of these is `Matrix.of`.

    weight: (O, C) any float dtype, finite. Returns (weight8 (O, C) int8, scale (O,) float32):
    weight is about scale[:, None] * weight8, off by at most half a scale.
    """
    wide, scale = scaled("quantize_int8", weight, LARGEST)
    return wide.round().to(torch.int8), scale


def _matrix(weight: Tensor | Matrix) -> Matrix:
    return weight if isinstance(weight, Matrix) else Matrix.of(weight)


def _torch(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    if matrix.scale is None:
        return F.linear(x, matrix.plain(), bias)
    return product_in_parts(x, matrix.plain(), matrix.scale, bias)


def _native(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    from vtts_rt import _C

    if matrix.scale is not None and not matrix.packed:
        matrix = matrix._replace(tensor=pack(matrix.tensor))
    rows = native.rows_of(x)
    out = x.new_empty((*x.shape[:-1], matrix.num_outputs))
    _C.linear(
        *(rows.data_ptr(), rows.stride(0), matrix.address, native.address(matrix.scale)),
        *(native.address(bias), out.data_ptr(), *rows.shape, matrix.num_outputs),
        *(native.STORAGE[x.dtype], matrix.weight_dtype, matrix.packed),
        *(torch.get_num_threads(), "auto"),
    )
    return out


def native_refuses(x: Tensor, matrix: Matrix, bias: Tensor | None) -> str | None:
    weight, scale = matrix.tensor, matrix.scale
    wide = weight if scale is None else None
    if (why := native.refusal(x, bias, wide, dtypes=native.STORAGE)) is not None:
        return why
    own = [t for t in (weight, scale, bias) if t is not None]
    if not all(t.is_cpu and t.is_contiguous() for t in own):
        return "a weight or bias that is not contiguous on the CPU"
    together = channels_together(weight.dtype)
    if weight.data_ptr() % (together * weight.element_size()):
        return "a weight that is not aligned"
    if weight.shape[3] != together if matrix.packed else weight.shape[1] % together:
        return f"channels of {matrix.weight_dtype} that are not {together} and {together} together"
    return None


_OP = register(
    "linear",
    Backend("cpu", native.supports, _native, native_refuses),
    Backend("torch", anything, _torch),
)


def packs(matrix: Matrix) -> bool:
    """Whether products here gain from packing a matrix that is not: native ones would run."""
    weight = matrix.tensor
    (first, *_), _ = _OP.resolve(weight.device.type)
    known = first.name == "cpu" and weight.dtype in (*native.STORAGE, torch.int8)
    even = weight.shape[1] % channels_together(weight.dtype) == 0
    return known and even and not matrix.packed and weight.is_contiguous()


def linear(
    x: Tensor, weight: Tensor | Matrix, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """x (scale weight)^T + bias.

    x: (..., C); weight: (O, C) of x's dtype, or a Matrix: packed, or int8 with a scale; bias: (O,)
        of x's dtype or None; all on one device.
    backend: "auto", "cpu" (native: float32 or bfloat16 on the CPU, weight and bias contiguous, no
        gradient wanted, an even C in bfloat16) or "torch" (unpacks a packed weight, and turns int8
        into x's dtype, for every call).

    Returns (..., O) in x's dtype.
    Raises ValueError on shapes that do not match and on tensors that a backend asked for by name
    does not take, RuntimeError on an unusable backend.
    """
    matrix = _matrix(weight)
    num_outputs, num_channels = matrix.shape
    if len(matrix.tensor) != (-(-num_outputs // PANEL) if matrix.packed else num_outputs):
        require("linear", "weight", tuple(matrix.tensor.shape), False, f"of {num_outputs} outputs")
    if x.dim() < 1 or x.shape[-1] != num_channels:
        require("linear", "x", tuple(x.shape), False, f"(..., C) for weight {matrix.shape}")
    if bias is not None and bias.shape != (num_outputs,):
        require("linear", "bias", tuple(bias.shape), False, f"({num_outputs},)")
    scale = matrix.scale
    if (matrix.tensor.dtype is torch.int8) != (scale is not None):
        require("linear", "scale", scale, False, "given with int8 weights only")
    if scale is not None and (scale.shape != (num_outputs,) or scale.dtype is not torch.float32):
        got = (*scale.shape, scale.dtype)
        require("linear", "scale", got, False, f"({num_outputs},) float32")
    out: Tensor = _OP(x.device.type, backend, x, matrix, bias)
    return out
