// The inner loops in float32 beside tiles of products: one table of functions per instruction set.
//
// Every sum of one output runs in an order that depends neither on how many rows are computed
// together nor on threads: a token's numbers are the same to the bit alone, as a draft, in a batch.
#pragma once

#include <cstdint>
#include <tuple>

#include "core/bfloat16.h"
#include "core/product_kernels.h"
#include "cpu/cpu_features.h"

namespace vtts {

inline constexpr int kBlockKeys = 256;  // keys of one attention block

// Where the keys of a block and their values lie.
template <typename T>
struct BlockAddresses {
  int num_keys;
  const T* keys[kBlockKeys];
  const T* values[kBlockKeys];
};

// Rows attended to some of their keys: with scores s in powers of two, sums of w value and of w, w
// being 2^(s - maximum). maxima and sums hold a multiple of 8 floats.
struct Partials {
  float* out;
  float* maxima;
  float* sums;
};

// Attention beside its products, for queries, keys, values and results stored as T.
template <typename T>
struct AttentionKernels {
  // Panels for `ProductKernels::multiply`, of 16 keys from `first` on, [dim][key], and of 16 dims
  // of all values from `first` on, [key][dim]; keys and dims that are not there are zeros.
  void (*pack_keys)(const BlockAddresses<T>& block, int first, int head_dim, float* panel);
  void (*pack_values)(const BlockAddresses<T>& block, int first, int head_dim, float* panel);
  // to = scale * from; writes up to 7 floats more.
  void (*scale)(const T* from, float scale, int count, float* to);
  // Row n sees the first seen[n] scores: its maximum over them (-inf if none), each of them
  // becoming its weight, zeros from there up to num_keys, and the sum of the weights.
  void (*weigh)(float* scores, int64_t stride, int64_t num_rows, const int* seen, int num_keys,
                float* maxima, float* sums);
  // Adds what rows got from later keys.
  void (*join)(const Partials& into, const Partials& part, int64_t num_rows, int64_t row_floats);
  // to = from / divisor, rounded once.
  void (*divide)(const float* from, float divisor, int count, T* to);
};

// Of 2^r for |r| <= 1/2: coefficients of r^6 to r^0.
inline constexpr float kExp2[] = {1.53533620e-4f,
                                  1.33988739e-3f,
                                  9.61843692e-3f,
                                  5.55033237e-2f,
                                  2.40226477e-1f,
                                  6.93147182e-1f,
                                  1.0f};

// Of Q(a) exp(a^2 / 2), Q being the normal distribution's upper tail, as a polynomial in
// t = 1 / (1 + 0.28 a): of t^8 to t. Fitted for 0 <= a <= 14, within 1.6e-7 of Q(a) up to a = 5.
inline constexpr float kTail[] = {0.0417662353f, -0.227076171f, 0.418293634f, -0.27525541f,
                                  0.263786605f,  0.0454836722f, 0.122113719f, 0.110887716f};

// x Phi(x), Phi being the normal distribution, or what models take in its place:
// x / (1 + exp(-z)), z = 2 sqrt(2 / pi) (x + 0.044715 x^3) or 1.702 x.
enum class Gelu { kExact, kTanh, kSigmoid };

// One pass over values of a storage type T, float or BFloat16; what is written is rounded once.
template <typename T>
struct SweepKernels {
  // y = weight * (h / sqrt(mean(h^2) + eps)), h = x + residual; without a residual h is x and
  // nothing is written to it. Rounds h, and the quotient before the weight is applied, to T.
  void (*rmsnorm)(const T* x, const T* residual, const T* weight, float eps, int64_t count, T* y,
                  T* h);
  // out = gate / (1 + exp(-gate)) * up
  void (*swiglu)(const T* gate, const T* up, int64_t count, T* out);
  void (*gelu)(const T* x, int64_t count, Gelu form, T* out);
  // (low, high) -> (low * cos - high * sin, high * cos + low * sin), count values each, in place.
  void (*rotate)(T* low, T* high, const float* cos, const float* sin, int64_t count);
  float (*maximum)(const T* x, int64_t count);
  float (*sum_exp)(const T* x, int64_t count, float shift);  // of exp(x - shift)
};

struct FloatKernels {
  std::tuple<SweepKernels<float>, SweepKernels<BFloat16>> sweeps;
  std::tuple<AttentionKernels<float>, AttentionKernels<BFloat16>> attention;
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
