#include "core/row_ops.h"

#include <algorithm>
#include <cmath>

#include "core/float_kernels.h"

namespace vtts {

void rmsnorm(const float* x, int64_t x_stride, const float* weight, float eps, int64_t num_rows,
             int64_t num_channels, float* y, Isa isa) {
  const FloatKernels& kernels = float_kernels("rmsnorm", isa);
  for (int64_t n = 0; n < num_rows; ++n) {
    kernels.rmsnorm(x + n * x_stride, weight, eps, num_channels, y + n * num_channels);
  }
}

void swiglu(const float* gate_up, int64_t num_rows, int64_t num_hidden, float* out, Isa isa) {
  const FloatKernels& kernels = float_kernels("swiglu", isa);
  for (int64_t n = 0; n < num_rows; ++n) {
    const float* gate = gate_up + 2 * n * num_hidden;
    kernels.swiglu(gate, gate + num_hidden, num_hidden, out + n * num_hidden);
  }
}

Choice greedy(const float* logits, int64_t num_logits, Isa isa) {
  const FloatKernels& kernels = float_kernels("greedy", isa);
  constexpr int64_t kBlock = 1024;  // summed in float32, the blocks in float64
  const float maximum = kernels.maximum(logits, num_logits);
  const float* found = std::find(logits, logits + num_logits, maximum);
  double sum = 0.0;
  for (int64_t i = 0; i < num_logits; i += kBlock) {
    sum += kernels.sum_exp(logits + i, std::min(kBlock, num_logits - i), maximum);
  }
  const bool usable = found != logits + num_logits && std::isfinite(sum);
  return {usable ? found - logits : -1, -std::log(sum)};
}

}  // namespace vtts
