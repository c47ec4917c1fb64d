// bfloat16 as a storage type: the upper half of a float32. Arithmetic is float32 everywhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace vtts {

struct BFloat16 {
  uint16_t bits;

  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// The nearest, ties to even; a NaN stays one.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// `value` in a storage type, float or BFloat16.
template <typename T>
T stored(float value);
template <>
inline float stored(float value) {
  return value;
}
template <>
inline BFloat16 stored(float value) {
  return to_bfloat16(value);
}

}  // namespace vtts
