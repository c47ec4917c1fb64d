#include "core/row_ops.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/float_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace vtts {

namespace {

template <typename Row>
void for_rows(int64_t num_rows, int64_t row_values, int num_threads, const Row& row) {
  const int64_t per_task = std::max<int64_t>(1, kRowTaskValues / std::max<int64_t>(1, row_values));
  const int64_t num_tasks = ceil_div(num_rows, per_task);
  parallel_for(num_tasks, num_threads, [&](int, size_t i) {
    const int64_t begin = static_cast<int64_t>(i) * per_task;
    for (int64_t n = begin; n < std::min(num_rows, begin + per_task); ++n) row(n);
  });
}

template <typename T>
const SweepKernels<T>& sweeps(const char* what, Isa isa) {
  return std::get<SweepKernels<T>>(float_kernels(what, isa).sweeps);
}

template <typename T>
void turn(const SweepKernels<T>& kernels, T* heads, int64_t num_heads, int64_t head_dim,
          const float* cos, const float* sin) {
  const int64_t half = head_dim / 2;
  for (T* low = heads; low != heads + num_heads * head_dim; low += head_dim) {
    kernels.rotate(low, low + half, cos, sin, half);
  }
}

}  // namespace

template <typename T>
void rmsnorm(const RmsnormArgs<T>& args, Isa isa, int num_threads) {
  const SweepKernels<T>& kernels = sweeps<T>("rmsnorm", isa);
  for_rows(args.num_rows, args.num_channels, num_threads, [&](int64_t n) {
    const bool adds = args.residual != nullptr;
    kernels.rmsnorm(args.x + n * args.x_stride,
                    adds ? args.residual + n * args.residual_stride : nullptr, args.weight,
                    args.eps, args.num_channels, args.y + n * args.num_channels,
                    adds ? args.h + n * args.num_channels : nullptr);
  });
}

template <typename T>
void swiglu(const T* gate_up, int64_t num_rows, int64_t num_hidden, T* out, Isa isa,
            int num_threads) {
  const SweepKernels<T>& kernels = sweeps<T>("swiglu", isa);
  for_rows(num_rows, 2 * num_hidden, num_threads, [&](int64_t n) {
    const T* gate = gate_up + 2 * n * num_hidden;
    kernels.swiglu(gate, gate + num_hidden, num_hidden, out + n * num_hidden);
  });
}

template <typename T>
void gelu(const T* x, int64_t num_rows, int64_t num_channels, Gelu form, T* out, Isa isa,
          int num_threads) {
  const SweepKernels<T>& kernels = sweeps<T>("gelu", isa);
  for_rows(num_rows, num_channels, num_threads, [&](int64_t n) {
    kernels.gelu(x + n * num_channels, num_channels, form, out + n * num_channels);
  });
}

template <typename T>
void rotary(T* x, int64_t row_stride, int64_t num_rows, int64_t num_heads, int64_t head_dim,
            const float* cos, const float* sin, Isa isa, int num_threads) {
  const SweepKernels<T>& kernels = sweeps<T>("rotary", isa);
  for_rows(num_rows, num_heads * head_dim, num_threads, [&](int64_t n) {
    const int64_t angles = n * (head_dim / 2);
    turn(kernels, x + n * row_stride, num_heads, head_dim, cos + angles, sin + angles);
  });
}

template <typename T>
void rotary_kv(const RotaryKvArgs<T>& args, Isa isa, int num_threads) {
  const SweepKernels<T>& kernels = sweeps<T>("rotary_kv", isa);
  for (int64_t n = 0; n < args.num_rows; ++n) {
    if (args.slots[n] >= args.num_slots) {
      throw std::invalid_argument("rotary_kv: slot_mapping must be below " +
                                  std::to_string(args.num_slots) + ", got " +
                                  std::to_string(args.slots[n]));
    }
  }
  const int64_t turned = args.num_heads + args.num_kv_heads;
  const int64_t kv_values = args.num_kv_heads * args.head_dim;
  for_rows(args.num_rows, turned * args.head_dim + kv_values, num_threads, [&](int64_t n) {
    T* const row = args.qkv + n * args.row_stride;
    const int64_t angles = n * (args.head_dim / 2);
    turn(kernels, row, turned, args.head_dim, args.cos + angles, args.sin + angles);
    if (args.slots[n] < 0) return;
    const T* const keys = row + args.num_heads * args.head_dim;
    std::copy_n(keys, kv_values, args.keys + args.slots[n] * kv_values);
    std::copy_n(keys + kv_values, kv_values, args.values + args.slots[n] * kv_values);
  });
}

#define VTTS_ROW_OPS(T)                                                                         \
  template void rmsnorm(const RmsnormArgs<T>&, Isa, int);                                       \
  template void swiglu(const T*, int64_t, int64_t, T*, Isa, int);                               \
  template void gelu(const T*, int64_t, int64_t, Gelu, T*, Isa, int);                           \
  template void rotary(T*, int64_t, int64_t, int64_t, int64_t, const float*, const float*, Isa, \
                       int);                                                                    \
  template void rotary_kv(const RotaryKvArgs<T>&, Isa, int);
VTTS_ROW_OPS(float)
VTTS_ROW_OPS(BFloat16)
#undef VTTS_ROW_OPS

}  // namespace vtts
