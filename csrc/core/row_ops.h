// What lies between the products of a decoding step, one pass a row: float32, on the caller's
// thread.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// y[n] = weight * (x[n] / sqrt(mean(x[n]^2) + eps)); rows of x are x_stride floats apart.
void rmsnorm(const float* x, int64_t x_stride, const float* weight, float eps, int64_t num_rows,
             int64_t num_channels, float* y, Isa isa);

// out[n] = silu(gate) * up, where a row of gate_up is [gate; up], 2 * num_hidden floats, packed.
void swiglu(const float* gate_up, int64_t num_rows, int64_t num_hidden, float* out, Isa isa);

struct Choice {
  int64_t index;   // of the first maximum; -1 where a NaN hides it
  double logprob;  // its log-probability under the softmax
};

Choice greedy(const float* logits, int64_t num_logits, Isa isa);

}  // namespace vtts
