"""The tokens and log-probabilities of vtts_rt/ops/sampling.py, with the counter-based noise of
numpy's Philox and a softmax of logits / temperature (temperature 0: of the logits themselves).

A first kernel does a chunk of a row, a second one merges a row's chunks.

Legend: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl

# Tokens of one program: 8 for each of 128 lanes, 16 bytes of bfloat16. 151,936 tokens make 149
# programs a row, enough for a whole GPU.
BLOCK = 1024
NUM_WARPS = 4

# Philox4x64-10: multipliers and key increments of Salmon et al., "Parallel random numbers: as easy
# as 1, 2, 3" (2011), table 2 and section 4, as numpy.random.Philox has them.
_MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)
_MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
_WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
_WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint64 words of the counters (c0, c1, c2, c3) with the keys (k0, k1), ten rounds."""
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(c0, _MULTIPLIER_0), c0 * _MULTIPLIER_0
        high_1, low_1 = tl.umulhi(c2, _MULTIPLIER_1), c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _WEYL_0, k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def gumbel(first, seed, member, round_index, position, BLOCK: tl.constexpr):
    """(BLOCK,) float32 noise of the tokens from `first` (a multiple of 4) on: a numpy Generator's
    doubles of Philox(key=(seed, member), counter=(0, 0, round, position)), four to a counter, which
    numpy raises before it draws."""
    counter = (first // 4 + 1 + tl.arange(0, BLOCK // 4)).to(tl.uint64)
    zero = counter * 0
    w0, w1, w2, w3 = philox(
        counter,
        zero,
        zero + round_index.to(tl.uint64),
        zero + position.to(tl.uint64),
        zero + seed.to(tl.uint64),
        zero + member.to(tl.uint64),
    )
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # Powers of two: the product is exact, the sum rounds as in ops/sampling.py.
    uniform = (bits >> 11).to(tl.float64) * 2.0**-53 + 2.0**-54
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def chunk_kernel(
    logits_ptr,
    temperature_ptr,
    seed_ptr,
    member_ptr,
    round_ptr,
    position_ptr,
    best_ptr,
    max_ptr,
    sum_ptr,
    row_stride,
    size,
    num_chunks,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """logits: (N, V), rows row_stride apart; temperature .. position: (N,). best: (N, chunks)
    int64, the largest score with noise, as an integer in the same order, above the token counted
    from the end; max, sum: (N, chunks) float32 of the scores, sum of exp(score - max).
    DIVIDE: whether the logits still have to be divided by their temperature."""
    chunk = tl.program_id(0) % num_chunks
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    place = logits_ptr + row * row_stride + token
    score = tl.load(place, mask=inside, other=-float("inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if DIVIDE:
        divisor = tl.where(temperature > 0, temperature, 1.0)
        score = tl.div_rn(score, tl.full((BLOCK,), divisor, tl.float32))
    noisy = score
    if temperature > 0:
        seed, member = tl.load(seed_ptr + row), tl.load(member_ptr + row)
        round_index, position = tl.load(round_ptr + row), tl.load(position_ptr + row)
        noisy = score + gumbel(chunk * BLOCK, seed, member, round_index, position, BLOCK)

    # Integers in the order of floats, so that one maximum also finds the first of equals: -0 is 0,
    # a NaN is above everything, as for torch.argmax.
    bits = tl.where(noisy == 0, 0.0, noisy).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(noisy != noisy, 0x7FFFFFFF, order)
    best = (order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    best = tl.max(tl.where(inside, best, -0x8000000000000000), axis=0)

    largest = tl.max(score, axis=0)
    base = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(tl.exp(score - base), axis=0)
    out = row * num_chunks + chunk
    tl.store(best_ptr + out, best)
    tl.store(max_ptr + out, largest)
    tl.store(sum_ptr + out, total)


@triton.jit
def merge_kernel(
    logits_ptr,
    temperature_ptr,
    best_ptr,
    max_ptr,
    sum_ptr,
    token_ptr,
    logprob_ptr,
    row_stride,
    num_chunks,
    DIVIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """token: (N,) int64, logprob: (N,) float32, of what `chunk_kernel` left of each row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    place = row * num_chunks + chunk
    best = tl.max(tl.load(best_ptr + place, mask=inside, other=-0x8000000000000000), axis=0)
    largest = tl.load(max_ptr + place, mask=inside, other=-float("inf"))
    base = tl.max(largest, axis=0)
    base = tl.where(base == -float("inf"), 0.0, base)
    sums = tl.load(sum_ptr + place, mask=inside, other=0.0)
    total = tl.sum(sums * tl.exp(largest - base), axis=0)

    token = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    score = tl.load(logits_ptr + row * row_stride + token).to(tl.float32)
    if DIVIDE:
        temperature = tl.load(temperature_ptr + row)
        score = tl.div_rn(score, tl.where(temperature > 0, temperature, 1.0))
    tl.store(token_ptr + row, token)
    tl.store(logprob_ptr + row, score - base - tl.log(total))


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    coordinates: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    divide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: (N, V), V adjacent and at least 1; temperatures: (N,) float32; seeds and coordinates
    (members, rounds, positions): (N,) int64, contiguous. divide: False where the logits have been
    divided by their temperature.
    Returns tokens (N,) int64 and log-probabilities (N,) float32."""
    num_rows, size = logits.shape
    num_chunks = triton.cdiv(size, BLOCK)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=logits.device)

    chosen = empty(torch.int64), empty(torch.float32)
    if num_rows > 0:
        scores, stride = (logits, temperatures), logits.stride(0)
        types = (torch.int64, torch.float32, torch.float32)  # best, largest, sums
        left = [empty(dtype, num_chunks) for dtype in types]
        flags = {"DIVIDE": divide, "num_warps": NUM_WARPS}
        chunk_kernel[(num_rows * num_chunks,)](
            *scores, seeds, *coordinates, *left, stride, size, num_chunks, BLOCK=BLOCK, **flags
        )
        chunks = triton.next_power_of_2(num_chunks)
        merge_kernel[(num_rows,)](
            *scores, *left, *chosen, stride, num_chunks, CHUNKS=chunks, **flags
        )
    return chosen
