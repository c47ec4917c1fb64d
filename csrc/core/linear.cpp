#include "core/linear.h"

#include <algorithm>

#include "core/float_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tile_kernels.h"

namespace vtts {
namespace {

// What one task reads: some 10 us at the speed of memory, long against claiming a task.
constexpr int64_t kTaskBytes = 128 << 10;

// Few rows: the weights are read in place, once for all of them.
void few_rows(const LinearArgs& args, Isa isa, int num_threads) {
  const FloatKernels& kernels = float_kernels("linear", isa);
  const int64_t row_bytes = std::max<int64_t>(1, args.num_channels) * sizeof(float);
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / row_bytes);
  const int64_t num_tasks = ceil_div(args.num_outputs, per_task);
  parallel_for(num_tasks, num_threads, [&](int, size_t i) {
    const int64_t begin = static_cast<int64_t>(i) * per_task;
    kernels.linear(args.x, args.x_stride, static_cast<int>(args.num_rows), args.weight, nullptr,
                   args.bias, args.num_channels, begin,
                   std::min(args.num_outputs, begin + per_task), args.out, args.num_outputs);
  });
}

// Channels of one run over the tiles: a panel of weights (128 KiB) then stays in the second-level
// cache. 256 to 1,536 were within 5 % of each other.
constexpr int64_t kMostChannels = 1024;
// Channels that a sum runs over before it is added to the result: a sum of them all would err
// more than twice as much as torch's, which are short too.
constexpr int64_t kChannelsOfSum = 256;
// Rows packed at once: 16 MiB with as many channels.
constexpr int64_t kMostRows = 4096;

// Rows and channels of one run over the tiles.
struct Block {
  int64_t first_row, num_rows, first_channel, num_channels;
};

void tiles_of_block(const LinearArgs& args, const Block& block, const TileKernel& kernel,
                    int num_threads) {
  const int64_t tile_rows = kernel.num_rows, tile_outputs = kernel.num_outputs;
  const int64_t num_tiles = ceil_div(block.num_rows, tile_rows);
  const int64_t tile_floats = tile_rows * block.num_channels;
  thread_local Scratch rows_scratch;
  float* const rows = rows_scratch.floats(num_tiles * tile_floats);
  parallel_for(num_tiles, num_threads, [&](int, size_t tile) {
    const int64_t n = static_cast<int64_t>(tile) * tile_rows;
    kernel.pack(args.x + (block.first_row + n) * args.x_stride + block.first_channel, args.x_stride,
                std::min(tile_rows, block.num_rows - n), tile_rows, block.num_channels,
                rows + tile * tile_floats);
  });
  // A task is a panel of outputs for all rows, so that every weight is packed once.
  parallel_for(ceil_div(args.num_outputs, tile_outputs), num_threads, [&](int, size_t i) {
    const int64_t o = static_cast<int64_t>(i) * tile_outputs;
    const int64_t outputs_there = std::min(tile_outputs, args.num_outputs - o);
    thread_local Scratch panel_scratch;
    float* const bias = panel_scratch.floats(tile_outputs * (1 + 2 * block.num_channels));
    float* const panel = bias + tile_outputs;
    if (args.read_weight) {
      float* const read = panel + tile_outputs * block.num_channels;
      args.read_weight(o, outputs_there, block.first_channel, block.num_channels, read);
      kernel.pack(read, block.num_channels, outputs_there, tile_outputs, block.num_channels, panel);
    } else {
      kernel.pack(args.weight + o * args.num_channels + block.first_channel, args.num_channels,
                  outputs_there, tile_outputs, block.num_channels, panel);
    }
    std::fill(bias, bias + tile_outputs, 0.0f);
    if (args.bias != nullptr) std::copy(args.bias + o, args.bias + o + outputs_there, bias);
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t n = tile * tile_rows;
      int64_t c = 0;
      do {
        const int64_t count = std::min(kChannelsOfSum, block.num_channels - c);
        kernel.run(rows + tile * tile_floats + c * tile_rows, panel + c * tile_outputs, count, bias,
                   block.first_channel + c == 0,
                   static_cast<int>(std::min(tile_rows, block.num_rows - n)),
                   static_cast<int>(outputs_there),
                   args.out + (block.first_row + n) * args.num_outputs + o, args.num_outputs);
        c += count;
      } while (c < block.num_channels);
    }
  });
}

// Many rows: both factors are packed into the order in which tiles of the result read them.
void many_rows(const LinearArgs& args, Isa isa, int num_threads) {
  const TileKernel& kernel = tile_kernel("linear", isa);
  const int64_t runs = std::max<int64_t>(1, ceil_div(args.num_channels, kMostChannels));
  const int64_t channels = ceil_div(args.num_channels, runs);
  for (int64_t row = 0; row < args.num_rows; row += kMostRows) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t first = run * channels;
      tiles_of_block(args,
                     {row, std::min(kMostRows, args.num_rows - row), first,
                      std::min(channels, args.num_channels - first)},
                     kernel, num_threads);
    }
  }
}

}  // namespace

void linear(const LinearArgs& args, Isa isa, int num_threads) {
  if (std::max(args.num_rows, args.product_rows) <= kFewRows) {
    few_rows(args, isa, num_threads);
  } else {
    many_rows(args, isa, num_threads);
  }
}

const TileKernel& tile_kernel(const char* what, Isa isa) {
  switch (resolve_isa(what, isa)) {
    case Isa::kAvx512:
      return *avx512_tile_kernel();
    case Isa::kAvx2:
      return *avx2_tile_kernel();
    case Isa::kNeon:
      return *neon_tile_kernel();
    default:
      return scalar_tile_kernel();
  }
}

}  // namespace vtts
