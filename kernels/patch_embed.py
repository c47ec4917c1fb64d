"""patch_embed's product: pixels of patch rows times a weight that holds the normalisation (the
folded one of vtts_rt/ops/patch_embed.py).

Pixels are bytes, as kernels/patchify.py makes them: exact in every type, and converted in
registers, so that no normalised row is ever in memory. At O = 1280 the product is 2 x 1176 x 1280
operations a row, about 3 ns of an H100's tensor cores; writing and reading a row's bytes is 0.8 ns
of its memory if nothing of them were left in L2, and 1.6 ns with bfloat16 rows.

Legend: P patch rows, O outputs, K values of a row (1176 or 1536). Sums in float32.
"""

import torch
import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # blocks of rows that share a block of the weight while it is in L2
LARGE = {"ROWS": 128, "OUTPUTS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 3}
# A pass of a pair or two has too few large blocks for all multiprocessors.
SMALL = {"ROWS": 64, "OUTPUTS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 4}
MANY_BLOCKS = 132  # multiprocessors of an H100


@triton.jit
def patch_embed_kernel(
    pixel_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    PATCH_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """pixels: contiguous (P, K) uint8; weight: contiguous (O, K); bias: (O,) float32;
    out: contiguous (P, O) of weight's type."""
    block = tl.program_id(0)
    down, across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_outputs, OUTPUTS)
    first = block // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = block % (GROUP * across)
    row = ((first + inside % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = inside // height * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, COLUMNS)
    pixels = pixel_ptr + row[:, None] * PATCH_ROW + column[None, :]
    weights = weight_ptr + output[None, :] * PATCH_ROW + column[:, None]
    real_rows, real_outputs = row < num_rows, output < num_outputs
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for begin in range(0, PATCH_ROW, COLUMNS):
        real = begin + column < PATCH_ROW
        x = tl.load(pixels + begin, mask=real_rows[:, None] & real[None, :], other=0)
        w = tl.load(weights + begin, mask=real[:, None] & real_outputs[None, :], other=0.0)
        FACTOR: tl.constexpr = tl.float32 if WIDE else w.dtype
        total = tl.dot(x.to(FACTOR), w.to(FACTOR), total, input_precision="ieee")
    total += tl.load(bias_ptr + output, mask=real_outputs, other=0.0)[None, :]
    to = out_ptr + row[:, None] * num_outputs + output[None, :]
    mask = real_rows[:, None] & real_outputs[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=mask)


def patch_embed(pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """pixels: contiguous (P, K) uint8; weight: contiguous (O, K) float16 or bfloat16;
    bias: contiguous (O,) float32. Returns (P, O) of weight's dtype."""
    num_rows, num_outputs = len(pixels), len(weight)
    out = torch.empty((num_rows, num_outputs), dtype=weight.dtype, device=weight.device)

    def num_blocks(blocks: dict) -> int:
        return triton.cdiv(num_rows, blocks["ROWS"]) * triton.cdiv(num_outputs, blocks["OUTPUTS"])

    blocks = LARGE if num_blocks(LARGE) >= MANY_BLOCKS else SMALL
    if out.numel() > 0:
        wide = triton.knobs.runtime.interpret  # it would multiply the bits of bfloat16
        sizes = {"PATCH_ROW": weight.shape[1], "WIDE": wide}
        patch_embed_kernel[(num_blocks(blocks),)](
            pixels, weight, bias, out, num_rows, num_outputs, **sizes, **blocks
        )
    return out
