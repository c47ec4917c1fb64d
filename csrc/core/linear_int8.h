// linear_int8: rows times a matrix of bytes with a scale for each output, a quarter of the bytes of
// float32.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// out[n] = scale * (weight x[n]) + bias, sums in float32: the weights' rounding is the only error
// beside that of `linear`. Layouts, and what a row's values depend on, as LinearArgs.
struct LinearInt8Args {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const int8_t* weight = nullptr;  // (num_outputs, num_channels)
  const float* scale = nullptr;    // (num_outputs)
  const float* bias = nullptr;     // (num_outputs) or null
  float* out = nullptr;
  int64_t num_rows = 0;
  int64_t num_channels = 0;
  int64_t num_outputs = 0;
};

void linear_int8(const LinearInt8Args& args, Isa isa, int num_threads);

}  // namespace vtts
