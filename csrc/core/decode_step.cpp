#include "core/decode_step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/linear.h"
#include "core/paged_attention.h"
#include "core/row_ops.h"
#include "core/scratch.h"

namespace vtts {
namespace {

void check(const DecodeStepArgs& args) {
  const auto reject = [](const std::string& argument, const std::string& rule, int64_t got) {
    throw std::invalid_argument("decode_step: " + argument + " must be " + rule + ", got " +
                                std::to_string(got));
  };
  if (args.num_rows < 0 || args.num_rows > kFewRows) {
    reject("num_rows", "at most " + std::to_string(kFewRows), args.num_rows);
  }
  const int64_t num_slots = args.num_pages * args.page_size;
  for (int64_t n = 0; n < args.num_rows; ++n) {
    if (args.slots[n] < 0 || args.slots[n] >= num_slots) {
      reject("slots", "inside the pool of " + std::to_string(num_slots), args.slots[n]);
    }
  }
}

}  // namespace

void decode_step(const DecodeStepArgs& args, Isa isa, int num_threads) {
  check(args);
  const int64_t rows = args.num_rows, channels = args.num_channels, hidden = args.num_hidden;
  const int64_t head_dim = args.head_dim;
  const int64_t query_floats = args.num_heads * head_dim;
  const int64_t kv_floats = args.num_kv_heads * head_dim;
  const int64_t qkv_floats = query_floats + 2 * kv_floats;

  static thread_local Scratch scratch;
  const int64_t sizes[] = {channels, channels,   channels, qkv_floats, query_floats,
                           channels, 2 * hidden, hidden,   channels};
  int64_t total = 0;
  for (const int64_t size : sizes) total += rows * size;
  float* next = scratch.floats(total);
  const auto take = [&](int64_t floats) {
    float* taken = next;
    next += rows * floats;
    return taken;
  };
  float* x = take(channels);
  float* normed = take(channels);
  float* summed = take(channels);
  float* qkv = take(qkv_floats);
  float* attended = take(query_floats);
  float* projected = take(channels);
  float* gate_up = take(2 * hidden);
  float* gated = take(hidden);
  float* added = take(channels);
  std::memcpy(x, args.embeds, sizeof(float) * rows * channels);

  const auto norm = [&](const float* from, const float* residual, const float* weight, float* y,
                        float* h) {
    RmsnormArgs<float> call;
    call.x = from;
    call.x_stride = channels;
    call.residual = residual;
    call.residual_stride = channels;
    call.weight = weight;
    call.eps = args.eps;
    call.num_rows = rows;
    call.num_channels = channels;
    call.y = y;
    call.h = h;
    rmsnorm(call, isa, rows * channels > kRowTaskValues ? num_threads : 1);
  };
  const auto norm_heads = [&](float* heads, const float* weight, int64_t num_heads) {
    RmsnormArgs<float> call;
    call.x = heads;
    call.x_stride = head_dim;
    call.weight = weight;
    call.eps = args.eps;
    call.num_rows = num_heads;
    call.num_channels = head_dim;
    call.y = heads;
    rmsnorm(call, isa, 1);
  };
  const auto multiply = [&](const float* from, int64_t from_floats, const float* weight,
                            const float* bias, int64_t outputs, float* to) {
    LinearArgs call;
    call.x = from;
    call.x_stride = from_floats;
    call.weight.values = weight;
    call.weight.bias = bias;
    call.out = to;
    call.num_rows = rows;
    call.num_channels = from_floats;
    call.num_outputs = outputs;
    linear(call, isa, num_threads);
  };

  PagedAttentionArgs attention;
  attention.queries = qkv;
  attention.query_stride = qkv_floats;
  attention.page_table = args.page_table;
  attention.table_stride = args.table_stride;
  attention.row_starts = args.row_starts;
  attention.num_keys = args.num_keys;
  attention.out = attended;
  attention.num_rows = rows;
  attention.num_sequences = args.num_sequences;
  attention.num_pages = args.num_pages;
  attention.page_size = args.page_size;
  attention.num_heads = args.num_heads;
  attention.num_kv_heads = args.num_kv_heads;
  attention.head_dim = args.head_dim;
  attention.scale = args.scale;

  for (int i = 0; i < args.num_layers; ++i) {
    const DecodeLayer& layer = args.layers[i];
    norm(x, nullptr, layer.input_norm, normed, nullptr);
    multiply(normed, channels, layer.qkv, layer.qkv_bias, qkv_floats, qkv);
    if (layer.q_norm != nullptr) {
      for (int64_t n = 0; n < rows; ++n) {
        float* queries = qkv + n * qkv_floats;
        norm_heads(queries, layer.q_norm, args.num_heads);
        norm_heads(queries + query_floats, layer.k_norm, args.num_kv_heads);
      }
    }
    rotary(qkv, qkv_floats, rows, args.num_heads + args.num_kv_heads, head_dim, args.cos, args.sin,
           isa, 1);
    for (int64_t n = 0; n < rows; ++n) {
      const float* keys = qkv + n * qkv_floats + query_floats;
      const int64_t place = args.slots[n] * kv_floats;
      std::memcpy(layer.keys + place, keys, sizeof(float) * kv_floats);
      std::memcpy(layer.values + place, keys + kv_floats, sizeof(float) * kv_floats);
    }
    attention.keys = layer.keys;
    attention.values = layer.values;
    paged_attention(attention, isa, num_threads);
    multiply(attended, query_floats, layer.output, nullptr, channels, projected);
    norm(projected, x, layer.post_norm, normed, summed);
    multiply(normed, channels, layer.gate_up, nullptr, 2 * hidden, gate_up);
    swiglu(gate_up, rows, hidden, gated, isa, 1);
    multiply(gated, hidden, layer.down, nullptr, channels, added);
    for (int64_t k = 0; k < rows * channels; ++k) x[k] = summed[k] + added[k];
  }
  norm(x, nullptr, args.final_norm, args.out, nullptr);
}

}  // namespace vtts
