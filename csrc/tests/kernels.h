// What tests of kernels share: the instruction sets that run here, and numbers.
#pragma once

#include <random>
#include <vector>

#include "cpu/cpu_features.h"

namespace testing {

inline std::vector<vtts::Isa> isas() {
  std::vector<vtts::Isa> result = {vtts::Isa::kScalar};
  for (const vtts::Isa isa : {vtts::Isa::kAvx2, vtts::Isa::kAvx512, vtts::Isa::kAvx512Bf16,
                              vtts::Isa::kAmx, vtts::Isa::kNeon}) {
    if (vtts::isa_supported(isa)) result.push_back(isa);
  }
  return result;
}

inline std::vector<float> noise(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

template <typename T>
std::vector<T> stored(const std::vector<float>& values) {
  std::vector<T> result;
  for (const float value : values) result.push_back(T(value));
  return result;
}

}  // namespace testing
