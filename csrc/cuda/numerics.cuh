// The arithmetic of the resize kernels on the device: what csrc/cpu computes, to the bit.
#pragma once

#include "cuda/device.h"
#include "cuda/plan.h"

namespace vtts {

// Reads words of shared memory from any byte on.
class Words {
 public:
  __device__ explicit Words(const uint8_t* from) {
    const auto address = reinterpret_cast<uintptr_t>(from);
    next_ = reinterpret_cast<const uint32_t*>(from - (address & 3));
    shift_ = static_cast<int>(address & 3) * 8;
    low_ = *next_;
  }
  __device__ uint32_t next() {
    const uint32_t high = *++next_;
    const uint32_t word = __funnelshift_r(low_, high, shift_);
    low_ = high;
    return word;
  }

 private:
  const uint32_t* next_;
  int shift_;
  uint32_t low_;
};

// Rounded to uint8 after each pass.
struct DeviceIntegers {
  using Stage = uint8_t;
  using Sum = int;

  __device__ static Stage staged(Sum sum, int precision) {
    const int half = precision > 0 ? 1 << (precision - 1) : 0;
    return static_cast<Stage>(min(max((sum + half) >> precision, 0), 255));
  }
  __device__ static uint32_t finished(Sum sum, int precision) { return staged(sum, precision); }
  __device__ static uint32_t finished(const Sum (&sums)[4], int precision) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= uint32_t{staged(sums[i], precision)} << (8 * i);
    return bytes;
  }
};

// int16 weights.
struct DeviceFixedPoint : DeviceIntegers {
  using FourTaps = uint2;
  static constexpr int kTapsPerWord = 2;

  // Adds four taps (two, unless kFour) of packed pixels to the sums of the three channels.
  template <bool kFour>
  __device__ static void add(const uint32_t (&pixels)[3], const FourTaps& weights,
                             Sum (&sums)[kChannels]) {
    const uint32_t a = pixels[0], b = pixels[1], c = pixels[2];
    const uint32_t red = __byte_perm(a, b, 0x0630), green = __byte_perm(a, b, 0x0741),
                   blue = __byte_perm(a, b, 0x0052);
    sums[0] = dot_low(weights.x, red, sums[0]);
    sums[1] = dot_low(weights.x, green, sums[1]);
    sums[2] = dot_low(weights.x, blue, sums[2]);
    if (!kFour) return;
    sums[0] = dot_high(weights.y, __byte_perm(red, c, 0x5210), sums[0]);
    sums[1] = dot_high(weights.y, __byte_perm(green, c, 0x6210), sums[1]);
    sums[2] = dot_high(weights.y, __byte_perm(blue, c, 0x7410), sums[2]);
  }

  // Four neighbouring values of a resized row. The stage has a row more than is used.
  template <int kTokenValues>
  __device__ static uint32_t sum_columns(const Stage* stage, const uint32_t* weights, int count,
                                         int precision) {
    Sum sums[4] = {};
    for (int k = 0; k < count; k += 2) {
      const uint32_t weight = __ldg(weights + k / 2);
      const uint32_t a = *reinterpret_cast<const uint32_t*>(stage);
      const uint32_t b = *reinterpret_cast<const uint32_t*>(stage + kTokenValues);
      const uint32_t low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
      sums[0] = dot_low(weight, low, sums[0]);
      sums[1] = dot_high(weight, low, sums[1]);
      sums[2] = dot_low(weight, high, sums[2]);
      sums[3] = dot_high(weight, high, sums[3]);
      stage += 2 * kTokenValues;
    }
    return finished(sums, precision);
  }

  __device__ static Sum add_pixel(uint32_t pixel, uint32_t weights, int k, Sum sum) {
    return sum + static_cast<int>(pixel) * static_cast<int16_t>(weights >> (k % 2 * 16));
  }
  __device__ static Sum add_staged(Stage value, uint32_t weights, int k, Sum sum) {
    return add_pixel(value, weights, k, sum);
  }
};

// PIL's weights of 22 bits: 30 bits a product.
struct DevicePil : DeviceIntegers {
  using FourTaps = uint4;
  static constexpr int kTapsPerWord = 1;

  __device__ static int pixel(uint32_t word, int index) {
    return static_cast<int>(word >> (8 * index) & 255);
  }

  template <bool kFour>
  __device__ static void add(const uint32_t (&pixels)[3], const FourTaps& weights,
                             Sum (&sums)[kChannels]) {
    const uint32_t each[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int i = 0; i < (kFour ? 12 : 6); ++i) {
      sums[i % 3] = add_pixel(pixel(pixels[i / 4], i % 4), each[i / 3], 0, sums[i % 3]);
    }
  }

  template <int kTokenValues>
  __device__ static uint32_t sum_columns(const Stage* stage, const uint32_t* weights, int count,
                                         int precision) {
    Sum sums[4] = {};
    for (int k = 0; k < count; ++k) {
      const uint32_t weight = __ldg(weights + k);
      const uint32_t values = *reinterpret_cast<const uint32_t*>(stage);
      for (int i = 0; i < 4; ++i) sums[i] = add_pixel(pixel(values, i), weight, 0, sums[i]);
      stage += kTokenValues;
    }
    return finished(sums, precision);
  }

  __device__ static Sum add_pixel(uint32_t value, uint32_t weight, int, Sum sum) {
    return sum + static_cast<int>(value) * static_cast<int>(weight);
  }
  __device__ static Sum add_staged(Stage value, uint32_t weight, int, Sum sum) {
    return add_pixel(value, weight, 0, sum);
  }
};

// float32 with fused multiply-adds in both passes, rounded once.
struct DeviceFloatingPoint {
  using Stage = float;
  using Sum = float;
  using FourTaps = float4;
  static constexpr int kTapsPerWord = 1;

  // Byte `index` of `word` as a number, times 2^-133 (plan.h).
  __device__ static float pixel(uint32_t word, int index) {
    return __uint_as_float(__byte_perm(word, 0, 0x4044 | index << 8));
  }

  template <bool kFour>
  __device__ static void add(const uint32_t (&pixels)[3], const FourTaps& weights,
                             Sum (&sums)[kChannels]) {
    const float each[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int i = 0; i < (kFour ? 12 : 6); ++i) {
      sums[i % 3] = __fmaf_ieee_rn(pixel(pixels[i / 4], i % 4), each[i / 3], sums[i % 3]);
    }
  }

  __device__ static Stage staged(Sum sum, int) { return __fmul_rn(sum, kColumnUnscale); }

  template <int kTokenValues>
  __device__ static uint32_t sum_columns(const Stage* stage, const uint32_t* weights, int count,
                                         int precision) {
    Sum sums[4] = {};
    for (int k = 0; k < count; ++k) {
      const float weight = __uint_as_float(__ldg(weights + k));
      const float4 values = *reinterpret_cast<const float4*>(stage);
      sums[0] = __fmaf_ieee_rn(values.x, weight, sums[0]);
      sums[1] = __fmaf_ieee_rn(values.y, weight, sums[1]);
      sums[2] = __fmaf_ieee_rn(values.z, weight, sums[2]);
      sums[3] = __fmaf_ieee_rn(values.w, weight, sums[3]);
      stage += kTokenValues;
    }
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= finished(sums[i], precision) << (8 * i);
    return bytes;
  }

  __device__ static Sum add_pixel(uint32_t value, uint32_t weight, int, Sum sum) {
    return __fmaf_ieee_rn(pixel(value, 0), __uint_as_float(weight), sum);
  }
  __device__ static Sum add_staged(Stage value, uint32_t weight, int, Sum sum) {
    return __fmaf_ieee_rn(value, __uint_as_float(weight), sum);
  }
  // Clamped and rounded half to even: floats from 2^23 on are the integers.
  __device__ static uint32_t finished(Sum sum, int) {
    const float clamped = fminf(fmaxf(sum, 0.0f), 255.0f);
    return __float_as_uint(__fadd_rn(clamped, 8388608.0f)) & 255;
  }
};

template <typename Use>
__device__ void with_numerics(Resize resize, const Use& use) {
  if (resize == Resize::kFixed) {
    use(DeviceFixedPoint());
  } else if (resize == Resize::kFloat) {
    use(DeviceFloatingPoint());
  } else {
    use(DevicePil());
  }
}

}  // namespace vtts
