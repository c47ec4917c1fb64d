// The inner loops of patchify: one table of functions per instruction set, all bitwise equal.
#pragma once

#include <cstdint>

#include "core/filter.h"
#include "core/patchify.h"

namespace vtts {

// Rows given to one horizontal call; unused entries repeat a used one.
inline constexpr int kRowBatch = 4;
// Bytes (or floats) that a kernel may touch beyond the end of a row it reads or writes, on top of
// the taps' zero weights.
inline constexpr int kRowSlack = 32;

struct Normalisation {
  float mean[kChannels];
  float std[kChannels];
  float reciprocal[kChannels];  // 1 / std
  // Whether q = d * reciprocal, q + (d - q * std) * reciprocal with fused operations equals d / std
  // to the bit for all 256 values of every channel.
  bool division_is_two_fmas;
  float table[kChannels][256];  // (x - mean) / std
};

struct RowKernels {
  // kRowBatch rows of packed RGB -> rows of taps.num_outputs() packed RGB pixels.
  void (*horizontal_fixed)(const uint8_t* const* source, const Taps<int16_t>& taps,
                           uint8_t* const* target);
  void (*horizontal_pil)(const uint8_t* const* source, const Taps<int32_t>& taps,
                         uint8_t* const* target);
  void (*horizontal_float)(const uint8_t* const* source, const Taps<float>& taps,
                           float* const* target);
  // num_taps (even) rows of `num_values` values, weighted -> one row of uint8.
  void (*vertical_fixed)(const uint8_t* const* source, const int16_t* weights, int num_taps,
                         int precision, int num_values, uint8_t* target);
  // num_taps rows, weighted by integers `precision` bits up or by floats.
  void (*vertical_pil)(const uint8_t* const* source, const int32_t* weights, int num_taps,
                       int precision, int num_values, uint8_t* target);
  void (*vertical_float)(const float* const* source, const float* weights, int num_taps,
                         int num_values, uint8_t* target);
  // One row of packed RGB -> three rows, `plane_stride` bytes apart.
  void (*split_channels)(const uint8_t* source, int width, uint8_t* target, int64_t plane_stride);
  // The bytes of a patch row, `channel_values` (a multiple of 8) a channel -> normalised floats.
  void (*normalise)(const uint8_t* patch, int channel_values, const Normalisation& normalisation,
                    float* target);
};

const RowKernels& scalar_row_kernels();
// nullptr where the compiler cannot target the instruction set.
const RowKernels* avx2_row_kernels();
const RowKernels* neon_row_kernels();

}  // namespace vtts
