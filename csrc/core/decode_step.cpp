#include "core/decode_step.h"

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/bfloat16.h"
#include "core/paged_attention.h"
#include "core/row_ops.h"

namespace vtts {
namespace {

template <typename T>
void check(const DecodeStepArgs<T>& args) {
  const auto reject = [](const std::string& argument, const std::string& rule, int64_t got) {
    throw std::invalid_argument("decode_step: " + argument + " must be " + rule + ", got " +
                                std::to_string(got));
  };
  if (args.num_rows < 0 || args.num_rows > kMaxStepRows) {
    reject("num_rows", "at most " + std::to_string(kMaxStepRows), args.num_rows);
  }
  const int64_t num_slots = args.num_pages * args.page_size;
  for (int64_t n = 0; n < args.num_rows; ++n) {
    if (args.slots[n] < 0 || args.slots[n] >= num_slots) {
      reject("slots", "inside the pool of " + std::to_string(num_slots), args.slots[n]);
    }
  }
}

}  // namespace

template <typename T>
void decode_step(const DecodeStepArgs<T>& args, Isa isa, int num_threads) {
  check(args);
  const int64_t rows = args.num_rows, channels = args.num_channels, hidden = args.num_hidden;
  const int64_t head_dim = args.head_dim;
  const int64_t query_values = args.num_heads * head_dim;
  const int64_t kv_values = args.num_kv_heads * head_dim;
  const int64_t qkv_values = query_values + 2 * kv_values;

  static thread_local std::vector<T> scratch;
  scratch.resize(rows * (4 * channels + qkv_values + query_values + 3 * hidden));
  T* next = scratch.data();
  const auto take = [&](int64_t values) {
    T* taken = next;
    next += rows * values;
    return taken;
  };
  T* const normed = take(channels);
  T* const qkv = take(qkv_values);
  T* const attended = take(query_values);
  T* const gate_up = take(2 * hidden);
  T* const gated = take(hidden);
  // The sum of what the layers have added is x + added, from the second half layer on.
  T* const added = take(channels);
  T* sum = take(channels);
  T* other = take(channels);
  const T* x = args.embeds;

  const auto threads = [&](int64_t values) { return values > kRowTaskValues ? num_threads : 1; };
  const auto norm = [&](const T* weight, bool adds, T* y) {
    RmsnormArgs<T> call;
    call.x = adds ? added : x;
    call.x_stride = call.residual_stride = call.num_channels = channels;
    call.residual = adds ? x : nullptr;
    call.weight = weight;
    call.eps = args.eps;
    call.num_rows = rows;
    call.y = y;
    call.h = sum;
    rmsnorm(call, isa, threads(rows * channels));
    if (!adds) return;
    x = sum;
    std::swap(sum, other);
  };
  const auto norm_heads = [&](T* heads, const T* weight, int64_t num_heads) {
    RmsnormArgs<T> call;
    call.x = call.y = heads;
    call.x_stride = call.num_channels = head_dim;
    call.weight = weight;
    call.eps = args.eps;
    call.num_rows = num_heads;
    rmsnorm(call, isa, 1);
  };
  LinearArgs product;
  product.type = std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16;
  product.num_rows = rows;
  const auto multiply = [&](const T* from, int64_t from_values, const Matrix& weight, T* to,
                            int64_t to_values) {
    product.x = from;
    product.x_stride = product.num_channels = from_values;
    product.weight = weight;
    product.out = to;
    product.num_outputs = to_values;
    linear(product, isa, num_threads);
  };

  RotaryKvArgs<T> rotary;
  rotary.qkv = qkv;
  rotary.row_stride = qkv_values;
  rotary.num_rows = rows;
  rotary.num_heads = args.num_heads;
  rotary.num_kv_heads = args.num_kv_heads;
  rotary.head_dim = head_dim;
  rotary.cos = args.cos;
  rotary.sin = args.sin;
  rotary.slots = args.slots;
  rotary.num_slots = args.num_pages * args.page_size;
  PagedAttentionArgs<T> attention;
  attention.queries = qkv;
  attention.query_stride = qkv_values;
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
    const DecodeLayer<T>& layer = args.layers[i];
    norm(layer.input_norm, i > 0, normed);
    multiply(normed, channels, layer.qkv, qkv, qkv_values);
    if (layer.q_norm != nullptr) {
      for (T* row = qkv; row != qkv + rows * qkv_values; row += qkv_values) {
        norm_heads(row, layer.q_norm, args.num_heads);
        norm_heads(row + query_values, layer.k_norm, args.num_kv_heads);
      }
    }
    attention.keys = rotary.keys = layer.keys;
    attention.values = rotary.values = layer.values;
    rotary_kv(rotary, isa, threads(rows * qkv_values));
    paged_attention(attention, isa, num_threads);
    multiply(attended, query_values, layer.output, added, channels);
    norm(layer.post_norm, true, normed);
    multiply(normed, channels, layer.gate_up, gate_up, 2 * hidden);
    swiglu(gate_up, rows, hidden, gated, isa, threads(2 * rows * hidden));
    multiply(gated, hidden, layer.down, added, channels);
  }
  norm(args.final_norm, args.num_layers > 0, args.out);
}

template void decode_step(const DecodeStepArgs<float>&, Isa, int);
template void decode_step(const DecodeStepArgs<BFloat16>&, Isa, int);

}  // namespace vtts
