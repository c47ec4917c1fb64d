"""Attention inside segments of rows (vtts_rt/ops/segment_attention.py): a program takes a block of
one segment's queries and a head.

Segments of all lengths go in one launch: a table says where each block of queries and its segment
are. Softmax is online, in float32; weights are rounded to v's type for the tensor cores.

A head of 80 features would fill 62 % of a tile of 128: it is taken as 64 and 16.

Legend: P rows, H heads, D head dim, B blocks of queries.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
MAX_HEAD_DIM = 128  # beyond, the larger tiles do not fit into shared memory
WINDOW = 64  # rows of a vision tower's window; longer segments take larger blocks


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def segment_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    out_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    scale,
    DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """q, k, v: features adjacent, row and head strides count elements. table: (B, 3) int32, a
    block's first row and its segment's first row and end. out: (P, H, D), packed heads. scale:
    1 / sqrt(D) in units of log(2). Features [0, LOW) and [LOW, LOW + HIGH), HIGH maybe 0."""
    table = table_ptr + tl.program_id(0) * 3
    begin, first, end = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    head = tl.program_id(1).to(tl.int64)
    row = (begin + tl.arange(0, QUERIES)).to(tl.int64)[:, None]
    low, high = tl.arange(0, LOW)[None, :], LOW + tl.arange(0, HIGH if HIGH else 1)[None, :]
    queries = q_ptr + row * q_row + head * q_head
    query = tl.load(queries + low, mask=(row < end) & (low < DIM), other=0.0)
    out = tl.zeros([QUERIES, LOW], tl.float32)
    if HIGH:
        query_high = tl.load(queries + high, mask=(row < end) & (high < DIM), other=0.0)
        out_high = tl.zeros([QUERIES, HIGH], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(first, end, KEYS):
        j = start + tl.arange(0, KEYS)
        other = j.to(tl.int64)[:, None]
        keys = k_ptr + other * k_row + head * k_head
        key = tl.load(keys + low, mask=(other < end) & (low < DIM), other=0.0)
        scores = _dot(query, tl.trans(key), tl.zeros([QUERIES, KEYS], tl.float32), WIDE)
        if HIGH:
            key = tl.load(keys + high, mask=(other < end) & (high < DIM), other=0.0)
            scores = _dot(query_high, tl.trans(key), scores, WIDE)
        scores = tl.where((j < end)[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))  # finite: every block has a key
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        values = v_ptr + other * v_row + head * v_head
        value = tl.load(values + low, mask=(other < end) & (low < DIM), other=0.0)
        weights = weights.to(value.dtype)
        out = _dot(weights, value, out * shrink[:, None], WIDE)
        if HIGH:
            value = tl.load(values + high, mask=(other < end) & (high < DIM), other=0.0)
            out_high = _dot(weights, value, out_high * shrink[:, None], WIDE)
    to = out_ptr + row * out_row + head * DIM
    kind = out_ptr.dtype.element_ty
    tl.store(to + low, (out / total[:, None]).to(kind), mask=(row < end) & (low < DIM))
    if HIGH:
        out_high = (out_high / total[:, None]).to(kind)
        tl.store(to + high, out_high, mask=(row < end) & (high < DIM))


def split_features(dim: int) -> tuple[int, int]:
    """Tiles (LOW, HIGH) of at least 16 that hold `dim` features; HIGH is 0 where one is enough."""
    one = max(16, triton.next_power_of_2(dim))
    rest = dim - one // 2
    high = max(16, triton.next_power_of_2(rest)) if one > 16 else one
    return (one // 2, high) if one // 2 + high < one else (one, 0)


def blocks(dtype: torch.dtype, longest: int) -> dict:
    """Fixed choices. float32 has no tensor cores: small tiles, sums in registers. A block of 128
    queries reads keys half as often; a window would leave half of it empty."""
    if dtype == torch.float32:
        return {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 2}
    if longest <= WINDOW:
        return {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 1}
    return {"QUERIES": 128, "KEYS": 64, "num_warps": 8, "num_stages": 3}


def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, longest: int
) -> torch.Tensor:
    """q, k, v: (P, H, D) of one dtype, D adjacent and at most MAX_HEAD_DIM; table: contiguous
    (B, 3) int32 on their device, made for blocks(dtype, longest); longest: rows of the longest
    segment. Returns (P, H * D)."""
    num_rows, num_heads, dim = q.shape
    out = torch.empty((num_rows, num_heads * dim), dtype=q.dtype, device=q.device)
    low, high = split_features(dim)
    if out.numel() > 0:
        strides = (stride for x in (q, k, v) for stride in x.stride()[:2])
        segment_attention_kernel[(len(table), num_heads)](
            *(q, k, v, table, out),
            *(*strides, out.stride(0)),
            dim**-0.5 * LOG2_E,
            DIM=dim,
            LOW=low,
            HIGH=high,
            WIDE=triton.knobs.runtime.interpret,  # it would multiply the bits of bfloat16
            **blocks(q.dtype, longest),
        )
    return out
