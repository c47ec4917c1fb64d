#include "core/linear.h"

#include <algorithm>

#include "core/float_kernels.h"
#include "core/parallel.h"

namespace vtts {
namespace {

// What one task reads: some 10 us at the speed of memory, long against claiming a task.
constexpr int64_t kTaskBytes = 128 << 10;

}  // namespace

void linear(const LinearArgs& args, Isa isa, int num_threads) {
  const FloatKernels& kernels = float_kernels("linear", isa);
  const int64_t row_bytes = std::max<int64_t>(1, args.num_channels) * sizeof(float);
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / row_bytes);
  const int64_t num_tasks = (args.num_outputs + per_task - 1) / per_task;
  parallel_for(num_tasks, num_threads, [&](int, size_t i) {
    const int64_t begin = static_cast<int64_t>(i) * per_task;
    kernels.linear(args.x, args.x_stride, static_cast<int>(args.num_rows), args.weight, args.bias,
                   args.num_channels, begin, std::min(args.num_outputs, begin + per_task), args.out,
                   args.num_outputs);
  });
}

}  // namespace vtts
