#include "core/filter.h"

#include <algorithm>
#include <cmath>

namespace vtts {
namespace {

double multiply_add(double a, double b, double c) { return a * b + c; }

float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// Keys' cubic with a = -0.5, the antialiasing variant of Pillow and ATen; in float32 fused, as
// compilers contract ATen's.
template <typename Real>
Real bicubic(Real x) {
  x = std::abs(x);
  if (x < Real(1)) {
    return multiply_add(multiply_add(Real(1.5), x, Real(-2.5)) * x, x, Real(1));
  }
  if (x < Real(2)) {
    return multiply_add(multiply_add(x - Real(5), x, Real(8)), x, Real(-4)) * Real(-0.5);
  }
  return Real(0);
}

// from_source: a tap's distance from the centre is (start + k) - centre, as PIL computes it,
// instead of ATen's k + (start - centre).
template <typename Real>
Taps<Real> real_taps(int source_extent, int target_extent, bool from_source = false) {
  const Real scale = static_cast<Real>(source_extent) / static_cast<Real>(target_extent);
  const Real support = Real(2) * std::max(scale, Real(1));
  const Real inverse_scale = scale >= Real(1) ? Real(1) / scale : Real(1);

  Taps<Real> taps;
  taps.starts.resize(target_extent);
  taps.counts.resize(target_extent);
  for (int i = 0; i < target_extent; ++i) {
    const Real center = scale * (static_cast<Real>(i) + Real(0.5));
    const int begin = std::max(static_cast<int>(center - support + Real(0.5)), 0);
    const int end = std::min(static_cast<int>(center + support + Real(0.5)), source_extent);
    taps.starts[i] = begin;
    taps.counts[i] = end - begin;
    taps.stride = std::max(taps.stride, end - begin);
  }
  taps.stride += taps.stride % 2;

  taps.weights.assign(static_cast<size_t>(target_extent) * taps.stride, Real(0));
  for (int i = 0; i < target_extent; ++i) {
    const Real center = scale * (static_cast<Real>(i) + Real(0.5));
    const Real offset = static_cast<Real>(taps.starts[i]) - center;
    Real* weights = taps.weights.data() + static_cast<size_t>(i) * taps.stride;
    Real total = Real(0);
    for (int k = 0; k < taps.counts[i]; ++k) {
      const Real x = from_source ? static_cast<Real>(taps.starts[i] + k) - center
                                 : static_cast<Real>(k) + offset;
      weights[k] = bicubic((x + Real(0.5)) * inverse_scale);
      total += weights[k];
    }
    for (int k = 0; k < taps.counts[i]; ++k) weights[k] /= total;
  }
  return taps;
}

template <typename Weight>
Taps<Weight> rounded(const Taps<double>& real, int precision) {
  Taps<Weight> taps;
  taps.stride = real.stride;
  taps.starts = real.starts;
  taps.counts = real.counts;
  taps.precision = precision;
  taps.weights.resize(real.weights.size());
  for (size_t i = 0; i < real.weights.size(); ++i) {
    const double scaled = real.weights[i] * (1 << precision);
    taps.weights[i] = static_cast<Weight>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
  }
  return taps;
}

}  // namespace

Taps<int16_t> fixed_point_taps(int source_extent, int target_extent) {
  const Taps<double> real = real_taps<double>(source_extent, target_extent);
  const double largest = std::max(0.0, *std::max_element(real.weights.begin(), real.weights.end()));
  int precision = 0;
  while (precision < 22 && static_cast<int>(0.5 + largest * (1 << (precision + 1))) < (1 << 15)) {
    ++precision;
  }
  return rounded<int16_t>(real, precision);
}

Taps<int32_t> pil_taps(int source_extent, int target_extent) {
  constexpr int kPrecision = 22;  // 32 bits less 8 of a pixel and 2 of overshoot (Resample.c)
  return rounded<int32_t>(real_taps<double>(source_extent, target_extent, true), kPrecision);
}

Taps<float> float_taps(int source_extent, int target_extent) {
  return real_taps<float>(source_extent, target_extent);
}

}  // namespace vtts
