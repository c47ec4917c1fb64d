// The upper half of a float32: how weights and activations are stored. Arithmetic is in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace vtts {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  // Rounds to nearest, ties to even; a NaN stays one.
  explicit BFloat16(float value) {
    uint32_t whole;
    std::memcpy(&whole, &value, sizeof(whole));
    const bool is_nan = (whole & 0x7fffffff) > 0x7f800000;
    bits = static_cast<uint16_t>(is_nan ? whole >> 16 | 0x40
                                        : (whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t whole = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &whole, sizeof(value));
    return value;
  }
};

static_assert(sizeof(BFloat16) == 2, "as in memory of tensors");

}  // namespace vtts
