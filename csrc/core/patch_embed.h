// patch_embed: patchify and the product with the patch embedding's weight, rows never in memory at
// once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/patchify.h"

namespace vtts {

struct PatchEmbedArgs {
  const float* weight = nullptr;  // (num_outputs, patch_row(options.patch_px)) row-major and packed
  const float* bias = nullptr;    // (num_outputs) or null
  int64_t num_outputs = 0;
  float* out = nullptr;  // (rows, num_outputs) packed, rows in the order of patchify
};

// out = patchify(jobs) weight^T + bias in float32, with the bits of `patchify` followed by `linear`
// over all rows, whatever num_threads is: a call of at most kFewRows rows takes linear's side of
// few rows, every other call its side of many, however few rows a strip holds. Rows live in one
// strip of about 1,024 (a token row of a very wide job at least). Thread-safe. Throws
// std::invalid_argument on a bad job, option or argument before anything is written.
void patch_embed(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                 const PatchEmbedArgs& args);

}  // namespace vtts
