// NEON row kernels.
#include "core/row_kernels.h"

#if defined(__aarch64__) && defined(__GNUC__)

#include <arm_neon.h>

#include <cstring>

#define VTTS_INLINE __attribute__((always_inline)) inline

namespace vtts {
namespace {

// Four packed pixels (16 bytes are read) as four lanes each: r g b 0.
VTTS_INLINE void load_four_pixels(const uint8_t* from, uint8x16_t spread, int16x8_t (&pixels)[2]) {
  const uint8x16_t lanes = vqtbl1q_u8(vld1q_u8(from), spread);
  pixels[0] = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(lanes)));
  pixels[1] = vreinterpretq_s16_u16(vmovl_high_u8(lanes));
}

// (sum + half) >> precision, cut to 0..255: both narrowings saturate.
VTTS_INLINE uint8x8_t round_fixed(int32x4_t a, int32x4_t b, int32x4_t shift) {
  return vqmovun_s16(
      vcombine_s16(vqmovn_s32(vshlq_s32(a, shift)), vqmovn_s32(vshlq_s32(b, shift))));
}

VTTS_INLINE int32x4_t half_of(int precision) {
  return vdupq_n_s32(precision > 0 ? 1 << (precision - 1) : 0);
}

// Pixel `i` of four rows.
VTTS_INLINE void store_pixel(const int32x4_t (&sums)[kRowBatch], int32x4_t shift, int i,
                             uint8_t* const* target) {
  for (int row = 0; row < kRowBatch; row += 2) {
    const uint64_t bytes =
        vget_lane_u64(vreinterpret_u64_u8(round_fixed(sums[row], sums[row + 1], shift)), 0);
    // Four bytes a pixel: the fourth is overwritten by the next pixel or lies in the slack.
    const uint32_t first = static_cast<uint32_t>(bytes), second = bytes >> 32;
    std::memcpy(target[row] + kChannels * i, &first, 4);
    std::memcpy(target[row + 1] + kChannels * i, &second, 4);
  }
}

void horizontal_fixed(const uint8_t* const* source, const Taps<int16_t>& taps,
                      uint8_t* const* target) {
  alignas(16) static const uint8_t kSpread[16] = {0, 1, 2, 255, 3, 4,  5,  255,
                                                  6, 7, 8, 255, 9, 10, 11, 255};
  const uint8x16_t spread = vld1q_u8(kSpread);
  const int32x4_t half = half_of(taps.precision), shift = vdupq_n_s32(-taps.precision);
  for (int i = 0; i < taps.num_outputs(); ++i) {
    const int64_t offset = int64_t{kChannels} * taps.starts[i];
    const int16_t* weights = taps.weights_of(i);
    int32x4_t sums[kRowBatch] = {half, half, half, half};
    int k = 0;
    for (; k + 4 <= taps.stride; k += 4) {
      const int16x4_t w = vld1_s16(weights + k);
      for (int row = 0; row < kRowBatch; ++row) {
        int16x8_t pixels[2];
        load_four_pixels(source[row] + offset + kChannels * k, spread, pixels);
        sums[row] = vmlal_lane_s16(sums[row], vget_low_s16(pixels[0]), w, 0);
        sums[row] = vmlal_high_lane_s16(sums[row], pixels[0], w, 1);
        sums[row] = vmlal_lane_s16(sums[row], vget_low_s16(pixels[1]), w, 2);
        sums[row] = vmlal_high_lane_s16(sums[row], pixels[1], w, 3);
      }
    }
    if (k < taps.stride) {  // two more: the stride is even
      for (int row = 0; row < kRowBatch; ++row) {
        int16x8_t pixels[2];
        load_four_pixels(source[row] + offset + kChannels * k, spread, pixels);
        sums[row] = vmlal_n_s16(sums[row], vget_low_s16(pixels[0]), weights[k]);
        sums[row] = vmlal_high_n_s16(sums[row], pixels[0], weights[k + 1]);
      }
    }
    store_pixel(sums, shift, i, target);
  }
}

VTTS_INLINE uint32x4_t load_pixel(const uint8_t* from) {
  uint32_t pixel;
  std::memcpy(&pixel, from, 4);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(pixel));
  return vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
}

void horizontal_pil(const uint8_t* const* source, const Taps<int32_t>& taps,
                    uint8_t* const* target) {
  const int32x4_t half = half_of(taps.precision), shift = vdupq_n_s32(-taps.precision);
  for (int i = 0; i < taps.num_outputs(); ++i) {
    const int64_t offset = int64_t{kChannels} * taps.starts[i];
    const int32_t* weights = taps.weights_of(i);
    int32x4_t sums[kRowBatch] = {half, half, half, half};
    for (int k = 0; k < taps.counts[i]; ++k) {
      for (int row = 0; row < kRowBatch; ++row) {
        const uint32x4_t pixel = load_pixel(source[row] + offset + kChannels * k);
        sums[row] = vmlaq_n_s32(sums[row], vreinterpretq_s32_u32(pixel), weights[k]);
      }
    }
    store_pixel(sums, shift, i, target);
  }
}

void horizontal_float(const uint8_t* const* source, const Taps<float>& taps, float* const* target) {
  for (int i = 0; i < taps.num_outputs(); ++i) {
    const int64_t offset = int64_t{kChannels} * taps.starts[i];
    const float* weights = taps.weights_of(i);
    float32x4_t sums[kRowBatch];
    for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
    for (int k = 0; k < taps.counts[i]; ++k) {
      const float32x4_t weight = vdupq_n_f32(weights[k]);
      for (int row = 0; row < kRowBatch; ++row) {
        const float32x4_t pixel = vcvtq_f32_u32(load_pixel(source[row] + offset + kChannels * k));
        sums[row] = vfmaq_f32(sums[row], pixel, weight);
      }
    }
    for (int row = 0; row < kRowBatch; ++row) vst1q_f32(target[row] + kChannels * i, sums[row]);
  }
}

void vertical_fixed(const uint8_t* const* source, const int16_t* weights, int num_taps,
                    int precision, int num_values, uint8_t* target) {
  const int32x4_t half = half_of(precision), shift = vdupq_n_s32(-precision);
  for (int i = 0; i < num_values; i += 16) {
    int32x4_t sums[4] = {half, half, half, half};
    for (int k = 0; k < num_taps; ++k) {
      const uint8x16_t bytes = vld1q_u8(source[k] + i);
      const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
      const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
      const int16x4_t weight = vdup_n_s16(weights[k]);
      sums[0] = vmlal_s16(sums[0], vget_low_s16(low), weight);
      sums[1] = vmlal_high_s16(sums[1], low, vcombine_s16(weight, weight));
      sums[2] = vmlal_s16(sums[2], vget_low_s16(high), weight);
      sums[3] = vmlal_high_s16(sums[3], high, vcombine_s16(weight, weight));
    }
    vst1q_u8(target + i, vcombine_u8(round_fixed(sums[0], sums[1], shift),
                                     round_fixed(sums[2], sums[3], shift)));
  }
}

void vertical_pil(const uint8_t* const* source, const int32_t* weights, int num_taps, int precision,
                  int num_values, uint8_t* target) {
  const int32x4_t half = half_of(precision), shift = vdupq_n_s32(-precision);
  for (int i = 0; i < num_values; i += 8) {
    int32x4_t sums[2] = {half, half};
    for (int k = 0; k < num_taps; ++k) {
      const int16x8_t values = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(source[k] + i)));
      sums[0] = vmlaq_n_s32(sums[0], vmovl_s16(vget_low_s16(values)), weights[k]);
      sums[1] = vmlaq_n_s32(sums[1], vmovl_high_s16(values), weights[k]);
    }
    vst1_u8(target + i, round_fixed(sums[0], sums[1], shift));
  }
}

void vertical_float(const float* const* source, const float* weights, int num_taps, int num_values,
                    uint8_t* target) {
  const float32x4_t low = vdupq_n_f32(0.0f), high = vdupq_n_f32(255.0f);
  for (int i = 0; i < num_values; i += 8) {
    float32x4_t sums[2] = {low, low};
    for (int k = 0; k < num_taps; ++k) {
      const float32x4_t weight = vdupq_n_f32(weights[k]);
      sums[0] = vfmaq_f32(sums[0], vld1q_f32(source[k] + i), weight);
      sums[1] = vfmaq_f32(sums[1], vld1q_f32(source[k] + i + 4), weight);
    }
    uint16x4_t words[2];
    for (int part = 0; part < 2; ++part) {
      words[part] = vmovn_u32(vcvtnq_u32_f32(vminq_f32(vmaxq_f32(sums[part], low), high)));
    }
    vst1_u8(target + i, vmovn_u16(vcombine_u16(words[0], words[1])));
  }
}

void split_channels(const uint8_t* source, int width, uint8_t* target, int64_t plane_stride) {
  int x = 0;
  for (; x + 16 <= width; x += 16) {
    const uint8x16x3_t planes = vld3q_u8(source + kChannels * x);
    for (int c = 0; c < kChannels; ++c) vst1q_u8(target + c * plane_stride + x, planes.val[c]);
  }
  for (; x < width; ++x) {
    for (int c = 0; c < kChannels; ++c) target[c * plane_stride + x] = source[kChannels * x + c];
  }
}

VTTS_INLINE float32x4_t normalise_four(uint16x4_t words, float32x4_t mean, float32x4_t std,
                                       float32x4_t reciprocal, bool division_is_two_fmas) {
  const float32x4_t centred = vsubq_f32(vcvtq_f32_u32(vmovl_u16(words)), mean);
  if (!division_is_two_fmas) return vdivq_f32(centred, std);
  const float32x4_t guess = vmulq_f32(centred, reciprocal);
  return vfmaq_f32(guess, vfmsq_f32(centred, guess, std), reciprocal);
}

void normalise(const uint8_t* patch, int channel_values, const Normalisation& normalisation,
               float* target) {
  const bool fused = normalisation.division_is_two_fmas;
  for (int c = 0; c < kChannels; ++c) {
    const float32x4_t mean = vdupq_n_f32(normalisation.mean[c]);
    const float32x4_t std = vdupq_n_f32(normalisation.std[c]);
    const float32x4_t reciprocal = vdupq_n_f32(normalisation.reciprocal[c]);
    for (int i = c * channel_values; i < (c + 1) * channel_values; i += 8) {
      const uint16x8_t words = vmovl_u8(vld1_u8(patch + i));
      vst1q_f32(target + i, normalise_four(vget_low_u16(words), mean, std, reciprocal, fused));
      vst1q_f32(target + i + 4, normalise_four(vget_high_u16(words), mean, std, reciprocal, fused));
    }
  }
}

}  // namespace

const RowKernels* neon_row_kernels() {
  static const RowKernels kernels = {horizontal_fixed, horizontal_pil, horizontal_float,
                                     vertical_fixed,   vertical_pil,   vertical_float,
                                     split_channels,   normalise};
  return &kernels;
}

}  // namespace vtts

#else

namespace vtts {

const RowKernels* neon_row_kernels() { return nullptr; }

}  // namespace vtts

#endif
