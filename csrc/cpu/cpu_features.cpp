#include "cpu/cpu_features.h"

#include <stdexcept>
#include <string>

namespace vtts {
namespace {

Isa best_isa() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2) return Isa::kScalar;
    return __builtin_cpu_supports("avx512f") ? Isa::kAvx512 : Isa::kAvx2;
  }();
  return best;
#elif defined(__aarch64__) && defined(__GNUC__)
  return Isa::kNeon;
#else
  return Isa::kScalar;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kScalar:
      return "scalar";
    case Isa::kNeon:
      return "neon";
    default:
      return "auto";
  }
}

bool cpu_is_intel() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool isa_supported(Isa isa) {
  if (isa == Isa::kAuto || isa == Isa::kScalar || isa == best_isa()) return true;
  return isa == Isa::kAvx2 && best_isa() == Isa::kAvx512;
}

Isa resolve_isa(const char* what, Isa isa) {
  if (!isa_supported(isa)) {
    throw std::invalid_argument(std::string(what) +
                                ": isa must be one that this machine has, got " + isa_name(isa));
  }
  return isa == Isa::kAuto ? best_isa() : isa;
}

}  // namespace vtts
