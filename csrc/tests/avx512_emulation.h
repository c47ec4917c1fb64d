// The instructions of AVX-512, AVX512_BF16 and AMX that product kernels use, as loops, so that
// their tests run on every machine. After the vendor's description of each; a register is 64 bytes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "core/bfloat16.h"

struct __m512 {
  union {
    float f[16];
    int32_t i[16];
    uint32_t u[16];
    vtts::BFloat16 b[32];
  };
};
using __m512i = __m512;
using __m512bh = __m512;
struct __m256i {
  uint16_t u[16];
};
struct __m128i {
  int8_t i[16];
};
using __mmask16 = uint16_t;
constexpr int _CMP_UNORD_Q = 3, _MM_HINT_T0 = 3;

template <typename Lane>
__m512 each(const Lane& lane) {
  __m512 result;
  for (int i = 0; i < 16; ++i) lane(result, i);
  return result;
}

template <typename T>
T loaded(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void _mm_prefetch(const char*, int) {}
inline __m128i _mm_loadu_si128(const __m128i* from) { return loaded<__m128i>(from); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return loaded<__m256i>(from); }
inline void _mm256_storeu_si256(__m256i* to, __m256i a) { std::memcpy(to, &a, sizeof(a)); }
inline __m512 _mm512_loadu_ps(const void* from) { return loaded<__m512>(from); }
inline __m512i _mm512_loadu_si512(const void* from) { return loaded<__m512i>(from); }
inline void _mm512_storeu_ps(void* to, __m512 a) { std::memcpy(to, &a, sizeof(a)); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return a; }
inline __m512i _mm512_castps_si512(__m512 a) { return a; }
inline __m512 _mm512_set1_ps(float x) {
  return each([=](__m512& r, int i) { r.f[i] = x; });
}
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512i _mm512_set1_epi32(int x) {
  return each([=](__m512& r, int i) { r.i[i] = x; });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return each([&](__m512& r, int i) { r.i[i] = a.i[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return each([&](__m512& r, int i) { r.u[i] = a.u[i]; });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return each([&](__m512& r, int i) { r.f[i] = static_cast<float>(a.i[i]); });
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  __m256i result;
  for (int i = 0; i < 16; ++i) result.u[i] = static_cast<uint16_t>(a.u[i]);
  return result;
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return each([&](__m512& r, int i) { r.f[i] = a.f[i] + b.f[i]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return each([&](__m512& r, int i) { r.f[i] = a.f[i] * b.f[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each([&](__m512& r, int i) { r.f[i] = std::fma(a.f[i], b.f[i], c.f[i]); });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return each([&](__m512& r, int i) { r.u[i] = a.u[i] + b.u[i]; });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return each([&](__m512& r, int i) { r.u[i] = a.u[i] & b.u[i]; });
}
inline __m512i _mm512_slli_epi32(__m512i a, int bits) {
  return each([&](__m512& r, int i) { r.u[i] = a.u[i] << bits; });
}
inline __m512i _mm512_srli_epi32(__m512i a, int bits) {
  return each([&](__m512& r, int i) { r.u[i] = a.u[i] >> bits; });
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int /* _CMP_UNORD_Q */) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (std::isnan(a.f[i]) || std::isnan(b.f[i]) ? 1u : 0u) << i;
  return static_cast<__mmask16>(mask);
}
inline __m512i _mm512_mask_or_epi32(__m512i source, __mmask16 mask, __m512i a, __m512i b) {
  return each([&](__m512& r, int i) { r.u[i] = mask >> i & 1 ? a.u[i] | b.u[i] : source.u[i]; });
}
// Of each quarter of the registers: lane 0 or 2 on of both, by turns.
inline __m512 unpacked(const __m512& a, const __m512& b, int first) {
  return each(
      [&](__m512& r, int i) { r.u[i] = (i % 2 == 0 ? a : b).u[i / 4 * 4 + first + i % 4 / 2]; });
}
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return unpacked(a, b, 0); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return unpacked(a, b, 2); }
// Of each quarter two lanes of a, then two of b, by two bits each; and of the quarters themselves.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int how) {
  return each([&](__m512& r, int i) {
    r.u[i] = (i % 4 < 2 ? a : b).u[i / 4 * 4 + (how >> i % 4 * 2 & 3)];
  });
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int how) {
  return each([&](__m512& r, int i) {
    r.u[i] = (i / 4 < 2 ? a : b).u[(how >> i / 4 * 2 & 3) * 4 + i % 4];
  });
}

// Denormal numbers count as zero, before and after.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }

// Two products are added to each sum, the odd one first.
inline void add_pair(const vtts::BFloat16* a, const vtts::BFloat16* b, float* sum) {
  for (const int i : {1, 0}) {
    *sum = flushed(std::fma(flushed(a[i]), flushed(b[i]), flushed(*sum)));
  }
}
inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) add_pair(a.b + 2 * i, b.b + 2 * i, sums.f + i);
  return sums;
}

// AMX: eight tiles of up to 16 rows of up to 64 bytes; rows and bytes outside the shapes of
// LDTILECFG stay as zeros.
struct Tiles {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
  } config;
  alignas(64) uint8_t rows[8][16][64];
};
inline Tiles& tiles() {
  static thread_local Tiles all = {};
  return all;
}
inline void _tile_loadconfig(const void* from) {
  tiles() = {};
  std::memcpy(&tiles().config, from, sizeof(tiles().config));
}
inline void _tile_release() { tiles() = {}; }
inline void _tile_zero(int tile) { std::memset(tiles().rows[tile], 0, sizeof(tiles().rows[tile])); }
inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  _tile_zero(tile);
  for (int i = 0; i < tiles().config.num_rows[tile]; ++i) {
    std::memcpy(tiles().rows[tile][i], static_cast<const uint8_t*>(from) + i * stride,
                tiles().config.row_bytes[tile]);
  }
}
inline void _tile_stored(int tile, void* to, int64_t stride) {
  for (int i = 0; i < tiles().config.num_rows[tile]; ++i) {
    std::memcpy(static_cast<uint8_t*>(to) + i * stride, tiles().rows[tile][i],
                tiles().config.row_bytes[tile]);
  }
}
inline void _tile_dpbf16ps(int sums, int a, int b) {
  const auto& config = tiles().config;
  for (int m = 0; m < config.num_rows[sums]; ++m) {
    auto* const row = reinterpret_cast<float*>(tiles().rows[sums][m]);
    const auto* const pairs = reinterpret_cast<const vtts::BFloat16*>(tiles().rows[a][m]);
    float parts[16][2] = {};  // even and odd channels by themselves
    for (int k = 0; k < config.row_bytes[a] / 4; ++k) {
      const auto* const line = reinterpret_cast<const vtts::BFloat16*>(tiles().rows[b][k]);
      for (int n = 0; n < config.row_bytes[sums] / 4; ++n) {
        for (const int i : {0, 1}) {
          float& sum = parts[n][i];
          sum = flushed(std::fma(flushed(pairs[2 * k + i]), flushed(line[2 * n + i]), sum));
        }
      }
    }
    for (int n = 0; n < config.row_bytes[sums] / 4; ++n) {
      row[n] = flushed(flushed(row[n]) + flushed(parts[n][0] + parts[n][1]));
    }
  }
}
