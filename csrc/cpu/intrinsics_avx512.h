// The instructions of AVX-512 and AMX, or, for tests on machines without, functions of those names.
#pragma once

#if defined(VTTS_EMULATED)
#include "tests/avx512_emulation.h"
#define VTTS_TARGET_OF(isa)
#define VTTS_INLINE_OF(isa) inline
#else
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the header of GCC 12
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#define VTTS_TARGET_OF(isa) __attribute__((target(isa)))
#define VTTS_INLINE_OF(isa) __attribute__((target(isa), always_inline)) inline
#endif
