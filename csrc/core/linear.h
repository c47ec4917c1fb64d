// linear: rows times a matrix. Up to kFewRows the weights are read in place, once for all rows;
// beyond, arithmetic is the cost, and both factors are packed for it.
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/cpu_features.h"

namespace vtts {

inline constexpr int64_t kFewRows = 16;

// out[n] = weight x[n] + bias in float32. x: num_rows rows of num_channels, x_stride floats apart;
// weight: (num_outputs, num_channels) row-major and packed; bias: (num_outputs) or null; out:
// (num_rows, num_outputs) packed. A row's values do not depend on num_threads, nor on the other
// rows beyond which side of kFewRows their number is. Throws std::invalid_argument on an
// instruction set that is not there.
struct LinearArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float* out = nullptr;
  int64_t num_rows = 0;
  int64_t num_channels = 0;
  int64_t num_outputs = 0;
  // Rows of the whole product, if these are a part of it: its side of kFewRows is then taken.
  int64_t product_rows = 0;
  // In place of `weight`, beyond kFewRows: writes those of `count` outputs from `output` on and of
  // `num_channels` channels from `channel` on, packed, to `to`. Called by several threads.
  std::function<void(int64_t output, int64_t count, int64_t channel, int64_t num_channels,
                     float* to)>
      read_weight = nullptr;
};

void linear(const LinearArgs& args, Isa isa, int num_threads);

}  // namespace vtts
