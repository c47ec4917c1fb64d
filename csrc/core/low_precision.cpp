#include "core/low_precision.h"

#include <cmath>
#include <cstring>

#include "core/bfloat16.h"
#include "core/patchify.h"

namespace vtts {
namespace {

uint16_t to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {
    // Below the normal numbers the step is 2^-24; the product is exact, the rounding to even.
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t rest = bits & 0x7fffffff;
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}

float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? INFINITY : NAN;
  } else {
    magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace

uint16_t to_16_bits(float value, DType type) {
  return type == DType::kFloat16 ? to_float16(value) : BFloat16(value).bits;
}

float from_16_bits(uint16_t bits, DType type) {
  if (type == DType::kFloat16) return from_float16(bits);
  BFloat16 value;
  value.bits = bits;
  return value;
}

void fold_patch_embed(const float* weight, const float* bias, int64_t num_outputs,
                      const PatchifyOptions& options, DType type, void* folded,
                      float* folded_bias) {
  const int64_t row_size = patch_row(options.patch_px);
  for (int64_t n = 0; n < num_outputs; ++n) {
    double moved = 0.0;
    for (int64_t k = 0; k < row_size; ++k) {
      const int64_t at = n * row_size + k;
      const int channel = static_cast<int>(k / (row_size / kChannels));
      float value = weight[at] / options.std[channel];
      if (type == DType::kFloat32) {
        static_cast<float*>(folded)[at] = value;
      } else {
        const uint16_t rounded = to_16_bits(value, type);
        static_cast<uint16_t*>(folded)[at] = rounded;
        value = from_16_bits(rounded, type);
      }
      moved += static_cast<double>(value) * options.mean[channel];
    }
    folded_bias[n] = static_cast<float>((bias == nullptr ? 0.0 : bias[n]) - moved);
  }
}

}  // namespace vtts
