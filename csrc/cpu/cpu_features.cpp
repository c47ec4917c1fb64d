#include "cpu/cpu_features.h"

#include <stdexcept>
#include <string>

#include "core/product_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vtts {
namespace {

#if defined(VTTS_EMULATED)

Isa find_best() { return Isa::kAmx; }

#elif (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

// Whether bit `bit` of register `which` (eax, ebx, ecx, edx) of a subleaf of CPUID's leaf 7 is set.
bool leaf_7(unsigned subleaf, int which, int bit) {
  unsigned registers[4] = {};
  __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]);
  return registers[which] >> bit & 1;
}

// Linux keeps the registers of tiles only for a process that asked (arch/x86: ARCH_REQ_XCOMP_PERM,
// state 18).
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  return leaf_7(0, 3, 22) && leaf_7(0, 3, 24) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

Isa find_best() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kScalar;
  if (!__builtin_cpu_supports("avx512f") || avx512_product_kernels() == nullptr) return Isa::kAvx2;
  if (!leaf_7(1, 0, 5) || avx512_bf16_product_kernels() == nullptr) return Isa::kAvx512;
  return may_use_tiles() && amx_product_kernels() != nullptr ? Isa::kAmx : Isa::kAvx512Bf16;
}

#elif defined(__aarch64__) && defined(__GNUC__)

Isa find_best() { return Isa::kNeon; }

#else

Isa find_best() { return Isa::kScalar; }

#endif

Isa best_isa() {
  static const Isa best = find_best();
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
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

bool isa_supported(Isa isa) {
  if (isa == Isa::kAuto || isa == Isa::kScalar || isa == best_isa()) return true;
  return isa != Isa::kNeon && best_isa() != Isa::kNeon && isa < best_isa();
}

Isa resolve_isa(const char* what, Isa isa) {
  if (!isa_supported(isa)) {
    throw std::invalid_argument(std::string(what) +
                                ": isa must be one that this machine has, got " + isa_name(isa));
  }
  return isa == Isa::kAuto ? best_isa() : isa;
}

}  // namespace vtts
