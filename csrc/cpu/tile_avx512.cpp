// AVX-512 tile kernel: 14 rows of 2 vectors, with two weights and an input in the 32 registers.
// Functions carry their target attribute, so nothing here runs on a machine without AVX-512.
#include "core/tile_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#define VTTS_TARGET __attribute__((target("avx512f")))
#define VTTS_PACK pack_avx2
#define VTTS_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace vtts {
namespace {

constexpr int kTileRows = 14;
constexpr int kTileVecs = 2;

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  VTTS_INLINE static __mmask16 first(int count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }
  VTTS_INLINE static Vec zero() { return {_mm512_setzero_ps()}; }
  VTTS_INLINE static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  VTTS_INLINE static Vec load_part(const float* from, int count) {
    return {_mm512_maskz_loadu_ps(first(count), from)};
  }
  VTTS_INLINE static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  VTTS_INLINE static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  VTTS_INLINE static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  VTTS_INLINE void store_part(float* to, int count) const {
    _mm512_mask_storeu_ps(to, first(count), v);
  }
};

#include "cpu/tile_kernel_body.h"

}  // namespace

const TileKernel* avx512_tile_kernel() { return &kKernel; }

}  // namespace vtts

#else

namespace vtts {

const TileKernel* avx512_tile_kernel() { return nullptr; }

}  // namespace vtts

#endif
