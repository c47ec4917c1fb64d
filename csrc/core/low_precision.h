// The three floating-point types of weights and rows, and folding a normalisation into a weight.
#pragma once

#include <cstdint>

#include "core/patchify.h"

namespace vtts {

enum class DType { kFloat32, kFloat16, kBFloat16 };

inline int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// The 16-bit pattern nearest to `value`, ties to even, and back; float16 or bfloat16.
uint16_t to_16_bits(float value, DType type);
float from_16_bits(uint16_t bits, DType type);

// Host. Moves (x - mean[c]) / std[c] of patchify's rows (0..255 units, columns channel by channel)
// into weight and bias, so that pixel values 0..255, exact in every type, can be multiplied:
//   folded[n][k] = round_to(type, weight[n][k] / std[c(k)])       (num_outputs, row) of type
//   folded_bias[n] = bias[n] - sum_k folded[n][k] * mean[c(k)]    (num_outputs), summed in double
// row = patch_row(options.patch_px). The bias comes from the rounded weight: from the unrounded
// one, the rounding of a row's weights would be multiplied by the mean and stay (2 to 11 times the
// error). `bias` may be null.
void fold_patch_embed(const float* weight, const float* bias, int64_t num_outputs,
                      const PatchifyOptions& options, DType type, void* folded, float* folded_bias);

}  // namespace vtts
