// Crop and resize on the device: one merged token (28 x 28 or 32 x 32 px of both
// frames) after the other, by
// all threads of a block, into four patch rows of bytes in shared memory.
//
// A token is made in steps, one per frame and group of resized rows. A step copies the source bytes
// to shared memory (16 at once, asynchronously, while the step before sums its columns), resizes
// along rows into `stage` (planar: 3 x 28 or 3 x 32 values a row) and then along columns into the
// tile.
//
// An output has 4 * max(s, 1) taps along each axis, s = source / target, and 28 rows come from
// about 31 s source rows. Along rows a thread takes one output pixel of two source rows: three
// 4-byte loads serve four taps of three channels, one 16-byte load of weights (8 in fixed point)
// both rows. In fixed point two taps are one dp2a; in float32 a byte becomes a number with one
// byte_perm (plan.h). Neighbouring lanes read 3 s bytes apart: no two lanes want different words of
// a bank up to s = 1.3, at most two up to 2.6. Stores to the stage are consecutive. Along columns a
// thread sums four values, from 16-byte loads (4 in fixed point) that the lanes take in a row.
#pragma once

#include "cuda/device.h"
#include "cuda/numerics.cuh"
#include "cuda/plan.h"

namespace vtts {

inline constexpr int kResizeThreads = 128;

// Where a block is: the rows [row, row + rows_per_group) of one frame of a token.
struct Step {
  uint32_t token;  // fewer than 2^31
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

__device__ inline const DeviceJob* job_of(const DeviceJobs& jobs, uint32_t token) {
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

template <typename Shape>
__device__ Region region_of(const Step& step) {
  constexpr int kTokenPx = Shape::kTokenPx;
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

template <typename Shape, int kThreads>
__device__ void fetch(const Step& step, uint8_t* raw) {
  const DeviceJob& job = *step.job;
  if (job.kind == JobKind::kDirect || job.kind == JobKind::kDirectRowsFirst) return;
  const Region region = region_of<Shape>(step);
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
#pragma unroll 1
      for (int b = 0; b < 16; ++b) {
        if (from + b >= source && from + b < source_end) to[b] = from[b];
      }
    }
  }
}

template <typename Shape, typename Numerics, int kThreads>
__device__ void resize_rows(const Step& step, const Region& region, const uint8_t* raw,
                            typename Numerics::Stage* stage) {
  constexpr int kTokenPx = Shape::kTokenPx, kTokenValues = Shape::kTokenValues;
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
    const auto* weights =
        reinterpret_cast<const typename Numerics::FourTaps*>(columns.weights) + region.x + x;
    for (int k = 0; k < columns.stride; k += 4) {
      const typename Numerics::FourTaps four = __ldg(weights);
      weights += columns.extent;
      if (k + 4 <= columns.stride) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t a = words[r].next(), b = words[r].next(), c = words[r].next();
          Numerics::template add<true>({a, b, c}, four, sums[r]);
        }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t a = words[r].next(), b = words[r].next();
          Numerics::template add<false>({a, b, 0}, four, sums[r]);
        }
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

// Where the values of column x (even) of one channel go in a token's four patch rows of bytes, both
// frames' where they are one; two neighbours at a time, as a patch is an even number of px wide.
template <typename Shape>
class TileColumn {
  static constexpr int kPatch = Shape::kPatch;

 public:
  __device__ TileColumn(const Step& step, int channel, int x, uint8_t* tile, int pitch)
      : to_(tile + x / kPatch * pitch +
            (channel * kFramesPerPair + step.frame) * (kPatch * kPatch) + x % kPatch),
        lower_half_(2 * pitch - kPatch * kPatch),
        both_frames_(step.job->num_frames == 1) {}
  // The values of columns x and x + 1 in row y of the token.
  __device__ void put(int y, uint32_t two) const {
    uint8_t* const to = to_ + y * kPatch + (y < kPatch ? 0 : lower_half_);
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(two);
    if (both_frames_) {
      *reinterpret_cast<uint16_t*>(to + kPatch * kPatch) = static_cast<uint16_t>(two);
    }
  }

 private:
  uint8_t* to_;
  int lower_half_;
  bool both_frames_;
};

// A thread keeps its four columns and takes every sixth (or, with 32 px, fifth) row.
template <typename Shape, typename Numerics, int kThreads>
__device__ void sum_columns(const Step& step, const Region& region,
                            const typename Numerics::Stage* stage, uint8_t* tile, int pitch) {
  constexpr int kTokenPx = Shape::kTokenPx, kTokenValues = Shape::kTokenValues;
  constexpr int kQuads = kTokenValues / 4, kRowsAtOnce = kThreads / kQuads;
  const int quad = threadIdx.x % kQuads, first_y = threadIdx.x / kQuads;
  if (first_y >= kRowsAtOnce) return;
  const int channel = quad / (kTokenPx / 4), x = quad % (kTokenPx / 4) * 4;
  const TileColumn<Shape> low(step, channel, x, tile, pitch),
      high(step, channel, x + 2, tile, pitch);
  const DeviceAxis rows = step.job->rows;
  const int rows_per_group = step.job->rows_per_group;
#pragma unroll 1
  for (int y = first_y; y < rows_per_group; y += kRowsAtOnce) {
    const int start = __ldg(rows.starts + region.y + y) - region.first_row;
    const uint32_t* weights =
        rows.weights + int64_t{region.y + y} * (rows.stride / Numerics::kTapsPerWord);
    const uint32_t bytes = Numerics::template sum_columns<kTokenValues>(
        stage + start * kTokenValues + 4 * quad, weights, __ldg(rows.counts + region.y + y),
        rows.precision);
    low.put(step.row + y, bytes & 0xffff);
    high.put(step.row + y, bytes >> 16);
  }
}

// A crop that has its size already: from packed pixels to patch rows.
template <typename Shape, int kThreads>
__device__ void split_pixels(const Step& step, const Region& region, const uint8_t* raw,
                             uint8_t* tile, int pitch) {
  constexpr int kTokenPx = Shape::kTokenPx;
  const DeviceFrame& frame = step.job->frames[step.frame];
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokenPx * kTokenPx / 2; i += kThreads) {
    const int y = i / (kTokenPx / 2), x = i % (kTokenPx / 2) * 2;
    const uint8_t* from = raw + y * step.job->raw_pitch_bytes +
                          offset_in_slot(source_row(frame, region, y)) + kChannels * x;
    for (int c = 0; c < kChannels; ++c) {
      TileColumn<Shape>(step, c, x, tile, pitch)
          .put(y, from[c] | uint32_t{from[kChannels + c]} << 8);
    }
  }
}

// Every value from global memory by itself: windows of any size, along x and then y or along y and
// then x. The sums of the first axis are made again for every output that they reach.
template <typename Shape, typename Numerics, int kThreads>
__device__ void resize_directly(const Step& step, const Region& region, uint8_t* tile, int pitch) {
  constexpr int kTokenPx = Shape::kTokenPx, kTokenValues = Shape::kTokenValues;
  using Sum = typename Numerics::Sum;
  constexpr int kPerWord = Numerics::kTapsPerWord;
  const DeviceFrame& frame = step.job->frames[step.frame];
  const DeviceAxis &columns = step.job->columns, &rows = step.job->rows;
  const bool rows_first = step.job->kind == JobKind::kDirectRowsFirst;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTokenPx * kTokenValues / 2; i += kThreads) {
    const int y = i / (kTokenValues / 2), pair = i % (kTokenValues / 2);
    const int channel = pair / (kTokenPx / 2), x = pair % (kTokenPx / 2) * 2;
    uint32_t bytes = 0;
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const int column = region.x + x + which, row = region.y + y;
      const auto weight_of = [&](bool of_row, int k) {
        const uint32_t* const words =
            of_row ? rows.weights + int64_t{row} * (rows.stride / kPerWord) + k / kPerWord
                   : columns.weights + (int64_t{k / 4} * columns.extent + column) * (4 / kPerWord) +
                         k % 4 / kPerWord;
        return __ldg(words);
      };
      const uint8_t* const window = frame.crop + __ldg(rows.starts + row) * frame.row_stride_bytes +
                                    int64_t{kChannels} * __ldg(columns.starts + column) + channel;
      const int num_rows = __ldg(rows.counts + row), num_columns = __ldg(columns.counts + column);
      const int num_first = rows_first ? num_rows : num_columns;
      const int num_second = rows_first ? num_columns : num_rows;
      const int64_t first_step = rows_first ? frame.row_stride_bytes : kChannels;
      const int64_t second_step = rows_first ? kChannels : frame.row_stride_bytes;
      Sum total = 0;
#pragma unroll 1
      for (int j = 0; j < num_second; ++j) {
        Sum sum = 0;
#pragma unroll 1
        for (int k = 0; k < num_first; ++k) {
          sum = Numerics::add_pixel(window[j * second_step + k * first_step],
                                    weight_of(rows_first, k), k, sum);
        }
        const int precision = rows_first ? rows.precision : columns.precision;
        total = Numerics::add_staged(Numerics::staged(sum, precision), weight_of(!rows_first, j), j,
                                     total);
      }
      const int precision = rows_first ? columns.precision : rows.precision;
      bytes |= Numerics::finished(total, precision) << (8 * which);
    }
    TileColumn<Shape>(step, channel, x, tile, pitch).put(y, bytes);
  }
}

// Resizes tokens first, first + stride, ... below `last`. `tile_of(token)` is where the token's
// four rows of bytes go, `pitch` bytes apart; `done(token)` is called by all threads when they
// are there, and may read them until it returns.
template <typename Shape, int kThreads, typename TileOf, typename Done>
__device__ void resize_tokens(const DeviceJobs& jobs, uint32_t first, uint32_t last,
                              uint32_t stride, uint8_t* scratch, int pitch, const TileOf& tile_of,
                              const Done& done) {
  if (first >= last) return;
  uint8_t* const stage = scratch + jobs.stage_offset_bytes;
  Step step = {first, job_of(jobs, first), 0, 0};
  fetch<Shape, kThreads>(step, scratch);
  while (true) {
    const Region region = region_of<Shape>(step);
    const DeviceJob& job = *step.job;
    uint8_t* const tile = tile_of(step.token);
    end_copies();
    wait_copies<0>();
    __syncthreads();
    if (job.kind == JobKind::kBanded) {
      with_numerics(job.resize, [&](auto numerics) {
        using Numerics = decltype(numerics);
        resize_rows<Shape, Numerics, kThreads>(step, region, scratch,
                                               reinterpret_cast<typename Numerics::Stage*>(stage));
      });
    } else if (job.kind == JobKind::kCopy) {
      split_pixels<Shape, kThreads>(step, region, scratch, tile, pitch);
    }
    __syncthreads();

    // The next step's source may come while this one's columns are summed.
    Step next = step;
    next.row += job.rows_per_group;
    if (next.row == Shape::kTokenPx) {
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
    if (!ends) fetch<Shape, kThreads>(next, scratch);
    if (job.kind == JobKind::kBanded) {
      with_numerics(job.resize, [&](auto numerics) {
        using Numerics = decltype(numerics);
        sum_columns<Shape, Numerics, kThreads>(
            step, region, reinterpret_cast<const typename Numerics::Stage*>(stage), tile, pitch);
      });
    } else if (job.kind != JobKind::kCopy) {
      with_numerics(job.resize, [&](auto numerics) {
        resize_directly<Shape, decltype(numerics), kThreads>(step, region, tile, pitch);
      });
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
