// AVX2 tile kernel: 6 rows of 2 vectors, with two weights and an input in the 16 registers.
// Functions carry their target attribute, so nothing here runs on a machine without AVX2.
#include "core/tile_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#define VTTS_TARGET __attribute__((target("avx2,fma")))
#define VTTS_PACK pack_avx2
#define VTTS_INLINE __attribute__((target("avx2,fma"), always_inline)) inline

namespace vtts {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  VTTS_INLINE static __m256i first(int count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  }
  VTTS_INLINE static Vec zero() { return {_mm256_setzero_ps()}; }
  VTTS_INLINE static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  VTTS_INLINE static Vec load_part(const float* from, int count) {
    return {_mm256_maskload_ps(from, first(count))};
  }
  VTTS_INLINE static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  VTTS_INLINE static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  VTTS_INLINE void store_part(float* to, int count) const {
    _mm256_maskstore_ps(to, first(count), v);
  }
};

#include "cpu/tile_kernel_body.h"

// Eight lines of eight channels to eight channels of eight lines.
VTTS_INLINE void transpose(__m256 (&v)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

// The first `count` of 8 floats, an even number of them.
VTTS_INLINE void store_even(__m256 v, int64_t count, float* to) {
  if (count >= 8) {
    _mm256_storeu_ps(to, v);
    return;
  }
  __m128 half = _mm256_castps256_ps128(v);
  if (count >= 4) {
    _mm_storeu_ps(to, half);
    to += 4;
    half = _mm256_extractf128_ps(v, 1);
  }
  if (count % 4 != 0) _mm_storel_pi(reinterpret_cast<__m64*>(to), half);
}

}  // namespace

VTTS_TARGET void pack_avx2(const float* from, int64_t stride, int64_t num_lines, int64_t width,
                           int64_t num_channels, float* to) {
  int64_t c = 0;
  for (; c + 8 <= num_channels; c += 8) {
    for (int64_t n = 0; n < width; n += 8) {
      __m256 v[8];
      for (int64_t i = 0; i < 8; ++i) {
        v[i] =
            n + i < num_lines ? _mm256_loadu_ps(from + (n + i) * stride + c) : _mm256_setzero_ps();
      }
      transpose(v);
      for (int64_t i = 0; i < 8; ++i) store_even(v[i], width - n, to + (c + i) * width + n);
    }
  }
  pack_scalar(from + c, stride, num_lines, width, num_channels - c, to + c * width);
}

const TileKernel* avx2_tile_kernel() { return &kKernel; }

}  // namespace vtts

#else

namespace vtts {

const TileKernel* avx2_tile_kernel() { return nullptr; }

}  // namespace vtts

#endif
