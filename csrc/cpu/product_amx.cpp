// AMX product kernels: an instruction multiplies 16 rows of 32 channels with a panel. All rows go
// through it, however few: a sum's order is that of the instruction.
#include "core/product_kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)

#include <algorithm>
#include <cstring>

#include "cpu/intrinsics_avx512.h"

#define VTTS_TARGET VTTS_TARGET_OF("amx-tile,amx-bf16")

namespace vtts {
namespace {

constexpr int kRows = 16;      // of a tile
constexpr int kChannels = 32;  // of a tile of rows: 64 bytes

// Before an instruction that reads memory: compilers are not told which, and could leave out or
// delay what was written to it.
inline void memory_is_read() { __asm__ volatile("" ::: "memory"); }

// What LDTILECFG reads: the shapes of tiles 0 to 3, sums of two panels, rows, and two panels.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

// One or two panels at a time, a tile of rows after the other. The last channels, fewer than a tile
// holds, are filled up with zeros in copies.
VTTS_TARGET void multiply(const BFloat16* x, int64_t x_stride, int64_t num_rows,
                          const BFloat16* panels, int64_t panel_stride, int num_panels,
                          int64_t num_channels, float* sums, int64_t sums_stride, bool adds) {
  const int64_t whole = num_channels / kChannels * kChannels;
  const int left = static_cast<int>(num_channels - whole);
  alignas(64) BFloat16 last_rows[kRows * kChannels];
  alignas(64) BFloat16 last_panel[2][kChannels * kPanel];
  if (left > 0) {
    std::memset(last_rows, 0, sizeof(last_rows));
    std::memset(last_panel, 0, sizeof(last_panel));
  }
  alignas(64) float tile[2][kRows * kPanel];
  for (int64_t n = 0; n < num_rows; n += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, num_rows - n));
    Config config;
    for (const int t : {0, 1, 2, 3, 4}) config.row_bytes[t] = 64;
    for (const int t : {0, 1, 2}) config.num_rows[t] = static_cast<uint8_t>(rows);
    for (const int t : {3, 4}) config.num_rows[t] = kChannels / 2;
    memory_is_read();
    _tile_loadconfig(&config);
    const BFloat16* const from = x + n * x_stride;
    for (int i = 0; i < rows * (left > 0); ++i) {
      std::copy_n(from + i * x_stride + whole, left, last_rows + i * kChannels);
    }
    for (int p = 0; p < num_panels; p += 2) {
      const bool two = p + 1 < num_panels;
      const BFloat16* const a = panels + p * panel_stride;
      const BFloat16* const b = two ? a + panel_stride : a;
      memory_is_read();
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t c = 0; c < whole; c += kChannels) {
        _tile_loadd(2, from + c, x_stride * sizeof(BFloat16));
        _tile_loadd(3, a + c * kPanel, 64);
        _tile_loadd(4, b + c * kPanel, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      if (left > 0) {
        std::copy_n(a + whole * kPanel, left * kPanel, last_panel[0]);
        std::copy_n(b + whole * kPanel, left * kPanel, last_panel[1]);
        memory_is_read();
        _tile_loadd(2, last_rows, 64);
        _tile_loadd(3, last_panel[0], 64);
        _tile_loadd(4, last_panel[1], 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
      }
      _tile_stored(0, tile[0], 64);
      _tile_stored(1, tile[1], 64);
      for (int k = 0; k < 1 + two; ++k) {
        for (int i = 0; i < rows; ++i) {
          float* const to = sums + (n + i) * sums_stride + (p + k) * kPanel;
          const float* const sum = tile[k] + i * kPanel;
          for (int o = 0; o < kPanel; ++o) to[o] = adds ? to[o] + sum[o] : sum[o];
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

const ProductKernels* amx_product_kernels() {
  static const ProductKernels kernels = [] {
    ProductKernels result = *avx512_product_kernels();
    result.multiply_widened = nullptr;
    result.multiply_pairs = multiply;
    result.tile_rows = kRows;
    return result;
  }();
  return &kernels;
}

}  // namespace vtts

#else

namespace vtts {

const ProductKernels* amx_product_kernels() { return nullptr; }

}  // namespace vtts

#endif
