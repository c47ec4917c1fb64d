// AVX-512 product kernels. Functions carry their target attribute, so nothing here runs on a
// machine without it.
#include "core/product_kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)

#include <algorithm>
#include <type_traits>

#include "cpu/intrinsics_avx512.h"

#define VTTS_TARGET VTTS_TARGET_OF("avx512f")
#define VTTS_INLINE VTTS_INLINE_OF("avx512f")

namespace vtts {
namespace {

#include "cpu/vec_avx512.h"

// 14 rows of 2 vectors, with two weights and an input in the 32 registers.
constexpr int kTileRows = 14;
constexpr int kAccumulators = 28;

#include "cpu/product_kernels_body.h"

}  // namespace

const ProductKernels* avx512_product_kernels() { return &kProducts<>; }

}  // namespace vtts

#else

namespace vtts {

const ProductKernels* avx512_product_kernels() { return nullptr; }

}  // namespace vtts

#endif
