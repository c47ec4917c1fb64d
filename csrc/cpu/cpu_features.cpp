#include "cpu/cpu_features.h"

#include <stdexcept>
#include <string>

namespace vtts {

bool cpu_has_avx2_fma() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }();
  return has;
#else
  return false;
#endif
}

bool isa_supported(Isa isa) { return isa != Isa::kAvx2 || cpu_has_avx2_fma(); }

Isa resolve_isa(const char* what, Isa isa) {
  if (!isa_supported(isa)) {
    throw std::invalid_argument(std::string(what) +
                                ": isa must be one that this machine has, got avx2");
  }
  if (isa != Isa::kAuto) return isa;
  return cpu_has_avx2_fma() ? Isa::kAvx2 : Isa::kScalar;
}

}  // namespace vtts
