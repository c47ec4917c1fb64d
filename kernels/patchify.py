"""patchify: crops of frames -> bicubic resize -> normalise -> patch rows, all jobs in one launch.

A program makes one merged token (28 x 28 or 32 x 32 px) of one frame after the other. The source
rows of a token are first resized along x into a piece of memory that only this program uses, then
along y from there. Those pieces are about 5 kB each, 1,056 of them on an H100, and stay in its
caches: two kernels with the batch's half-resized frames between them would send 2 x 1.3 bytes a
value through memory (32 frames of 1280x720 make 70 MB of them), where the whole operation reads
s^2 = 1.6 bytes of source a value at scale s = 1.27 and writes 2 (bfloat16) or 4 (float32). The
price is that source rows at a token's upper and lower edge are resized along x twice, 1.14 times
the work.

Not measured yet. Counting instructions (about 80 a value, most of them byte loads and
multiply-adds of 6 taps along x and 6 along y) it should reach 70 % of an H100's copy bandwidth
with float32 rows and 45 % with bfloat16: arithmetic is the limit, and the packed dot products that
would lift it are not to be had in Triton.

FIXED jobs (resize kernels "fixed" and "pil", which differ in their tap tables only) sum integers in
int32 and round to uint8 after either axis; the others ("float") take float32 fused multiply-adds
along both and round once, half to even. All bitwise the reference.

Legend: T merged tokens, J jobs; a unit is one token of one frame.
"""

import torch
import triton
import triton.language as tl

# A job is FIELDS int64 in this order; addresses of crops and tap tables are on the device. A tap
# table is int32 (2 + taps, extent): of each output pixel the first source pixel, the number of
# taps, and the weights (bits of float32 unless FIXED), which are `precision` bits up.
FIELDS = tl.constexpr(16)
(
    CROP_A,
    STRIDE_A,  # bytes between rows
    CROP_B,
    STRIDE_B,
    NUM_FRAMES,  # 1: both are one memory
    FIRST_UNIT,
    FIRST_TOKEN,
    TOKENS_WIDE,
    COLUMN_TABLE,
    COLUMN_EXTENT,
    COLUMN_TAPS,
    COLUMN_PRECISION,
    ROW_TABLE,
    ROW_EXTENT,
    ROW_TAPS,
    ROW_PRECISION,
) = map(tl.constexpr, range(FIELDS.value))

LANES = tl.constexpr(32)  # px a side of a token, as a power of two
SOURCE_ROWS = tl.constexpr(16)  # resized along x at once: 4 values a thread and channel
STAGE_ROW = tl.constexpr(96)  # 3 channels x LANES
NUM_WARPS = 4
PROGRAMS_PER_SM = 8
STAGE_BYTES = 64 << 20  # of all programs, unless one alone needs more


@triton.jit
def _rounded(total, precision, FIXED: tl.constexpr):
    """Sums as pixel values 0..255, int32."""
    if FIXED:
        return tl.minimum(tl.maximum((total + ((1 << precision) >> 1)) >> precision, 0), 255)
    else:
        clamped = tl.minimum(tl.maximum(total, 0.0), 255.0)
        # Floats from 2^23 on are the integers: adding rounds half to even.
        return (clamped + 8388608.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _added(total, weight, value, FIXED: tl.constexpr):
    if FIXED:
        return total + weight * value.to(tl.int32)
    else:
        return tl.fma(value.to(tl.float32), weight, total)


@triton.jit
def _weights(place, mask, FIXED: tl.constexpr):
    weight = tl.load(place, mask=mask, other=0)
    if FIXED:
        return weight
    else:
        return weight.to(tl.float32, bitcast=True)


@triton.jit
def _store(
    place, total, precision, mask, mean, std, both, PATCH_PX: tl.constexpr, FIXED: tl.constexpr
):
    """One channel of a token; `both`: the other frame is the same memory."""
    pixel = _rounded(total, precision, FIXED)
    if place.dtype.element_ty == tl.uint8:
        value = pixel.to(tl.uint8)
    else:
        # The official subtraction and division. A table of the 768 results would be gathered
        # from 8 cache lines at a time; this is 10 instructions.
        value = tl.div_rn(pixel.to(tl.float32) - mean, std).to(place.dtype.element_ty)
    tl.store(place, value, mask=mask)
    if both:
        tl.store(place + PATCH_PX * PATCH_PX, value, mask=mask)


@triton.jit
def patchify_kernel(
    job_ptr,
    job_of_unit_ptr,
    places_ptr,
    normalisation_ptr,
    stage_ptr,
    out_ptr,
    num_units,
    stage_rows,
    PATCH_PX: tl.constexpr,
    FIXED: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):
    """out: (4 T, 6 PATCH_PX^2). stage: (programs, stage_rows, 96) uint8, float32 unless FIXED."""
    TOKEN_PX: tl.constexpr = 2 * PATCH_PX
    PATCH_ROW: tl.constexpr = 6 * PATCH_PX * PATCH_PX  # 3 channels x 2 frames
    program = tl.program_id(0)
    stage = stage_ptr + program.to(tl.int64) * stage_rows * STAGE_ROW
    lane = tl.arange(0, LANES)
    inside = lane < TOKEN_PX
    square = inside[:, None] & inside[None, :]
    patch, offset = lane // PATCH_PX, lane % PATCH_PX
    # Where a token's pixel goes in its four rows, in the first channel and frame.
    places = (patch[:, None] * 2 + patch[None, :]) * PATCH_ROW
    places += offset[:, None] * PATCH_PX + offset[None, :]
    batch = tl.arange(0, SOURCE_ROWS)
    SUM: tl.constexpr = tl.int32 if FIXED else tl.float32

    for unit in range(program, num_units, tl.num_programs(0)):
        job = job_ptr + tl.load(job_of_unit_ptr + unit).to(tl.int64) * FIELDS
        num_frames = tl.load(job + NUM_FRAMES).to(tl.int32)
        index = unit - tl.load(job + FIRST_UNIT).to(tl.int32)
        frame, index = index % num_frames, index // num_frames
        tokens_wide = tl.load(job + TOKENS_WIDE).to(tl.int32)
        top, left = index // tokens_wide * TOKEN_PX, index % tokens_wide * TOKEN_PX
        crop = tl.cast(tl.load(job + CROP_A + 2 * frame), tl.pointer_type(tl.uint8))
        stride = tl.load(job + STRIDE_A + 2 * frame)

        # Along x: source rows [first, last) of the crop into the stage.
        rows = tl.cast(tl.load(job + ROW_TABLE), tl.pointer_type(tl.int32)) + top
        row_extent = tl.load(job + ROW_EXTENT).to(tl.int32)
        first = tl.load(rows)
        last = tl.load(rows + TOKEN_PX - 1) + tl.load(rows + row_extent + TOKEN_PX - 1)
        columns = tl.cast(tl.load(job + COLUMN_TABLE), tl.pointer_type(tl.int32)) + left
        column_extent = tl.load(job + COLUMN_EXTENT).to(tl.int32)
        start = tl.load(columns + lane, mask=inside, other=0)
        count = tl.load(columns + column_extent + lane, mask=inside, other=0)
        column_taps = tl.load(job + COLUMN_TAPS).to(tl.int32)
        precision = tl.load(job + COLUMN_PRECISION).to(tl.int32)
        tl.debug_barrier()  # the unit before has been read
        for begin in range(first, last, SOURCE_ROWS):
            row = begin + batch
            source = crop + row.to(tl.int64)[:, None] * stride + start[None, :] * 3
            red = tl.zeros([SOURCE_ROWS, LANES], SUM)
            green, blue = red, red
            for k in range(column_taps):
                used = k < count
                weight = _weights(columns + (2 + k) * column_extent + lane, used, FIXED)[None, :]
                mask = (row < last)[:, None] & used[None, :]
                pixel = source + 3 * k
                red = _added(red, weight, tl.load(pixel, mask=mask, other=0), FIXED)
                green = _added(green, weight, tl.load(pixel + 1, mask=mask, other=0), FIXED)
                blue = _added(blue, weight, tl.load(pixel + 2, mask=mask, other=0), FIXED)
            to = stage + (row - first)[:, None] * STAGE_ROW + lane[None, :]
            mask = (row < last)[:, None] & (lane < LANES)[None, :]
            if FIXED:
                red = _rounded(red, precision, FIXED).to(tl.uint8)
                green = _rounded(green, precision, FIXED).to(tl.uint8)
                blue = _rounded(blue, precision, FIXED).to(tl.uint8)
            tl.store(to, red, mask=mask)
            tl.store(to + LANES, green, mask=mask)
            tl.store(to + 2 * LANES, blue, mask=mask)
        tl.debug_barrier()  # what other threads wrote is there

        # Along y.
        start = tl.load(rows + lane, mask=inside, other=0) - first
        count = tl.load(rows + row_extent + lane, mask=inside, other=0)
        row_taps = tl.load(job + ROW_TAPS).to(tl.int32)
        precision = tl.load(job + ROW_PRECISION).to(tl.int32)
        red = tl.zeros([LANES, LANES], SUM)
        green, blue = red, red
        for k in range(row_taps):
            used = k < count
            weight = _weights(rows + (2 + k) * row_extent + lane, used, FIXED)[:, None]
            mask = used[:, None] & (lane < LANES)[None, :]
            value = stage + (start + k)[:, None] * STAGE_ROW + lane[None, :]
            red = _added(red, weight, tl.load(value, mask=mask, other=0), FIXED)
            green = _added(green, weight, tl.load(value + LANES, mask=mask, other=0), FIXED)
            blue = _added(blue, weight, tl.load(value + 2 * LANES, mask=mask, other=0), FIXED)

        token = tl.load(job + FIRST_TOKEN) + index
        if HAS_PLACES:
            token = tl.load(places_ptr + token).to(tl.int64)
        to = out_ptr + token * (4 * PATCH_ROW) + frame * (PATCH_PX * PATCH_PX) + places
        both = num_frames == 1
        n = normalisation_ptr
        area: tl.constexpr = 2 * PATCH_PX * PATCH_PX
        for channel in tl.static_range(3):
            total = red if channel == 0 else (green if channel == 1 else blue)
            mean, std = tl.load(n + channel), tl.load(n + 3 + channel)
            place = to + channel * area
            _store(place, total, precision, square, mean, std, both, PATCH_PX, FIXED)


def patchify(
    jobs: torch.Tensor,
    job_of_unit: torch.Tensor,
    places: torch.Tensor | None,
    normalisation: torch.Tensor,
    patch_px: int,
    stage_rows: int,
    fixed: bool,
    out: torch.Tensor,
) -> None:
    """jobs: (J, 16) int64; job_of_unit: (units,) int32; places: (T,) int32 or int64, where a
    token goes; normalisation: float32, three means and three deviations in 0..255 units;
    patch_px: 14 or 16; stage_rows: most source rows of a token; fixed: whether the jobs
    are FIXED; out: contiguous (4 T, 6 patch_px^2) of float32, float16, bfloat16, or uint8 for the
    pixels as they are. All on one device."""
    num_units, kind = len(job_of_unit), torch.uint8 if fixed else torch.float32
    row_bytes = STAGE_ROW.value * kind.itemsize
    programs = max(1, min(num_units, _num_programs(out), STAGE_BYTES // (stage_rows * row_bytes)))
    shape = (programs, stage_rows, STAGE_ROW.value)
    stage = torch.empty(shape, dtype=kind, device=out.device)
    patchify_kernel[(programs,)](
        *(jobs, job_of_unit, job_of_unit if places is None else places, normalisation, stage, out),
        num_units,
        stage_rows,
        PATCH_PX=patch_px,
        FIXED=fixed,
        HAS_PLACES=places is not None,
        num_warps=NUM_WARPS,
    )


def _num_programs(out: torch.Tensor) -> int:
    if not out.is_cuda:
        return 2
    return torch.cuda.get_device_properties(out.device).multi_processor_count * PROGRAMS_PER_SM
