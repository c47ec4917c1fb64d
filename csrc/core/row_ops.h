// What lies between the products, one pass a row, float32. Few numbers are left to the caller's
// thread. A row's values depend neither on the other rows nor on num_threads.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// Floats of one task: some 5 us of memory traffic, long against waking a thread.
inline constexpr int64_t kRowTaskFloats = 32 << 10;

struct RmsnormArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* residual = nullptr;  // rows residual_stride floats apart, or null
  int64_t residual_stride = 0;
  const float* weight = nullptr;
  float eps = 0.0f;
  int64_t num_rows = 0;
  int64_t num_channels = 0;
  float* y = nullptr;
  float* h = nullptr;  // written with a residual only; both packed
};

// h = x + residual, or x; y[n] = weight * (h[n] / sqrt(mean(h[n]^2) + eps)).
void rmsnorm(const RmsnormArgs& args, Isa isa, int num_threads);

// out[n] = silu(gate) * up, where a row of gate_up is [gate; up], 2 * num_hidden floats, packed.
void swiglu(const float* gate_up, int64_t num_rows, int64_t num_hidden, float* out, Isa isa,
            int num_threads);

// Turns the heads of each row in place by the row's angles: with h = half of head_dim, pairs being
// (i, i + h), x[i] = x[i] cos[i] - x[i + h] sin[i] and x[i + h] = x[i + h] cos[i] + x[i] sin[i].
// x: rows of num_heads x head_dim, row_stride floats apart; cos, sin: (num_rows, head_dim / 2).
void rotary(float* x, int64_t row_stride, int64_t num_rows, int64_t num_heads, int64_t head_dim,
            const float* cos, const float* sin, Isa isa, int num_threads);

}  // namespace vtts
