"""The product of vtts_rt/ops/linear_fp8.py: rows times e4m3 floats with a scale for each output.

Weights are read as bytes and decoded by bit arithmetic, which is exact and works on every GPU: the
byte's exponent and mantissa, moved into those of a float32, are the value times 2^-120.

Legend: N rows, C input channels, O outputs. Sums in float32, rounded once when stored.
"""

import torch
import triton
import triton.language as tl

# One row: the weights' bytes are the cost. 4 outputs x 1024 channels a step are 32 bytes for each
# of 128 lanes, and 3584 outputs are 896 programs, 6 to 7 on each of an H100's 132 processors.
ROW_OUTPUTS, ROW_CHANNELS, ROW_WARPS = 4, 1024, 4


@triton.jit
def decode(byte):
    """uint8 e4m3 -> its float32 value. Subnormal bytes are subnormal float32 on the way."""
    bits = byte.to(tl.int32)
    bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def row_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    num_channels,
    num_outputs,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x: (C,), weight: (O, C) bytes, scale, bias, out: (O,)."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < num_outputs
    weights = weight_ptr + output.to(tl.int64)[:, None] * num_channels
    total = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    for start in range(0, num_channels, CHANNELS):
        # In eights, as x: a layout for both, or x would cross the lanes in every step.
        channel = tl.max_contiguous(start + tl.arange(0, CHANNELS), 8)
        is_channel = channel < num_channels
        inside = is_output[:, None] & is_channel[None, :]
        weight = tl.load(weights + channel[None, :], mask=inside, other=0)
        x = tl.load(x_ptr + channel, mask=is_channel, other=0.0)
        total += decode(weight) * x.to(tl.float32)[None, :]
    out = tl.sum(total, axis=1) * tl.load(scale_ptr + output, mask=is_output, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, out.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit
def tile_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    num_rows,
    num_channels,
    num_outputs,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x: (N, C), rows x_stride apart; weight: (O, C) bytes; scale, bias: (O,); out: (N, O). Tiles
    of the same outputs run side by side, so that their weights come from memory once. WIDE: the
    product is one of float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = row < num_rows, output < num_outputs
    rows = x_ptr + row.to(tl.int64)[None, :] * x_stride
    weights = weight_ptr + output.to(tl.int64)[:, None] * num_channels
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(0, num_channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        is_channel = channel < num_channels
        inside = is_output[:, None] & is_channel[None, :]
        weight = tl.load(weights + channel[None, :], mask=inside, other=0)
        inside = is_channel[:, None] & is_row[None, :]
        x = tl.load(rows + channel[:, None], mask=inside, other=0.0)
        if WIDE:
            x = x.to(tl.float32)
        # Every e4m3 value is a value of x's type, too. "ieee": no TF32 for float32.
        total = tl.dot(decode(weight).to(x.dtype), x, total, input_precision="ieee")
    scale = tl.load(scale_ptr + output, mask=is_output, other=0.0)
    total *= scale[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + output, mask=is_output, other=0.0)
        total += bias.to(tl.float32)[:, None]
    place = out_ptr + row.to(tl.int64)[None, :] * num_outputs + output[:, None]
    inside = is_output[:, None] & is_row[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


def tile(num_rows: int) -> dict[str, int]:
    """Tiles for a number of rows: constants of the kernel and Triton's options.

    Up to 16 rows bytes count: small tiles for many programs, 4 KB of weights a step and 4 steps
    under way. With more arithmetic does, too: the larger a tile, the fewer reads of the same rows.
    """
    if num_rows <= 16:
        sizes = {"ROWS": 8 if num_rows <= 8 else 16, "OUTPUTS": 32, "CHANNELS": 128}
        return {**sizes, "num_warps": 2, "num_stages": 4}
    return {"ROWS": 64, "OUTPUTS": 128, "CHANNELS": 64, "num_warps": 4, "num_stages": 3}


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x: (N, C), C adjacent and at least 1; weight: (O, C) uint8, the bytes of e4m3 values; scale:
    (O,) float32; bias: (O,) or None; all but x contiguous. Returns (N, O) in x's dtype."""
    num_rows, num_channels = x.shape
    num_outputs = weight.shape[0]
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    pointers = (x, weight, scale, scale if bias is None else bias, out)
    has_bias = bias is not None
    if num_rows == 1 and num_outputs > 0:
        blocks = {"OUTPUTS": ROW_OUTPUTS, "CHANNELS": ROW_CHANNELS, "num_warps": ROW_WARPS}
        row_kernel[(triton.cdiv(num_outputs, ROW_OUTPUTS),)](
            *pointers, num_channels, num_outputs, HAS_BIAS=has_bias, **blocks
        )
    elif out.numel() > 0:
        blocks, sizes = tile(num_rows), (x.stride(0), num_rows, num_channels, num_outputs)
        grid = (triton.cdiv(num_rows, blocks["ROWS"]), triton.cdiv(num_outputs, blocks["OUTPUTS"]))
        wide = triton.knobs.runtime.interpret  # it would multiply the bits of bfloat16
        tile_kernel[grid](*pointers, *sizes, HAS_BIAS=has_bias, WIDE=wide, **blocks)
    return out
