#include "core/linear_int8.h"

#include <algorithm>

#include "core/float_kernels.h"
#include "core/linear.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace vtts {
namespace {

// Weights of one task: some 10 us of converting and multiplying one row, long against claiming it.
constexpr int64_t kTaskWeights = 64 << 10;

}  // namespace

void linear_int8(const LinearInt8Args& args, Isa isa, int num_threads) {
  const FloatKernels& kernels = float_kernels("linear_int8", isa);
  const int64_t channels = args.num_channels;
  if (args.num_rows <= kFewRows) {
    // The weights are read in place, once for all rows.
    const int64_t per_task = std::max<int64_t>(1, kTaskWeights / std::max<int64_t>(1, channels));
    parallel_for(ceil_div(args.num_outputs, per_task), num_threads, [&](int, size_t i) {
      const int64_t begin = static_cast<int64_t>(i) * per_task;
      kernels.linear_int8(args.x, args.x_stride, static_cast<int>(args.num_rows), args.weight,
                          args.scale, args.bias, channels, begin,
                          std::min(args.num_outputs, begin + per_task), args.out, args.num_outputs);
    });
    return;
  }
  LinearArgs wide;
  wide.x = args.x;
  wide.x_stride = args.x_stride;
  wide.bias = args.bias;
  wide.out = args.out;
  wide.num_rows = args.num_rows;
  wide.num_channels = channels;
  wide.num_outputs = args.num_outputs;
  wide.read_weight = [&](int64_t output, int64_t count, int64_t channel, int64_t num, float* to) {
    for (int64_t i = 0; i < count; ++i) {
      kernels.dequantize(args.weight + (output + i) * channels + channel, args.scale[output + i],
                         num, to + i * num);
    }
  };
  linear(wide, isa, num_threads);
}

}  // namespace vtts
