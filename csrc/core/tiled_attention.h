// Attention by products of tiles: of many new tokens of one sequence to its paged keys, and inside
// segments of rows that stand together.
#pragma once

#include "core/paged_attention.h"

namespace vtts {

// Does sequence `sequence` of args, which are valid; the rest as `paged_attention`.
void tiled_attention(const PagedAttentionArgs& args, int64_t sequence, Isa isa, int num_threads);

// float32. Segment s has the rows [starts[s], starts[s] + lengths[s]); each of its rows attends to
// all of them, head by head. head_dim: at most kMaxHeadDim.
struct SegmentAttentionArgs {
  const float* queries = nullptr;  // (rows, num_heads, head_dim), rows row_stride apart, as keys
  const float* keys = nullptr;     // and values are
  const float* values = nullptr;
  int64_t row_stride = 0;
  const int64_t* starts = nullptr;
  const int64_t* lengths = nullptr;
  int64_t num_segments = 0;
  int64_t num_rows = 0;
  int num_heads = 0;
  int head_dim = 0;
  float scale = 1.0f;
  float* out = nullptr;  // (rows, num_heads, head_dim) packed; rows of no segment stay as they are
};

// A row's values depend neither on other segments nor on num_threads. Throws std::invalid_argument
// on a segment outside the rows or a head_dim it does not do.
void segment_attention(const SegmentAttentionArgs& args, Isa isa, int num_threads);

}  // namespace vtts
