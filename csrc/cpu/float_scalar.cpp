// Portable float kernels: the same bodies over arrays that a compiler may vectorise.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "core/float_kernels.h"
#include "core/product_kernels.h"

#define VTTS_TARGET
#define VTTS_INLINE inline

namespace vtts {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  float v[kLanes];

  static Vec zero() { return {}; }
  template <typename T>
  static Vec load(const T* from) {
    return load_part(from, kLanes);
  }
  template <typename T>
  static Vec load_part(const T* from, int count) {
    Vec result = {};
    for (int i = 0; i < count; ++i) result.v[i] = from[i];
    return result;
  }
  // The weights of 8 outputs at a step of `ByChannel`; those of BFloat16 stand in pairs.
  template <typename T>
  static Vec load_weights(const T* from, int) {
    return load(from);
  }
  static Vec load_weights(const BFloat16* from, int step) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = from[2 * i + step];
    return result;
  }
  static Vec broadcast(float x) {
    Vec result;
    std::fill(result.v, result.v + kLanes, x);
    return result;
  }
  template <typename T>
  void store(T* to) const {
    for (int i = 0; i < kLanes; ++i) to[i] = T(v[i]);
  }
  Vec rounded() const {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.v[i] = BFloat16(v[i]);
    return result;
  }
  static Vec add(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Vec sub(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static Vec mul(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Vec div(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static Vec max(Vec a, Vec b) {  // b where one is a NaN, as of AVX2
    for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static Vec exp(Vec a) {
    for (float& x : a.v) x = std::exp(x);
    return a;
  }
  static Vec exp2(Vec a) {
    for (float& x : a.v) x = std::exp2(x);
    return a;
  }
  static void transpose(Vec (&all)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) std::swap(all[i].v[j], all[j].v[i]);
    }
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  float sum() const {
    float half[kLanes / 2];
    for (int i = 0; i < kLanes / 2; ++i) half[i] = v[i] + v[i + kLanes / 2];
    return (half[0] + half[1]) + (half[2] + half[3]);
  }
};

inline void prefetch(const void*) {}

constexpr int kTileRows = 4;
constexpr int kAccumulators = 8;

#include "cpu/float_kernels_body.h"
#include "cpu/product_kernels_body.h"

}  // namespace

const ProductKernels& scalar_product_kernels() { return kProducts<>; }

const FloatKernels& scalar_float_kernels() {
  static const FloatKernels kernels = {{kSweeps<float>, kSweeps<BFloat16>},
                                       {kAttention<float>, kAttention<BFloat16>}};
  return kernels;
}

}  // namespace vtts
