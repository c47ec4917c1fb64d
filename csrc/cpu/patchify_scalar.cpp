// Portable row kernels: the reference for every instruction set.
#include <algorithm>
#include <cmath>

#include "core/row_kernels.h"

namespace vtts {
namespace {

uint8_t round_fixed(int32_t sum, int precision) {
  const int32_t half = precision > 0 ? 1 << (precision - 1) : 0;
  return static_cast<uint8_t>(std::clamp((sum + half) >> precision, 0, 255));
}

template <typename Weight>
void horizontal_integer(const uint8_t* const* source, const Taps<Weight>& taps,
                        uint8_t* const* target) {
  for (int row = 0; row < kRowBatch; ++row) {
    for (int i = 0; i < taps.num_outputs(); ++i) {
      const uint8_t* pixel = source[row] + kChannels * taps.starts[i];
      const Weight* weights = taps.weights_of(i);
      for (int c = 0; c < kChannels; ++c) {
        int32_t sum = 0;
        for (int k = 0; k < taps.counts[i]; ++k) sum += weights[k] * pixel[kChannels * k + c];
        target[row][kChannels * i + c] = round_fixed(sum, taps.precision);
      }
    }
  }
}

void horizontal_float(const uint8_t* const* source, const Taps<float>& taps, float* const* target) {
  for (int row = 0; row < kRowBatch; ++row) {
    for (int i = 0; i < taps.num_outputs(); ++i) {
      const uint8_t* pixel = source[row] + kChannels * taps.starts[i];
      const float* weights = taps.weights_of(i);
      for (int c = 0; c < kChannels; ++c) {
        float sum = 0.0f;
        for (int k = 0; k < taps.counts[i]; ++k) {
          sum = std::fma(static_cast<float>(pixel[kChannels * k + c]), weights[k], sum);
        }
        target[row][kChannels * i + c] = sum;
      }
    }
  }
}

template <typename Weight>
void vertical_integer(const uint8_t* const* source, const Weight* weights, int num_taps,
                      int precision, int num_values, uint8_t* target) {
  for (int i = 0; i < num_values; ++i) {
    int32_t sum = 0;
    for (int k = 0; k < num_taps; ++k) sum += weights[k] * source[k][i];
    target[i] = round_fixed(sum, precision);
  }
}

void vertical_float(const float* const* source, const float* weights, int num_taps, int num_values,
                    uint8_t* target) {
  for (int i = 0; i < num_values; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < num_taps; ++k) sum = std::fma(source[k][i], weights[k], sum);
    target[i] = static_cast<uint8_t>(std::nearbyint(std::clamp(sum, 0.0f, 255.0f)));
  }
}

void split_channels(const uint8_t* source, int width, uint8_t* target, int64_t plane_stride) {
  for (int x = 0; x < width; ++x) {
    for (int c = 0; c < kChannels; ++c) target[c * plane_stride + x] = source[kChannels * x + c];
  }
}

void normalise(const uint8_t* patch, int channel_values, const Normalisation& normalisation,
               float* target) {
  for (int c = 0; c < kChannels; ++c) {
    const float* table = normalisation.table[c];
    for (int i = c * channel_values; i < (c + 1) * channel_values; ++i) target[i] = table[patch[i]];
  }
}

}  // namespace

const RowKernels& scalar_row_kernels() {
  static const RowKernels kernels = {horizontal_integer<int16_t>,
                                     horizontal_integer<int32_t>,
                                     horizontal_float,
                                     vertical_integer<int16_t>,
                                     vertical_integer<int32_t>,
                                     vertical_float,
                                     split_channels,
                                     normalise};
  return kernels;
}

}  // namespace vtts
