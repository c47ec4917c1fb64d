// Taps of the antialiased bicubic filter (a = -0.5), as ATen and PIL compute them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vtts {

// Output pixel i of one axis is the sum over k < stride of weights[i * stride + k] times source
// pixel starts[i] + k. Every output has `stride` weights, zero beyond its own counts[i]; `stride`
// is even, so that weights can be read in pairs.
template <typename Weight>
struct Taps {
  int stride = 0;
  std::vector<int32_t> starts;
  std::vector<int32_t> counts;
  std::vector<Weight> weights;
  int precision = 0;  // of integers: weights are fixed point with this many fractional bits

  int num_outputs() const { return static_cast<int>(starts.size()); }
  const Weight* weights_of(int output) const {
    return weights.data() + static_cast<size_t>(output) * stride;
  }
};

// Resize::kFixed: weights in double, then one fixed-point precision for the axis, the largest that
// keeps its largest weight below 2^15 (at most 22 bits).
Taps<int16_t> fixed_point_taps(int source_extent, int target_extent);

// Resize::kFloat: all arithmetic in float32.
Taps<float> float_taps(int source_extent, int target_extent);

// Resize::kPil: weights in double, then 22 fractional bits.
Taps<int32_t> pil_taps(int source_extent, int target_extent);

}  // namespace vtts
