// Portable tile kernel: the same body over arrays that a compiler may vectorise.
#include <algorithm>

#include "core/tile_kernels.h"

#define VTTS_TARGET
#define VTTS_PACK pack_scalar

namespace vtts {

void pack_scalar(const float* from, int64_t stride, int64_t num_lines, int64_t width,
                 int64_t num_channels, float* to) {
  constexpr int64_t kBlock = 16;  // a cache line of each row is read whole
  for (int64_t begin = 0; begin < num_channels; begin += kBlock) {
    const int64_t end = std::min(num_channels, begin + kBlock);
    for (int64_t n = 0; n < width; ++n) {
      for (int64_t c = begin; c < end; ++c) {
        to[c * width + n] = n < num_lines ? from[n * stride + c] : 0.0f;
      }
    }
  }
}

namespace {

constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;

struct Vec {
  static constexpr int kLanes = 4;
  float v[kLanes];

  static Vec zero() { return {}; }
  static Vec load(const float* from) { return load_part(from, kLanes); }
  static Vec load_part(const float* from, int count) {
    Vec result = {};
    std::copy(from, from + count, result.v);
    return result;
  }
  static Vec broadcast(float x) {
    Vec result;
    std::fill(result.v, result.v + kLanes, x);
    return result;
  }
  static Vec add(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  void store_part(float* to, int count) const { std::copy(v, v + count, to); }
};

#include "cpu/tile_kernel_body.h"

}  // namespace

const TileKernel& scalar_tile_kernel() { return kKernel; }

}  // namespace vtts
