// The inner loops in float32 beside tiles of products: one table of functions per instruction set.
//
// Every sum of one output runs in an order that depends neither on how many rows are computed
// together nor on threads: a token's numbers are the same to the bit alone, as a draft, in a batch.
#pragma once

#include <cstdint>
#include <tuple>

#include "core/bfloat16.h"
#include "cpu/cpu_features.h"

namespace vtts {

inline constexpr int kKeyRange = 256;     // keys of one attention block
inline constexpr int kAttentionRows = 4;  // query rows of one attention block

// Query rows against a range of keys, each of head_dim floats at an address of its own.
struct AttentionBlock {
  const float* queries[kAttentionRows];
  int visible[kAttentionRows];      // row r sees the first visible[r] keys
  float* partials[kAttentionRows];  // head_dim weighted values, then maximum and sum of weights
  const float* keys[kKeyRange];
  int64_t values_behind_keys;  // floats from a key to its value
  int num_keys;
  int head_dim;
  float scale;
};

// One pass over values of a storage type T, float or BFloat16; what is written is rounded once.
template <typename T>
struct SweepKernels {
  // y = weight * (h / sqrt(mean(h^2) + eps)), h = x + residual; without a residual h is x and
  // nothing is written to it. Rounds h, and the quotient before the weight is applied, to T.
  void (*rmsnorm)(const T* x, const T* residual, const T* weight, float eps, int64_t count, T* y,
                  T* h);
  // out = gate / (1 + exp(-gate)) * up
  void (*swiglu)(const T* gate, const T* up, int64_t count, T* out);
  // (low, high) -> (low * cos - high * sin, high * cos + low * sin), count values each, in place.
  void (*rotate)(T* low, T* high, const float* cos, const float* sin, int64_t count);
  float (*maximum)(const T* x, int64_t count);
  float (*sum_exp)(const T* x, int64_t count, float shift);  // of exp(x - shift)
};

struct FloatKernels {
  // partials[r] = (sum_j w_j value_j, max_j s_j, sum_j w_j), s_j = scale * query . key_j and
  // w_j = exp(s_j - max). A row that sees nothing gets (0, -inf, 0).
  void (*attend)(const AttentionBlock& block);
  // One step of a softmax over columns of scores (num_keys, width), width being 8, 16 or 32: maxima
  // rise to those of this step, scores become exp(score - maximum), and what was summed under the
  // old maxima is to be multiplied by shares; sums are.
  void (*weigh_columns)(float* scores, int64_t num_keys, int64_t width, float* maxima, float* sums,
                        float* shares);
  std::tuple<SweepKernels<float>, SweepKernels<BFloat16>> sweeps;
};

const FloatKernels& scalar_float_kernels();
// nullptr where the compiler cannot target the instruction set.
const FloatKernels* avx2_float_kernels();
const FloatKernels* neon_float_kernels();

inline const FloatKernels& float_kernels(const char* what, Isa isa) {
  switch (resolve_isa(what, isa)) {
    case Isa::kScalar:
      return scalar_float_kernels();
    case Isa::kNeon:
      return *neon_float_kernels();
    default:
      return *avx2_float_kernels();
  }
}

}  // namespace vtts
