// The inner loops of all products, linear's and attention's: one table per instruction set.
//
// One factor lies in panels of 16 outputs, channel after channel, so that a vector of weights is
// read at a time and the other factor, its rows as they are, is broadcast. A sum takes one channel
// after the other, in parts (of 32, or of kRun by AMX) that are added in their order: its bits
// depend on its row and its output alone, not on how many of either are computed together, nor on
// threads.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "cpu/cpu_features.h"

namespace vtts {

inline constexpr int kPanel = 16;     // outputs of a panel
inline constexpr int64_t kRun = 256;  // channels of one call, at most

// sums[n * sums_stride + 16 p + o] = (adds ? itself : 0) + sum_c x[n * x_stride + c] weight_p[c][o]
// for n < num_rows, p < num_panels and o < 16. Panel p begins p * panel_stride values behind
// `panels` and holds [channel][16], of BFloat16 [pair of channels][16][2]; num_channels is at most
// kRun and of BFloat16 even.
template <typename X, typename Weight>
using Multiply = void (*)(const X* x, int64_t x_stride, int64_t num_rows, const Weight* panels,
                          int64_t panel_stride, int num_panels, int64_t num_channels, float* sums,
                          int64_t sums_stride, bool adds);

// out[n * out_stride + o] = sums[n * sums_stride + o] * scale[o] + bias[o], rounded once, for
// n < num_rows and o < num_outputs; scale and bias may be null.
template <typename Out>
using Finish = void (*)(const float* sums, int64_t sums_stride, int64_t num_rows,
                        const float* scale, const Out* bias, int num_outputs, Out* out,
                        int64_t out_stride);

struct ProductKernels {
  Multiply<float, float> multiply;
  Multiply<float, int8_t> multiply_int8;
  // One of the two: rows are widened before, or two channels are multiplied at once.
  Multiply<float, BFloat16> multiply_widened;
  Multiply<BFloat16, BFloat16> multiply_pairs;
  Finish<float> finish;
  Finish<BFloat16> finish_bf16;
  void (*widen)(const BFloat16* from, int64_t count, float* to);
  // to[c * 16 + i] = from[i * stride + c] for i < num_lines, 0 for i up to 16; values of 4 bytes.
  void (*pack)(const float* from, int64_t stride, int num_lines, int64_t num_channels, float* to);
  int tile_rows;  // multiplied together; num_rows is best a multiple of it, or less
};

const ProductKernels& scalar_product_kernels();
// nullptr where the compiler cannot target the instruction set.
const ProductKernels* avx2_product_kernels();
const ProductKernels* avx512_product_kernels();
const ProductKernels* avx512_bf16_product_kernels();
const ProductKernels* amx_product_kernels();
const ProductKernels* neon_product_kernels();

// Throws std::invalid_argument on an instruction set that is not there.
const ProductKernels& product_kernels(const char* what, Isa isa);

}  // namespace vtts
