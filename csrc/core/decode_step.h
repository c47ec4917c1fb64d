// A decoding step of a language model: all layers for a few rows, float32. For a small model what
// lies between the kernels costs more than they do: one call instead of some ten a layer.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

// Matrices are (outputs, channels) row-major and packed; rows of qkv are [queries; keys; values],
// of gate_up [gate; up]. keys, values: the layer's pages, (num_pages, page_size, kv heads,
// head_dim) packed.
struct DecodeLayer {
  const float* input_norm = nullptr;
  const float* qkv = nullptr;
  const float* qkv_bias = nullptr;  // or null
  const float* q_norm = nullptr;    // (head_dim), of every query head and
  const float* k_norm = nullptr;    // key head before they are turned; or null both
  const float* output = nullptr;
  const float* post_norm = nullptr;
  const float* gate_up = nullptr;
  const float* down = nullptr;
  float* keys = nullptr;
  float* values = nullptr;
};

// Where the rows are, their keys and their pages: as of PagedAttentionArgs. slots: of each row,
// page * page_size + offset. cos, sin: (num_rows, head_dim / 2).
struct DecodeStepArgs {
  const DecodeLayer* layers = nullptr;
  int num_layers = 0;
  const float* final_norm = nullptr;
  int64_t num_channels = 0;
  int64_t num_hidden = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float eps = 0.0f;
  float scale = 1.0f;
  const float* embeds = nullptr;  // (num_rows, num_channels) packed
  int64_t num_rows = 0;           // at most kFewRows
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
  float* out = nullptr;  // (num_rows, num_channels) packed, after the final norm
};

// The bits of the same kernels called one after the other. Throws std::invalid_argument as they do,
// and on a slot outside the pool or too many rows before anything is written.
void decode_step(const DecodeStepArgs& args, Isa isa, int num_threads);

}  // namespace vtts
