// paged_attention: new tokens attend to all keys of their sequence, which lie in pages.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// T: float or BFloat16; arithmetic is float32. Sequence s has the rows [row_starts[s],
// row_starts[s + 1]) of `queries` and num_keys[s] keys, its rows being the last of them: row i of n
// sees the first num_keys - n + i + 1 keys. Key j lies in page page_table[s * table_stride + j /
// page_size] at slot j % page_size.
template <typename T>
struct PagedAttentionArgs {
  const T* queries = nullptr;  // (rows, num_heads, head_dim), rows query_stride apart
  int64_t query_stride = 0;
  const T* keys = nullptr;  // (num_pages, page_size, num_kv_heads, head_dim) packed
  const T* values = nullptr;
  const int64_t* page_table = nullptr;
  int64_t table_stride = 0;
  const int64_t* row_starts = nullptr;
  const int64_t* num_keys = nullptr;
  T* out = nullptr;  // (rows, num_heads, head_dim) packed
  int64_t num_rows = 0;
  int64_t num_sequences = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int num_heads = 0;  // a multiple of num_kv_heads
  int num_kv_heads = 0;
  int head_dim = 0;  // a multiple of 8, at most kMaxHeadDim
  float scale = 1.0f;
};

// A row's values depend on its query and the keys that it sees alone. Throws std::invalid_argument
// on fewer keys than rows, a page outside the pool or the table, or a head_dim it does not do.
template <typename T>
void paged_attention(const PagedAttentionArgs<T>& args, Isa isa, int num_threads);

}  // namespace vtts
