// A decoding step of a language model: all layers for a few rows. For a small model what lies
// between the kernels costs more than they do: one call instead of some ten a layer.
#pragma once

#include <cstdint>

#include "core/linear.h"
#include "cpu/cpu_features.h"

namespace vtts {

// Rows of a step: their intermediate values, some 20 times their channels, stay in cache.
inline constexpr int64_t kMaxStepRows = 256;

// T: float or BFloat16, what is stored. Rows of qkv are [queries; keys; values], of gate_up [gate;
// up]. keys, values: the layer's pages, (num_pages, page_size, kv heads, head_dim) packed.
template <typename T>
struct DecodeLayer {
  const T* input_norm = nullptr;
  Matrix qkv;
  const T* q_norm = nullptr;  // (head_dim), of every query head and
  const T* k_norm = nullptr;  // key head before they are turned; or null both
  Matrix output;
  const T* post_norm = nullptr;
  Matrix gate_up;
  Matrix down;
  T* keys = nullptr;
  T* values = nullptr;
};

// Where the rows are, their keys and their pages: as of PagedAttentionArgs. slots: of each row,
// page * page_size + offset. cos, sin: (num_rows, head_dim / 2).
template <typename T>
struct DecodeStepArgs {
  const DecodeLayer<T>* layers = nullptr;
  int num_layers = 0;
  const T* final_norm = nullptr;
  int64_t num_channels = 0;
  int64_t num_hidden = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float eps = 0.0f;
  float scale = 1.0f;
  const T* embeds = nullptr;  // (num_rows, num_channels) packed
  int64_t num_rows = 0;       // at most kMaxStepRows
  const float* cos = nullptr;
  const float* sin = nullptr;
  const int64_t* slots = nullptr;
  const int64_t* page_table = nullptr;
  int64_t table_stride = 0;
  const int64_t* row_starts = nullptr;
  const int64_t* num_keys = nullptr;
  int64_t num_sequences = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  T* out = nullptr;  // (num_rows, num_channels) packed, after the final norm
};

// The bits of the same kernels called one after the other. Throws std::invalid_argument as they do,
// and on a slot outside the pool or too many rows before anything is written.
template <typename T>
void decode_step(const DecodeStepArgs<T>& args, Isa isa, int num_threads);

}  // namespace vtts
