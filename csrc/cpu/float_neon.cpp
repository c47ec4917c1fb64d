// NEON float kernels: a vector is a pair of registers, so that bodies see the 8 lanes of AVX2.
#include "core/float_kernels.h"
#include "core/product_kernels.h"

#if defined(__aarch64__) && defined(__GNUC__)

#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#define VTTS_TARGET
#define VTTS_INLINE __attribute__((always_inline)) inline

namespace vtts {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  float32x4_t low, high;

  VTTS_INLINE static Vec zero() { return broadcast(0.0f); }
  VTTS_INLINE static Vec load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  VTTS_INLINE static Vec load(const int8_t* from) {
    const int16x8_t wide = vmovl_s8(vld1_s8(from));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
  }
  VTTS_INLINE static Vec load(const BFloat16* from) {
    const uint16x8_t bits = vld1q_u16(&from->bits);
    return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(bits)), 16)),
            vreinterpretq_f32_u32(vshlq_n_u32(vmovl_high_u16(bits), 16))};
  }
  // The weights of 8 outputs at a step of `ByChannel`; those of BFloat16 stand in pairs.
  template <typename T>
  VTTS_INLINE static Vec load_weights(const T* from, int) {
    return load(from);
  }
  VTTS_INLINE static Vec load_weights(const BFloat16* from, int step) {
    const uint32x4_t low = vreinterpretq_u32_u16(vld1q_u16(&from->bits));
    const uint32x4_t high = vreinterpretq_u32_u16(vld1q_u16(&from->bits + 8));
    const uint32x4_t mask = vdupq_n_u32(0xffff0000u);
    return {vreinterpretq_f32_u32(step == 0 ? vshlq_n_u32(low, 16) : vandq_u32(low, mask)),
            vreinterpretq_f32_u32(step == 0 ? vshlq_n_u32(high, 16) : vandq_u32(high, mask))};
  }
  // The first `count` <= kLanes values, then zeros.
  template <typename T>
  VTTS_INLINE static Vec load_part(const T* from, int count) {
    T part[kLanes] = {};
    std::copy(from, from + count, part);
    return load(part);
  }
  VTTS_INLINE static Vec broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  VTTS_INLINE void store(float* to) const {
    vst1q_f32(to, low);
    vst1q_f32(to + 4, high);
  }
  VTTS_INLINE void store(BFloat16* to) const {
    const Vec all = rounded();
    const uint16x4_t first = vshrn_n_u32(vreinterpretq_u32_f32(all.low), 16);
    vst1q_u16(&to->bits, vshrn_high_n_u32(first, vreinterpretq_u32_f32(all.high), 16));
  }
  VTTS_INLINE Vec rounded() const { return {rounded(low), rounded(high)}; }
  VTTS_INLINE static void transpose(Vec (&v)[kLanes]) {
    float values[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) v[i].store(values[i]);
    for (int i = 0; i < kLanes; ++i) {
      float line[kLanes];
      for (int j = 0; j < kLanes; ++j) line[j] = values[j][i];
      v[i] = load(line);
    }
  }
  VTTS_INLINE static Vec add(Vec a, Vec b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  VTTS_INLINE static Vec sub(Vec a, Vec b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
  }
  VTTS_INLINE static Vec mul(Vec a, Vec b) {
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
  }
  VTTS_INLINE static Vec div(Vec a, Vec b) {
    return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
  }
  VTTS_INLINE static Vec max(Vec a, Vec b) {
    return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)};
  }
  VTTS_INLINE static Vec fma(Vec a, Vec b, Vec c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  VTTS_INLINE float sum() const { return vaddvq_f32(vaddq_f32(low, high)); }
  VTTS_INLINE static Vec exp(Vec x) { return {exp(x.low), exp(x.high)}; }
  VTTS_INLINE static Vec exp2(Vec x) { return {exp2(x.low), exp2(x.high)}; }

 private:
  // The nearest bfloat16 values, ties to even; a NaN stays one.
  VTTS_INLINE static float32x4_t rounded(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t all = vbslq_u32(vceqq_f32(x, x), up, quiet);
    return vreinterpretq_f32_u32(vandq_u32(all, vdupq_n_u32(0xffff0000)));
  }
  // exp within 2 ulp, cut off to [2^-126, 2^127], as in the AVX2 kernels: x = n ln 2 + r with
  // |r| <= ln 2 / 2, ln 2 in two parts, and the Taylor polynomial of degree 7. A NaN stays one.
  VTTS_INLINE static float32x4_t exp(float32x4_t x) {
    const float32x4_t cut = vmaxq_f32(vdupq_n_f32(-87.33f), vminq_f32(vdupq_n_f32(88.02f), x));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(cut, 1.44269504f));
    float32x4_t r = vfmsq_n_f32(cut, n, 0.693359375f);
    r = vfmsq_n_f32(r, n, -2.12194440e-4f);
    float32x4_t y = vdupq_n_f32(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
      y = vfmaq_f32(vdupq_n_f32(c), y, r);
    }
    const int32x4_t power = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(y, vreinterpretq_f32_s32(vshlq_n_s32(power, 23)));
  }
  // 2^x for x < 128, cut off at 2^-126, as in the AVX2 kernels. A NaN stays one.
  VTTS_INLINE static float32x4_t exp2(float32x4_t x) {
    const float32x4_t cut = vmaxq_f32(vdupq_n_f32(-126.0f), x);
    const float32x4_t n = vrndnq_f32(cut);
    const float32x4_t r = vsubq_f32(cut, n);
    float32x4_t y = vdupq_n_f32(kExp2[0]);
    for (int i = 1; i < 7; ++i) y = vfmaq_f32(vdupq_n_f32(kExp2[i]), y, r);
    const int32x4_t power = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(y, vreinterpretq_f32_s32(vshlq_n_s32(power, 23)));
  }
};

VTTS_INLINE void prefetch(const void* from) { __builtin_prefetch(from); }

// 6 rows of 2 vectors of 2 registers each, with two weights and an input in the 32.
constexpr int kTileRows = 6;
constexpr int kAccumulators = 12;

#include "cpu/float_kernels_body.h"
#include "cpu/product_kernels_body.h"

}  // namespace

const ProductKernels* neon_product_kernels() { return &kProducts<>; }

const FloatKernels* neon_float_kernels() {
  static const FloatKernels kernels = {{kSweeps<float>, kSweeps<BFloat16>},
                                       {kAttention<float>, kAttention<BFloat16>}};
  return &kernels;
}

}  // namespace vtts

#else

namespace vtts {

const FloatKernels* neon_float_kernels() { return nullptr; }
const ProductKernels* neon_product_kernels() { return nullptr; }

}  // namespace vtts

#endif
