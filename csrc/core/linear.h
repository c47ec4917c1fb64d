// linear: rows times a matrix that lies in panels.
#pragma once

#include <cstdint>

#include "core/low_precision.h"
#include "cpu/cpu_features.h"

namespace vtts {

// Matrices are (outputs, channels). packed: in panels of 16 outputs as of product_kernels.h, filled
// up with zeros; else row-major, and packed on the way, which costs as much as several rows.
struct Matrix {
  const void* values = nullptr;
  enum Type { kFloat32, kBFloat16, kInt8 } type = kFloat32;  // bytes are packed
  bool packed = false;
  const float* scale = nullptr;  // of each output, or null
  const void* bias = nullptr;    // of each output and the type of rows, or null
};

// out[n] = scale (weight x[n]) + bias, sums in float32, rounded once. type: of x, bias and out,
// float32 or bfloat16. x: num_rows rows of num_channels, x_stride values apart; out: (num_rows,
// num_outputs) packed. A weight is of the type of rows, or int8; of bfloat16, num_channels is even.
struct LinearArgs {
  DType type = DType::kFloat32;
  const void* x = nullptr;
  int64_t x_stride = 0;
  Matrix weight;
  void* out = nullptr;
  int64_t num_rows = 0;
  int64_t num_channels = 0;
  int64_t num_outputs = 0;
};

// A row's values depend neither on num_threads, nor on the other rows, nor on whether the matrix is
// packed. Throws std::invalid_argument on types that do not go together, an odd number of channels
// of bfloat16 and an instruction set that is not there.
void linear(const LinearArgs& args, Isa isa, int num_threads);

}  // namespace vtts
