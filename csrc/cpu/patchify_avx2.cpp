// AVX2 row kernels. Functions carry their target attribute, so the file needs no compiler flags and
// nothing here runs on a machine without AVX2.
#include "core/row_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

#include <immintrin.h>

#include <cstring>

#define VTTS_AVX2 __attribute__((target("avx2,fma")))
#define VTTS_AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) inline

namespace vtts {
namespace {

// Five packed pixels of two rows, one row a lane.
VTTS_AVX2_INLINE __m256i load_two_rows(const uint8_t* a, const uint8_t* b) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
}

VTTS_AVX2_INLINE __m256i broadcast_weight_pair(const int16_t* weights) {
  int32_t pair;
  std::memcpy(&pair, weights, sizeof(pair));
  return _mm256_set1_epi32(pair);
}

// Pixels (p, p + 1) of a lane as 16-bit pairs: r_p r_p+1 g_p g_p+1 b_p b_p+1 0 0.
VTTS_AVX2_INLINE __m256i pair_mask(int p) {
  const char r = static_cast<char>(3 * p), z = -1;
  return _mm256_broadcastsi128_si256(
      _mm_setr_epi8(r, z, r + 3, z, r + 1, z, r + 4, z, r + 2, z, r + 5, z, z, z, z, z));
}

// Sums of four rows' pixel `i`, cut to 0..255: saturation is the clamp.
VTTS_AVX2_INLINE void store_pixel(__m256i sums01, __m256i sums23, int i, uint8_t* out0,
                                  uint8_t* out1, uint8_t* out2, uint8_t* out3) {
  const __m256i words = _mm256_packs_epi32(sums01, sums23);
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const uint64_t rows02 = static_cast<uint64_t>(_mm256_extract_epi64(bytes, 0));
  const uint64_t rows13 = static_cast<uint64_t>(_mm256_extract_epi64(bytes, 2));
  // Four bytes a pixel: the fourth is overwritten by the next pixel or lies in the slack.
  const uint32_t pixel0 = static_cast<uint32_t>(rows02), pixel2 = rows02 >> 32;
  const uint32_t pixel1 = static_cast<uint32_t>(rows13), pixel3 = rows13 >> 32;
  std::memcpy(out0 + kChannels * i, &pixel0, 4);
  std::memcpy(out1 + kChannels * i, &pixel1, 4);
  std::memcpy(out2 + kChannels * i, &pixel2, 4);
  std::memcpy(out3 + kChannels * i, &pixel3, 4);
}

VTTS_AVX2 void horizontal_fixed(const uint8_t* const* source, const Taps<int16_t>& taps,
                                uint8_t* const* target) {
  const __m256i first = pair_mask(0), second = pair_mask(2);
  const __m256i half = _mm256_set1_epi32(taps.precision > 0 ? 1 << (taps.precision - 1) : 0);
  const __m128i shift = _mm_cvtsi32_si128(taps.precision);
  const int num_outputs = taps.num_outputs(), stride = taps.stride;
  const int32_t* starts = taps.starts.data();
  const int16_t* weights = taps.weights.data();
  uint8_t *out0 = target[0], *out1 = target[1], *out2 = target[2], *out3 = target[3];

  for (int i = 0; i < num_outputs; ++i, weights += stride) {
    const int64_t offset = int64_t{kChannels} * starts[i];
    const uint8_t *row0 = source[0] + offset, *row1 = source[1] + offset;
    const uint8_t *row2 = source[2] + offset, *row3 = source[3] + offset;
    __m256i sum01 = half, sum23 = half;
    int k = 0;
    for (; k + 4 <= stride; k += 4) {
      const __m256i pixels01 = load_two_rows(row0 + kChannels * k, row1 + kChannels * k);
      const __m256i pixels23 = load_two_rows(row2 + kChannels * k, row3 + kChannels * k);
      const __m256i w0 = broadcast_weight_pair(weights + k);
      const __m256i w1 = broadcast_weight_pair(weights + k + 2);
      sum01 = _mm256_add_epi32(sum01, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels01, first), w0));
      sum23 = _mm256_add_epi32(sum23, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels23, first), w0));
      sum01 = _mm256_add_epi32(sum01, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels01, second), w1));
      sum23 = _mm256_add_epi32(sum23, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels23, second), w1));
    }
    if (k < stride) {
      const __m256i pixels01 = load_two_rows(row0 + kChannels * k, row1 + kChannels * k);
      const __m256i pixels23 = load_two_rows(row2 + kChannels * k, row3 + kChannels * k);
      const __m256i w0 = broadcast_weight_pair(weights + k);
      sum01 = _mm256_add_epi32(sum01, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels01, first), w0));
      sum23 = _mm256_add_epi32(sum23, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels23, first), w0));
    }
    store_pixel(_mm256_sra_epi32(sum01, shift), _mm256_sra_epi32(sum23, shift), i, out0, out1, out2,
                out3);
  }
}

// One pixel of two rows, a row a lane, as 32-bit integers; the fourth byte is the next pixel's.
VTTS_AVX2_INLINE __m256i load_two_pixels(const uint8_t* a, const uint8_t* b) {
  int32_t pixel_a, pixel_b;
  std::memcpy(&pixel_a, a, 4);
  std::memcpy(&pixel_b, b, 4);
  return _mm256_cvtepu8_epi32(
      _mm_unpacklo_epi32(_mm_cvtsi32_si128(pixel_a), _mm_cvtsi32_si128(pixel_b)));
}

VTTS_AVX2 void horizontal_pil(const uint8_t* const* source, const Taps<int32_t>& taps,
                              uint8_t* const* target) {
  const __m256i half = _mm256_set1_epi32(1 << (taps.precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(taps.precision);
  uint8_t *out0 = target[0], *out1 = target[1], *out2 = target[2], *out3 = target[3];
  for (int i = 0; i < taps.num_outputs(); ++i) {
    const int64_t offset = int64_t{kChannels} * taps.starts[i];
    const int32_t* weights = taps.weights_of(i);
    __m256i sum01 = half, sum23 = half;
    for (int k = 0; k < taps.counts[i]; ++k) {
      const int64_t at = offset + kChannels * k;
      const __m256i weight = _mm256_set1_epi32(weights[k]);
      const __m256i pixel01 = load_two_pixels(source[0] + at, source[1] + at);
      const __m256i pixel23 = load_two_pixels(source[2] + at, source[3] + at);
      sum01 = _mm256_add_epi32(sum01, _mm256_mullo_epi32(pixel01, weight));
      sum23 = _mm256_add_epi32(sum23, _mm256_mullo_epi32(pixel23, weight));
    }
    store_pixel(_mm256_sra_epi32(sum01, shift), _mm256_sra_epi32(sum23, shift), i, out0, out1, out2,
                out3);
  }
}

VTTS_AVX2 void horizontal_float(const uint8_t* const* source, const Taps<float>& taps,
                                float* const* target) {
  float *out0 = target[0], *out1 = target[1], *out2 = target[2], *out3 = target[3];
  for (int i = 0; i < taps.num_outputs(); ++i) {
    const int64_t offset = int64_t{kChannels} * taps.starts[i];
    const float* weights = taps.weights_of(i);
    __m256 sum01 = _mm256_setzero_ps(), sum23 = _mm256_setzero_ps();
    for (int k = 0; k < taps.counts[i]; ++k) {
      const int64_t at = offset + kChannels * k;
      const __m256 weight = _mm256_set1_ps(weights[k]);
      const __m256i pixel01 = load_two_pixels(source[0] + at, source[1] + at);
      const __m256i pixel23 = load_two_pixels(source[2] + at, source[3] + at);
      sum01 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(pixel01), weight, sum01);
      sum23 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(pixel23), weight, sum23);
    }
    _mm_storeu_ps(out0 + kChannels * i, _mm256_castps256_ps128(sum01));
    _mm_storeu_ps(out1 + kChannels * i, _mm256_extractf128_ps(sum01, 1));
    _mm_storeu_ps(out2 + kChannels * i, _mm256_castps256_ps128(sum23));
    _mm_storeu_ps(out3 + kChannels * i, _mm256_extractf128_ps(sum23, 1));
  }
}

VTTS_AVX2 void vertical_fixed(const uint8_t* const* source, const int16_t* weights, int num_taps,
                              int precision, int num_values, uint8_t* target) {
  const __m256i half = _mm256_set1_epi32(precision > 0 ? 1 << (precision - 1) : 0);
  const __m256i zero = _mm256_setzero_si256();
  const __m128i shift = _mm_cvtsi32_si128(precision);
  for (int i = 0; i < num_values; i += 32) {
    __m256i sum0 = half, sum1 = half, sum2 = half, sum3 = half;
    for (int k = 0; k < num_taps; k += 2) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[k] + i));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[k + 1] + i));
      const __m256i weight = broadcast_weight_pair(weights + k);
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
      sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
      sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
      sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    // Unpacking and packing both stay inside 128-bit lanes, so the order comes out right.
    const __m256i low =
        _mm256_packs_epi32(_mm256_sra_epi32(sum0, shift), _mm256_sra_epi32(sum1, shift));
    const __m256i high =
        _mm256_packs_epi32(_mm256_sra_epi32(sum2, shift), _mm256_sra_epi32(sum3, shift));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), _mm256_packus_epi16(low, high));
  }
}

// Values as bytes, cut to 0..255.
VTTS_AVX2_INLINE void store_sixteen(__m256i a, __m256i b, uint8_t* target) {
  // Packing stays inside 128-bit lanes: pieces of four come out as a0 b0 a1 b1.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
}

VTTS_AVX2_INLINE __m256i load_eight(const uint8_t* bytes) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
}

VTTS_AVX2 void vertical_pil(const uint8_t* const* source, const int32_t* weights, int num_taps,
                            int precision, int num_values, uint8_t* target) {
  const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(precision);
  for (int i = 0; i < num_values; i += 16) {
    __m256i sum0 = half, sum1 = half;
    for (int k = 0; k < num_taps; ++k) {
      const __m256i weight = _mm256_set1_epi32(weights[k]);
      sum0 = _mm256_add_epi32(sum0, _mm256_mullo_epi32(load_eight(source[k] + i), weight));
      sum1 = _mm256_add_epi32(sum1, _mm256_mullo_epi32(load_eight(source[k] + i + 8), weight));
    }
    store_sixteen(_mm256_sra_epi32(sum0, shift), _mm256_sra_epi32(sum1, shift), target + i);
  }
}

// Sixteen values at once: two chains of multiply-adds.
VTTS_AVX2 void vertical_float(const float* const* source, const float* weights, int num_taps,
                              int num_values, uint8_t* target) {
  const __m256 low = _mm256_setzero_ps(), high = _mm256_set1_ps(255.0f);
  for (int i = 0; i < num_values; i += 16) {
    __m256 sum0 = low, sum1 = low;
    for (int k = 0; k < num_taps; ++k) {
      const __m256 weight = _mm256_broadcast_ss(weights + k);
      sum0 = _mm256_fmadd_ps(_mm256_loadu_ps(source[k] + i), weight, sum0);
      sum1 = _mm256_fmadd_ps(_mm256_loadu_ps(source[k] + i + 8), weight, sum1);
    }
    store_sixteen(_mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(sum0, low), high)),
                  _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(sum1, low), high)), target + i);
  }
}

// Bytes c, c + 3, c + 6, ... of 48 packed bytes, the part that lies in the `third`-th 16 of them.
VTTS_AVX2_INLINE __m128i plane_mask(int channel, int third) {
  alignas(16) char mask[16];
  for (int x = 0; x < 16; ++x) {
    const int at = kChannels * x + channel - 16 * third;
    mask[x] = at >= 0 && at < 16 ? static_cast<char>(at) : static_cast<char>(-1);
  }
  return _mm_load_si128(reinterpret_cast<const __m128i*>(mask));
}

VTTS_AVX2 void split_channels(const uint8_t* source, int width, uint8_t* target,
                              int64_t plane_stride) {
  __m128i masks[kChannels][3];
  for (int c = 0; c < kChannels; ++c) {
    for (int third = 0; third < 3; ++third) masks[c][third] = plane_mask(c, third);
  }
  int x = 0;
  for (; x + 16 <= width; x += 16) {
    const __m128i* packed = reinterpret_cast<const __m128i*>(source + kChannels * x);
    const __m128i a = _mm_loadu_si128(packed), b = _mm_loadu_si128(packed + 1);
    const __m128i c = _mm_loadu_si128(packed + 2);
    for (int channel = 0; channel < kChannels; ++channel) {
      const __m128i plane = _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(a, masks[channel][0]),
                                                      _mm_shuffle_epi8(b, masks[channel][1])),
                                         _mm_shuffle_epi8(c, masks[channel][2]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + channel * plane_stride + x), plane);
    }
  }
  for (; x < width; ++x) {
    for (int c = 0; c < kChannels; ++c) target[c * plane_stride + x] = source[kChannels * x + c];
  }
}

VTTS_AVX2 void normalise(const uint8_t* patch, int channel_values,
                         const Normalisation& normalisation, float* target) {
  for (int c = 0; c < kChannels; ++c) {
    const __m256 mean = _mm256_set1_ps(normalisation.mean[c]);
    const __m256 std = _mm256_set1_ps(normalisation.std[c]);
    const __m256 reciprocal = _mm256_set1_ps(normalisation.reciprocal[c]);
    const int end = (c + 1) * channel_values;
    if (normalisation.division_is_two_fmas) {
      for (int i = c * channel_values; i < end; i += 8) {
        const __m256 centred = _mm256_sub_ps(_mm256_cvtepi32_ps(load_eight(patch + i)), mean);
        const __m256 guess = _mm256_mul_ps(centred, reciprocal);
        const __m256 rest = _mm256_fnmadd_ps(guess, std, centred);
        _mm256_storeu_ps(target + i, _mm256_fmadd_ps(rest, reciprocal, guess));
      }
    } else {
      for (int i = c * channel_values; i < end; i += 8) {
        const __m256 centred = _mm256_sub_ps(_mm256_cvtepi32_ps(load_eight(patch + i)), mean);
        _mm256_storeu_ps(target + i, _mm256_div_ps(centred, std));
      }
    }
  }
}

}  // namespace

const RowKernels* avx2_row_kernels() {
  static const RowKernels kernels = {horizontal_fixed, horizontal_pil, horizontal_float,
                                     vertical_fixed,   vertical_pil,   vertical_float,
                                     split_channels,   normalise};
  return &kernels;
}

}  // namespace vtts

#else

namespace vtts {

const RowKernels* avx2_row_kernels() { return nullptr; }

}  // namespace vtts

#endif
