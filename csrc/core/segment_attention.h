// segment_attention: attention inside segments of rows that stand together.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// T: float or BFloat16; arithmetic is float32. Segment s has the rows [starts[s], starts[s] +
// lengths[s]); each of its rows attends to all of them, head by head. head_dim: at most
// kMaxHeadDim.
template <typename T>
struct SegmentAttentionArgs {
  const T* queries = nullptr;  // (rows, num_heads, head_dim), rows row_stride apart, as keys
  const T* keys = nullptr;     // and values are
  const T* values = nullptr;
  int64_t row_stride = 0;
  const int64_t* starts = nullptr;
  const int64_t* lengths = nullptr;
  int64_t num_segments = 0;
  int64_t num_rows = 0;
  int num_heads = 0;
  int head_dim = 0;
  float scale = 1.0f;
  T* out = nullptr;  // (rows, num_heads, head_dim) packed; rows of no segment stay as they are
};

// A row's values depend neither on other segments nor on num_threads. Throws std::invalid_argument
// on a segment outside the rows or a head_dim it does not do.
template <typename T>
void segment_attention(const SegmentAttentionArgs<T>& args, Isa isa, int num_threads);

}  // namespace vtts
