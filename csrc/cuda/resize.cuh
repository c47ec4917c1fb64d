// Crop and resize on the device: one merged token (28 x 28 px of both frames) after the other, by
// all threads of a block, into four patch rows of bytes in shared memory.
//
// A token is made in steps, one per frame and group of resized rows. A step copies the source bytes
// to shared memory (16 at once, asynchronously, while the step before sums its columns), resizes
// along rows into `stage` (planar: 3 x 28 values a row) and then along columns into the tile.
//
// Per value of a pair at scale s = source / target, the two passes are s * (4 s + 1) and 4 s + 1
// multiply-adds. Along rows a thread takes one output pixel of two source rows: 12 bytes come in
// three 4-byte loads and serve four taps of three channels, and a weight serves six sums. In fixed
// point two taps are one dp2a. In float32 a byte becomes a number with one byte_perm (plan.h).
// Neighbouring lanes read 3 s bytes apart: without bank conflicts up to s = 1.3, two-way at most up
// to 2.6. Stores to the stage are consecutive. Along columns a thread takes four values at once.
#pragma once

#include "cuda/device.h"
#include "cuda/plan.h"

namespace vtts {

inline constexpr int kResizeThreads = 128;

// Reads words of shared memory from any byte on.
class Words {
 public:
  __device__ explicit Words(const uint8_t* from) {
    const auto address = reinterpret_cast<uintptr_t>(from);
    next_ = reinterpret_cast<const uint32_t*>(from - (address & 3));
    shift_ = static_cast<int>(address & 3) * 8;
    low_ = *next_;
  }
  __device__ uint32_t next() {
    const uint32_t high = *++next_;
    const uint32_t word = __funnelshift_r(low_, high, shift_);
    low_ = high;
    return word;
  }

 private:
  const uint32_t* next_;
  int shift_;
  uint32_t low_;
};

// What the two roundings differ in; each is the core's arithmetic to the bit.
struct DeviceFixedPoint {
  using Stage = uint8_t;
  using Sum = int;
  static constexpr int kTapsPerWord = 2;

  // Adds four taps (two, unless kFour) of packed pixels to the sums of the three channels.
  template <bool kFour>
  __device__ static void add(const uint32_t (&pixels)[3], const uint32_t (&weights)[4],
                             Sum (&sums)[kChannels]) {
    const uint32_t a = pixels[0], b = pixels[1], c = pixels[2];
    const uint32_t red = __byte_perm(a, b, 0x0630), green = __byte_perm(a, b, 0x0741),
                   blue = __byte_perm(a, b, 0x0052);
    sums[0] = dot_low(weights[0], red, sums[0]);
    sums[1] = dot_low(weights[0], green, sums[1]);
    sums[2] = dot_low(weights[0], blue, sums[2]);
    if (!kFour) return;
    sums[0] = dot_high(weights[1], __byte_perm(red, c, 0x5210), sums[0]);
    sums[1] = dot_high(weights[1], __byte_perm(green, c, 0x6210), sums[1]);
    sums[2] = dot_high(weights[1], __byte_perm(blue, c, 0x7410), sums[2]);
  }

  __device__ static Stage staged(Sum sum, int precision) {
    const int half = precision > 0 ? 1 << (precision - 1) : 0;
    return static_cast<Stage>(min(max((sum + half) >> precision, 0), 255));
  }

  // Four neighbouring values of a resized row. The stage has a row more than is used.
  __device__ static uint32_t sum_columns(const Stage* stage, const uint32_t* weights, int count,
                                         int precision) {
    Sum sums[4] = {};
    for (int k = 0; k < count; k += 2) {
      const uint32_t weight = __ldg(weights + k / 2);
      const uint32_t a = *reinterpret_cast<const uint32_t*>(stage);
      const uint32_t b = *reinterpret_cast<const uint32_t*>(stage + kTokenValues);
      const uint32_t low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
      sums[0] = dot_low(weight, low, sums[0]);
      sums[1] = dot_high(weight, low, sums[1]);
      sums[2] = dot_low(weight, high, sums[2]);
      sums[3] = dot_high(weight, high, sums[3]);
      stage += 2 * kTokenValues;
    }
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= uint32_t{staged(sums[i], precision)} << (8 * i);
    return bytes;
  }

  __device__ static Sum add_pixel(uint32_t pixel, uint32_t weights, int k, Sum sum) {
    return sum + static_cast<int>(pixel) * static_cast<int16_t>(weights >> (k % 2 * 16));
  }
  __device__ static Sum add_staged(Stage value, uint32_t weights, int k, Sum sum) {
    return add_pixel(value, weights, k, sum);
  }
  __device__ static uint32_t finished(Sum sum, int precision) { return staged(sum, precision); }
};

struct DeviceFloatingPoint {
  using Stage = float;
  using Sum = float;
  static constexpr int kTapsPerWord = 1;

  // Byte `index` of `word` as a number, times 2^-133 (plan.h).
  __device__ static float pixel(uint32_t word, int index) {
    return __uint_as_float(__byte_perm(word, 0, 0x4044 | index << 8));
  }

  template <bool kFour>
  __device__ static void add(const uint32_t (&pixels)[3], const uint32_t (&weights)[4],
                             Sum (&sums)[kChannels]) {
#pragma unroll
    for (int i = 0; i < (kFour ? 12 : 6); ++i) {
      sums[i % 3] =
          __fmaf_ieee_rn(pixel(pixels[i / 4], i % 4), __uint_as_float(weights[i / 3]), sums[i % 3]);
    }
  }

  __device__ static Stage staged(Sum sum, int) { return __fmul_rn(sum, kColumnUnscale); }

  __device__ static uint32_t sum_columns(const Stage* stage, const uint32_t* weights, int count,
                                         int precision) {
    Sum sums[4] = {};
    for (int k = 0; k < count; ++k) {
      const float weight = __uint_as_float(__ldg(weights + k));
      const float4 values = *reinterpret_cast<const float4*>(stage);
      sums[0] = __fmaf_ieee_rn(values.x, weight, sums[0]);
      sums[1] = __fmaf_ieee_rn(values.y, weight, sums[1]);
      sums[2] = __fmaf_ieee_rn(values.z, weight, sums[2]);
      sums[3] = __fmaf_ieee_rn(values.w, weight, sums[3]);
      stage += kTokenValues;
    }
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= finished(sums[i], precision) << (8 * i);
    return bytes;
  }

  __device__ static Sum add_pixel(uint32_t value, uint32_t weight, int, Sum sum) {
    return __fmaf_ieee_rn(pixel(value, 0), __uint_as_float(weight), sum);
  }
  __device__ static Sum add_staged(Stage value, uint32_t weight, int, Sum sum) {
    return __fmaf_ieee_rn(value, __uint_as_float(weight), sum);
  }
  // Clamped and rounded half to even: floats from 2^23 on are the integers.
  __device__ static uint32_t finished(Sum sum, int) {
    const float clamped = fminf(fmaxf(sum, 0.0f), 255.0f);
    return __float_as_uint(__fadd_rn(clamped, 8388608.0f)) & 255;
  }
};

// Where a block is: the rows [row, row + rows_per_group) of one frame of a token.
struct Step {
  int64_t token;
  const DeviceJob* job;
  int frame, row;
};

// The part of a plan that kernels take as their argument.
struct DeviceJobs {
  const DeviceJob* jobs;
  int32_t num_jobs;
  int32_t stage_offset_bytes;
  int64_t num_tokens;
  const int32_t* places;  // or null
};

__device__ inline const DeviceJob* job_of(const DeviceJobs& jobs, int64_t token) {
  int begin = 0, end = jobs.num_jobs;
  while (end - begin > 1) {
    const int middle = (begin + end) / 2;
    (jobs.jobs[middle].first_token <= token ? begin : end) = middle;
  }
  return jobs.jobs + begin;
}

// The source of a step, and the first resized pixel that it makes.
struct Region {
  int first_row, num_rows, first_column, num_columns, x, y;
};

__device__ inline Region region_of(const Step& step) {
  const DeviceJob& job = *step.job;
  const int local = static_cast<int>(step.token - job.first_token);
  const int token_row = local / job.tokens_wide;
  const int x = (local - token_row * job.tokens_wide) * kTokenPx;
  const int y = token_row * kTokenPx + step.row;
  if (job.kind == JobKind::kCopy) return {y, kTokenPx, x, kTokenPx, x, y};
  const auto begin_end = [](const DeviceAxis& axis, int first, int num, int* begin, int* length) {
    const int last = first + num - 1;
    *begin = __ldg(axis.starts + first);
    *length = __ldg(axis.starts + last) + __ldg(axis.counts + last) - *begin;
  };
  Region region;
  begin_end(job.columns, x, kTokenPx, &region.first_column, &region.num_columns);
  begin_end(job.rows, y, job.rows_per_group, &region.first_row, &region.num_rows);
  region.x = x;
  region.y = y;
  return region;
}

// Where row `row` of a region begins in its slot of `raw`: as far behind a multiple of 16 as in
// global memory.
__device__ inline const uint8_t* source_row(const DeviceFrame& frame, const Region& region,
                                            int row) {
  return frame.crop + (region.first_row + row) * frame.row_stride_bytes +
         int64_t{kChannels} * region.first_column;
}

__device__ inline int offset_in_slot(const uint8_t* source) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(source) & 15);
}

template <int kThreads>
__device__ void fetch(const Step& step, uint8_t* raw) {
  const DeviceJob& job = *step.job;
  if (job.kind == JobKind::kDirect) return;
  const Region region = region_of(step);
  const DeviceFrame frame = job.frames[step.frame];
  const int pieces = job.raw_pitch_bytes / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < region.num_rows * pieces; i += kThreads) {
    const int row = static_cast<int>(__umulhi(i, job.piece_reciprocal)), piece = i - row * pieces;
    const uint8_t* source = source_row(frame, region, row);
    const uint8_t* source_end = source + kChannels * region.num_columns;
    const uint8_t* from = source - offset_in_slot(source) + 16 * piece;
    uint8_t* to = raw + row * job.raw_pitch_bytes + 16 * piece;
    if (from >= source_end) continue;
    if (from >= frame.first && from + 16 <= frame.end) {
      copy_16_async(to, from);
    } else {
      for (int b = 0; b < 16; ++b) {
        if (from + b >= source && from + b < source_end) to[b] = from[b];
      }
    }
  }
}

template <typename Numerics, int kThreads>
__device__ void resize_rows(const Step& step, const Region& region, const uint8_t* raw,
                            typename Numerics::Stage* stage) {
  using Sum = typename Numerics::Sum;
  const DeviceJob& job = *step.job;
  const DeviceFrame& frame = job.frames[step.frame];
  const DeviceAxis columns = job.columns;
  const int num_items = (region.num_rows + 1) / 2 * kTokenPx;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_items; i += kThreads) {
    const int x = i % kTokenPx, row = i / kTokenPx * 2;
    const int rows[2] = {row, min(row + 1, region.num_rows - 1)};  // the last one perhaps twice
    const int start = __ldg(columns.starts + region.x + x) - region.first_column;
    const auto pixels_of = [&](int of) {
      return raw + of * job.raw_pitch_bytes + offset_in_slot(source_row(frame, region, of)) +
             kChannels * start;
    };
    Words words[2] = {Words(pixels_of(rows[0])), Words(pixels_of(rows[1]))};
    Sum sums[2][kChannels] = {};
    const uint32_t* next_weight = columns.weights + region.x + x;
    const auto take_weight = [&] {
      const uint32_t weight = __ldg(next_weight);
      next_weight += columns.extent;
      return weight;
    };
    int k = 0;
    for (; k + 4 <= columns.stride; k += 4) {
      uint32_t weights[4];
#pragma unroll
      for (int w = 0; w < 4 / Numerics::kTapsPerWord; ++w) weights[w] = take_weight();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t a = words[r].next(), b = words[r].next(), c = words[r].next();
        Numerics::template add<true>({a, b, c}, weights, sums[r]);
      }
    }
    if (k < columns.stride) {
      uint32_t weights[4];
#pragma unroll
      for (int w = 0; w < 2 / Numerics::kTapsPerWord; ++w) weights[w] = take_weight();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t a = words[r].next(), b = words[r].next();
        Numerics::template add<false>({a, b, 0}, weights, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        stage[rows[r] * kTokenValues + c * kTokenPx + x] =
            Numerics::staged(sums[r][c], columns.precision);
      }
    }
  }
}

// Writes two neighbouring bytes (x even) to their place in the token's four patch rows, of both
// frames where they are one.
__device__ inline void put_two(const Step& step, int channel, int y, int x, uint32_t bytes,
                               uint8_t* tile, int pitch) {
  const int quarter = y / kPatch * 2 + x / kPatch;
  uint8_t* to = tile + quarter * pitch +
                ((channel * kFramesPerPair + step.frame) * kPatch + y % kPatch) * kPatch +
                x % kPatch;
  *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bytes);
  if (step.job->num_frames == 1) {
    *reinterpret_cast<uint16_t*>(to + kPatch * kPatch) = static_cast<uint16_t>(bytes);
  }
}

template <typename Numerics, int kThreads>
__device__ void sum_columns(const Step& step, const Region& region,
                            const typename Numerics::Stage* stage, uint8_t* tile, int pitch) {
  constexpr int kQuads = kTokenValues / 4;
  const DeviceJob& job = *step.job;
  const DeviceAxis rows = job.rows;
#pragma unroll 1
  for (int i = threadIdx.x; i < job.rows_per_group * kQuads; i += kThreads) {
    const int y = i / kQuads, quad = i % kQuads;
    const int start = __ldg(rows.starts + region.y + y) - region.first_row;
    const uint32_t* weights =
        rows.weights + int64_t{region.y + y} * (rows.stride / Numerics::kTapsPerWord);
    const uint32_t bytes = Numerics::sum_columns(stage + start * kTokenValues + 4 * quad, weights,
                                                 __ldg(rows.counts + region.y + y), rows.precision);
    const int channel = quad / (kTokenPx / 4), x = quad % (kTokenPx / 4) * 4;
    put_two(step, channel, step.row + y, x, bytes & 0xffff, tile, pitch);
    put_two(step, channel, step.row + y, x + 2, bytes >> 16, tile, pitch);
  }
}

// A crop that has its size already: from packed pixels to patch rows.
template <int kThreads>
__device__ void split_pixels(const Step& step, const Region& region, const uint8_t* raw,
                             uint8_t* tile, int pitch) {
  const DeviceFrame& frame = step.job->frames[step.frame];
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokenPx * kTokenPx / 2; i += kThreads) {
    const int y = i / (kTokenPx / 2), x = i % (kTokenPx / 2) * 2;
    const uint8_t* from = raw + y * step.job->raw_pitch_bytes +
                          offset_in_slot(source_row(frame, region, y)) + kChannels * x;
    for (int c = 0; c < kChannels; ++c) {
      put_two(step, c, y, x, from[c] | uint32_t{from[kChannels + c]} << 8, tile, pitch);
    }
  }
}

// Every value from global memory by itself: windows of any size, each source row summed again for
// every output row that it reaches.
template <typename Numerics, int kThreads>
__device__ void resize_directly(const Step& step, const Region& region, uint8_t* tile, int pitch) {
  using Sum = typename Numerics::Sum;
  constexpr int kPerWord = Numerics::kTapsPerWord;
  const DeviceFrame frame = step.job->frames[step.frame];
  const DeviceAxis columns = step.job->columns, rows = step.job->rows;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokenPx * kTokenValues / 2; i += kThreads) {
    const int y = i / (kTokenValues / 2), pair = i % (kTokenValues / 2);
    const int channel = pair / (kTokenPx / 2), x = pair % (kTokenPx / 2) * 2;
    uint32_t bytes = 0;
    for (int which = 0; which < 2; ++which) {
      const int column = region.x + x + which, row = region.y + y;
      const uint32_t* row_weights = rows.weights + int64_t{row} * (rows.stride / kPerWord);
      Sum total = 0;
      for (int j = 0; j < __ldg(rows.counts + row); ++j) {
        const uint8_t* from = frame.crop + (__ldg(rows.starts + row) + j) * frame.row_stride_bytes +
                              int64_t{kChannels} * __ldg(columns.starts + column) + channel;
        Sum sum = 0;
        for (int k = 0; k < __ldg(columns.counts + column); ++k) {
          const uint32_t weight =
              __ldg(columns.weights + int64_t{k / kPerWord} * columns.extent + column);
          sum = Numerics::add_pixel(from[int64_t{kChannels} * k], weight, k, sum);
        }
        total = Numerics::add_staged(Numerics::staged(sum, columns.precision),
                                     __ldg(row_weights + j / kPerWord), j, total);
      }
      bytes |= Numerics::finished(total, rows.precision) << (8 * which);
    }
    put_two(step, channel, y, x, bytes, tile, pitch);
  }
}

// Resizes tokens first, first + stride, ... below `last`. `tile_of(token)` is where the token's
// four rows of bytes go, `pitch` bytes apart; `done(token)` is called by all threads when they
// are there, and may read them until it returns.
template <typename Numerics, int kThreads, typename TileOf, typename Done>
__device__ void resize_tokens(const DeviceJobs& jobs, int64_t first, int64_t last, int64_t stride,
                              uint8_t* scratch, int pitch, const TileOf& tile_of,
                              const Done& done) {
  if (first >= last) return;
  auto* const stage =
      reinterpret_cast<typename Numerics::Stage*>(scratch + jobs.stage_offset_bytes);
  Step step = {first, job_of(jobs, first), 0, 0};
  fetch<kThreads>(step, scratch);
  while (true) {
    const Region region = region_of(step);
    const DeviceJob& job = *step.job;
    uint8_t* const tile = tile_of(step.token);
    end_copies();
    wait_copies<0>();
    __syncthreads();
    if (job.kind == JobKind::kBanded) {
      resize_rows<Numerics, kThreads>(step, region, scratch, stage);
    } else if (job.kind == JobKind::kCopy) {
      split_pixels<kThreads>(step, region, scratch, tile, pitch);
    }
    __syncthreads();

    // The next step's source may come while this one's columns are summed.
    Step next = step;
    next.row += job.rows_per_group;
    if (next.row == kTokenPx) {
      next.row = 0;
      ++next.frame;
    }
    const bool token_ends = next.frame == job.num_frames;
    if (token_ends) {
      next.frame = 0;
      next.token += stride;
      if (next.token < last) next.job = job_of(jobs, next.token);
    }
    const bool ends = next.token >= last;
    if (!ends) fetch<kThreads>(next, scratch);
    if (job.kind == JobKind::kBanded) {
      sum_columns<Numerics, kThreads>(step, region, stage, tile, pitch);
    } else if (job.kind == JobKind::kDirect) {
      resize_directly<Numerics, kThreads>(step, region, tile, pitch);
    }
    if (token_ends) {
      __syncthreads();
      done(step.token);
    }
    if (ends) return;
    step = next;
  }
}

}  // namespace vtts
