// Attention of many new tokens of one sequence, a prefill: products of tiles instead of rows.
#pragma once

#include "core/paged_attention.h"

namespace vtts {

// Does sequence `sequence` of args, which are valid; the rest as `paged_attention`.
void tiled_attention(const PagedAttentionArgs& args, int64_t sequence, Isa isa, int num_threads);

}  // namespace vtts
