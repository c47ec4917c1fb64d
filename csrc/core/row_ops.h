// What lies between the products, one pass a row, for values of a storage type T: float or
// BFloat16. Arithmetic is float32. Few numbers are left to the caller's thread. A row's values
// depend neither on the other rows nor on num_threads.
#pragma once

#include <cstdint>

#include "core/bfloat16.h"
#include "core/float_kernels.h"
#include "cpu/cpu_features.h"

namespace vtts {

// Values of one task: some 5 us of memory traffic, long against waking a thread.
inline constexpr int64_t kRowTaskValues = 32 << 10;

template <typename T>
struct RmsnormArgs {
  const T* x = nullptr;
  int64_t x_stride = 0;
  const T* residual = nullptr;  // rows residual_stride values apart, or null
  int64_t residual_stride = 0;
  const T* weight = nullptr;
  float eps = 0.0f;
  int64_t num_rows = 0;
  int64_t num_channels = 0;
  T* y = nullptr;
  T* h = nullptr;  // written with a residual only; both packed
};

// h = x + residual, or x; y[n] = weight * (h[n] / sqrt(mean(h[n]^2) + eps)). Rounds h, and the
// quotient before the weight is applied, as transformers does.
template <typename T>
void rmsnorm(const RmsnormArgs<T>& args, Isa isa, int num_threads);

// out[n] = silu(gate) * up, where a row of gate_up is [gate; up], 2 * num_hidden values, packed.
template <typename T>
void swiglu(const T* gate_up, int64_t num_rows, int64_t num_hidden, T* out, Isa isa,
            int num_threads);

// out[n] = gelu(x[n]), row by row, packed.
template <typename T>
void gelu(const T* x, int64_t num_rows, int64_t num_channels, Gelu form, T* out, Isa isa,
          int num_threads);

// Turns the heads of each row in place by the row's angles: with h = half of head_dim, pairs being
// (i, i + h), x[i] = x[i] cos[i] - x[i + h] sin[i] and x[i + h] = x[i + h] cos[i] + x[i] sin[i].
// x: rows of num_heads x head_dim, row_stride values apart; cos, sin: (num_rows, head_dim / 2).
template <typename T>
void rotary(T* x, int64_t row_stride, int64_t num_rows, int64_t num_heads, int64_t head_dim,
            const float* cos, const float* sin, Isa isa, int num_threads);

template <typename T>
struct RotaryKvArgs {
  T* qkv = nullptr;  // rows of [queries; keys; values], row_stride values apart
  int64_t row_stride = 0;
  int64_t num_rows = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  const float* cos = nullptr;  // (num_rows, head_dim / 2)
  const float* sin = nullptr;
  const int64_t* slots = nullptr;  // of each row; negative: written nowhere
  int64_t num_slots = 0;
  T* keys = nullptr;  // (num_slots, num_kv_heads, head_dim) packed
  T* values = nullptr;
};

// Turns queries and keys in place, then writes keys and values to their slots. Throws
// std::invalid_argument on a slot beyond the pool before anything is written.
template <typename T>
void rotary_kv(const RotaryKvArgs<T>& args, Isa isa, int num_threads);

}  // namespace vtts
