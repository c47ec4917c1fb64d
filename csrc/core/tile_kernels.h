// The inner loop of a product of many rows: one tile of the result, per instruction set.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// A tile is num_rows x num_outputs sums in registers over a run of channels. Both factors come
// packed, channel after channel and filled up with zeros: num_rows values of x, num_outputs of the
// weight. Every sum runs over the channels in order, whatever the other rows of the tile are.
struct TileKernel {
  int num_rows;
  int num_outputs;
  // out[n * out_stride + o] = (starts ? bias[o] : out[...]) + sum_c x[c][n] * weight[c][o] for
  // n < rows_there and o < outputs_there; bias holds num_outputs values.
  void (*run)(const float* x, const float* weight, int64_t num_channels, const float* bias,
              bool starts, int rows_there, int outputs_there, float* out, int64_t out_stride);
  // Packs: to[c * width + n] = from[n * stride + c] for n < num_lines, 0 for n up to width.
  void (*pack)(const float* from, int64_t stride, int64_t num_lines, int64_t width,
               int64_t num_channels, float* to);
};

// `TileKernel::pack` for any width, for even ones.
void pack_scalar(const float* from, int64_t stride, int64_t num_lines, int64_t width,
                 int64_t num_channels, float* to);
void pack_avx2(const float* from, int64_t stride, int64_t num_lines, int64_t width,
               int64_t num_channels, float* to);

const TileKernel& scalar_tile_kernel();
// nullptr where the compiler cannot target the instruction set.
const TileKernel* avx2_tile_kernel();
const TileKernel* avx512_tile_kernel();
const TileKernel* neon_tile_kernel();

const TileKernel& tile_kernel(const char* what, Isa isa);

}  // namespace vtts
