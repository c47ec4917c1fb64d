// AVX512_BF16 product kernels: an instruction multiplies two channels of 16 outputs. Sums take
// pairs of channels in order, in float32, small numbers below 2^-126 counting as zero.
#include "core/product_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && (__GNUC__ >= 10 || __clang_major__ >= 9)

#include <algorithm>
#include <type_traits>

#include "cpu/intrinsics_avx512.h"

#define VTTS_TARGET VTTS_TARGET_OF("avx512f,avx512bf16")
#define VTTS_INLINE VTTS_INLINE_OF("avx512f,avx512bf16")

namespace vtts {
namespace {

#include "cpu/vec_avx512.h"

// 14 rows of 2 vectors, with two weights and an input in the 32 registers.
constexpr int kTileRows = 14;
constexpr int kAccumulators = 28;

#include "cpu/product_kernels_body.h"

struct ByPair {
  using Row = BFloat16;
  using Value = BFloat16;
  static constexpr int kSteps = 1;
  static constexpr int kChannels = 2;

  VTTS_INLINE static Vec weights(const BFloat16* line, int) {
    return Vec::of_bits(_mm512_loadu_si512(line));
  }
  VTTS_INLINE static Vec input(const BFloat16* x, int) {
    int pair;
    std::memcpy(&pair, x, sizeof(pair));
    return Vec::of_bits(_mm512_set1_epi32(pair));
  }
  VTTS_INLINE static Vec add(Vec input, Vec weights, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)input.v, (__m512bh)weights.v)};
  }
};

}  // namespace

const ProductKernels* avx512_bf16_product_kernels() {
  static const ProductKernels kernels = [] {
    ProductKernels result = *avx512_product_kernels();
    result.multiply_widened = nullptr;
    result.multiply_pairs = multiply<ByPair>;
    return result;
  }();
  return &kernels;
}

}  // namespace vtts

#else

namespace vtts {

const ProductKernels* avx512_bf16_product_kernels() { return nullptr; }

}  // namespace vtts

#endif
