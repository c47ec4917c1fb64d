#include "core/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdint>
#endif

namespace vtts {

void prefer_huge_pages(void* begin, size_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + num_bytes) & ~(kHugePage - 1);
  if (num_bytes < 2 * kHugePage || end <= first) return;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // refused: as before
#else
  static_cast<void>(begin);
  static_cast<void>(num_bytes);
#endif
}

}  // namespace vtts
