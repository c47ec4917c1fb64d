#include "core/row_ops.h"

#include <algorithm>
#include <cmath>

#include "core/float_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace vtts {

namespace {

template <typename Row>
void for_rows(int64_t num_rows, int64_t row_floats, int num_threads, const Row& row) {
  const int64_t per_task = std::max<int64_t>(1, kRowTaskFloats / std::max<int64_t>(1, row_floats));
  const int64_t num_tasks = ceil_div(num_rows, per_task);
  parallel_for(num_tasks, num_threads, [&](int, size_t i) {
    const int64_t begin = static_cast<int64_t>(i) * per_task;
    for (int64_t n = begin; n < std::min(num_rows, begin + per_task); ++n) row(n);
  });
}

}  // namespace

void rmsnorm(const RmsnormArgs& args, Isa isa, int num_threads) {
  const FloatKernels& kernels = float_kernels("rmsnorm", isa);
  for_rows(args.num_rows, args.num_channels, num_threads, [&](int64_t n) {
    const bool adds = args.residual != nullptr;
    kernels.rmsnorm(args.x + n * args.x_stride,
                    adds ? args.residual + n * args.residual_stride : nullptr, args.weight,
                    args.eps, args.num_channels, args.y + n * args.num_channels,
                    adds ? args.h + n * args.num_channels : nullptr);
  });
}

void swiglu(const float* gate_up, int64_t num_rows, int64_t num_hidden, float* out, Isa isa,
            int num_threads) {
  const FloatKernels& kernels = float_kernels("swiglu", isa);
  for_rows(num_rows, 2 * num_hidden, num_threads, [&](int64_t n) {
    const float* gate = gate_up + 2 * n * num_hidden;
    kernels.swiglu(gate, gate + num_hidden, num_hidden, out + n * num_hidden);
  });
}

void rotary(float* x, int64_t row_stride, int64_t num_rows, int64_t num_heads, int64_t head_dim,
            const float* cos, const float* sin, Isa isa, int num_threads) {
  const FloatKernels& kernels = float_kernels("rotary", isa);
  const int64_t half = head_dim / 2;
  for_rows(num_rows, num_heads * head_dim, num_threads, [&](int64_t n) {
    for (int64_t head = 0; head < num_heads; ++head) {
      float* low = x + n * row_stride + head * head_dim;
      kernels.rotate(low, low + half, cos + n * half, sin + n * half, half);
    }
  });
}

}  // namespace vtts
