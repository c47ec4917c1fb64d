// AVX2 float kernels. Functions carry their target attribute, so the file needs no compiler flags
// and nothing here runs on a machine without AVX2.
#include "core/float_kernels.h"
#include "core/product_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#define VTTS_TARGET __attribute__((target("avx2,fma")))
#define VTTS_INLINE __attribute__((target("avx2,fma"), always_inline)) inline

namespace vtts {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  VTTS_INLINE static Vec zero() { return {_mm256_setzero_ps()}; }
  VTTS_INLINE static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  // The first `count` <= kLanes floats, then zeros.
  VTTS_INLINE static Vec load_part(const float* from, int count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes))};
  }
  VTTS_INLINE static Vec load(const int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
  }
  VTTS_INLINE static Vec load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  template <typename T>
  VTTS_INLINE static Vec load_part(const T* from, int count) {
    T part[kLanes] = {};
    std::copy(from, from + count, part);
    return load(part);
  }
  // The weights of 8 outputs at a step of `ByChannel`; those of BFloat16 stand in pairs.
  template <typename T>
  VTTS_INLINE static Vec load_weights(const T* from, int) {
    return load(from);
  }
  VTTS_INLINE static Vec load_weights(const BFloat16* from, int step) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i bits = step == 0 ? _mm256_slli_epi32(pairs, 16)
                                   : _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000));
    return {_mm256_castsi256_ps(bits)};
  }
  VTTS_INLINE static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  VTTS_INLINE void store(float* to) const { _mm256_storeu_ps(to, v); }
  VTTS_INLINE void store(BFloat16* to) const {
    const __m256i halves = _mm256_srli_epi32(_mm256_castps_si256(rounded().v), 16);
    const __m128i high = _mm256_extracti128_si256(halves, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(halves), high));
  }
  // The nearest bfloat16 values, ties to even; a NaN stays one.
  VTTS_INLINE Vec rounded() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 all = _mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan);
    return {_mm256_and_ps(all, _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000)))};
  }
  VTTS_INLINE static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // Eight lines of eight channels to eight channels of eight lines.
  VTTS_INLINE static void transpose(Vec (&v)[kLanes]) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
      pairs[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      v[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
      v[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
  }
  VTTS_INLINE float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_hadd_ps(half, half);
    return _mm_cvtss_f32(_mm_hadd_ps(half, half));
  }

  // exp within 2 ulp, cut off to [2^-126, 2^127]: x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two
  // parts, and the Taylor polynomial of degree 7 of exp(r).
  VTTS_INLINE static Vec exp(Vec x) {
    // x is the second operand throughout: a NaN stays one.
    const __m256 cut =
        _mm256_max_ps(_mm256_set1_ps(-87.33f), _mm256_min_ps(_mm256_set1_ps(88.02f), x.v));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(cut, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), cut);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
      y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
    }
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)))};
  }

  // 2^x for x < 128 within 1.5 ulp, cut off at 2^-126: x = n + r with |r| <= 1/2, and the
  // polynomial of degree 6 for 2^r of least relative error (2e-9) that is 1 at 0. A NaN stays one.
  VTTS_INLINE static Vec exp2(Vec x) {
    const __m256 cut = _mm256_max_ps(_mm256_set1_ps(-126.0f), x.v);
    const __m256 shift = _mm256_set1_ps(0x1.8p23f);  // of this size floats have no fraction
    const __m256 shifted = _mm256_add_ps(cut, shift);
    const __m256 r = _mm256_sub_ps(cut, _mm256_sub_ps(shifted, shift));
    __m256 y = _mm256_set1_ps(kExp2[0]);
    for (int i = 1; i < 7; ++i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExp2[i]));
    const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                           _mm256_set1_epi32(127 << 23));
    return {_mm256_mul_ps(y, _mm256_castsi256_ps(power))};
  }
};

VTTS_INLINE void prefetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0);
}

// 6 rows of 2 vectors, with two weights and an input in the 16 registers.
constexpr int kTileRows = 6;
constexpr int kAccumulators = 12;

#include "cpu/float_kernels_body.h"
#include "cpu/product_kernels_body.h"

}  // namespace

const ProductKernels* avx2_product_kernels() { return &kProducts<>; }

const FloatKernels* avx2_float_kernels() {
  static const FloatKernels kernels = {{kSweeps<float>, kSweeps<BFloat16>},
                                       {kAttention<float>, kAttention<BFloat16>}};
  return &kernels;
}

}  // namespace vtts

#else

namespace vtts {

const FloatKernels* avx2_float_kernels() { return nullptr; }
const ProductKernels* avx2_product_kernels() { return nullptr; }

}  // namespace vtts

#endif
