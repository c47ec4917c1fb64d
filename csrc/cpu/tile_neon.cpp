// NEON tile kernel: 6 rows of 4 vectors, with four weights and an input in the 32 registers.
#include "core/tile_kernels.h"

#if defined(__aarch64__) && defined(__GNUC__)

#include <arm_neon.h>

#include <algorithm>

#define VTTS_TARGET
#define VTTS_PACK pack_scalar
#define VTTS_INLINE __attribute__((always_inline)) inline

namespace vtts {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;

struct Vec {
  static constexpr int kLanes = 4;
  float32x4_t v;

  VTTS_INLINE static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  VTTS_INLINE static Vec load(const float* from) { return {vld1q_f32(from)}; }
  VTTS_INLINE static Vec load_part(const float* from, int count) {
    float part[kLanes] = {};
    std::copy(from, from + count, part);
    return load(part);
  }
  VTTS_INLINE static Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
  VTTS_INLINE static Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  VTTS_INLINE static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  VTTS_INLINE void store_part(float* to, int count) const {
    float part[kLanes];
    vst1q_f32(part, v);
    std::copy(part, part + count, to);
  }
};

#include "cpu/tile_kernel_body.h"

}  // namespace

const TileKernel* neon_tile_kernel() { return &kKernel; }

}  // namespace vtts

#else

namespace vtts {

const TileKernel* neon_tile_kernel() { return nullptr; }

}  // namespace vtts

#endif
