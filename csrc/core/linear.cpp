#include "core/linear.h"

#include <algorithm>
#include <stdexcept>

#include "core/parallel.h"
#include "core/product_kernels.h"
#include "core/scratch.h"

namespace vtts {
namespace {

// Panels of a task that are multiplied at once, at most: as many as one row takes.
constexpr int kMaxPanels = 4;
// Values of the rows of a task: they stay in the second-level cache while its panels pass.
constexpr int64_t kRowValues = 160 << 10;
// Least products and weights of a task: some 10 us of arithmetic or of reading, long against
// claiming it.
constexpr int64_t kTaskProducts = 400 << 10, kTaskWeights = 32 << 10;

// How rows and panels are cut into tasks.
struct Tasks {
  int64_t num_blocks, num_ranges, panels_of_range;
};

Tasks tasks_of(const LinearArgs& args, int tile_rows) {
  const int64_t channels = std::max<int64_t>(1, args.num_channels);
  const int64_t most = std::max<int64_t>(4 * tile_rows, kRowValues / channels);
  const int64_t blocks = ceil_div(args.num_rows, most), rows = ceil_div(args.num_rows, blocks);
  const int64_t least =
      std::max(kTaskProducts / (rows * channels * kPanel), kTaskWeights / (channels * kPanel));
  const int64_t panels = ceil_div(least + 1, kMaxPanels) * kMaxPanels;
  return {blocks, ceil_div(ceil_div(args.num_outputs, kPanel), panels), panels};
}

// Rows times panels whose values are Weight, sums of runs of channels and what ends them.
template <typename X, typename Weight, typename Out>
void run(const LinearArgs& args, const X* x, int64_t x_stride, Multiply<X, Weight> multiply,
         Finish<Out> finish, const ProductKernels& kernels, int num_threads) {
  const int64_t channels = args.num_channels, panel_values = channels * kPanel;
  const Tasks tasks = tasks_of(args, kernels.tile_rows);
  const auto* weight = static_cast<const Weight*>(args.weight.values);
  const auto* bias = static_cast<const Out*>(args.weight.bias);
  parallel_for(tasks.num_blocks * tasks.num_ranges, num_threads, [&](int, size_t i) {
    const int64_t block = static_cast<int64_t>(i) / tasks.num_ranges;
    const int64_t range = static_cast<int64_t>(i) % tasks.num_ranges;
    const int64_t first = block * args.num_rows / tasks.num_blocks;
    const int64_t rows = (block + 1) * args.num_rows / tasks.num_blocks - first;
    const int64_t begin = range * tasks.panels_of_range * kPanel;
    const int64_t end = std::min(args.num_outputs, begin + tasks.panels_of_range * kPanel);
    thread_local Scratch scratch;
    const bool packs = !args.weight.packed;
    float* const sums =
        scratch.floats(rows * kMaxPanels * kPanel + (packs ? kMaxPanels * panel_values : 0));
    float* const made = sums + rows * kMaxPanels * kPanel;
    for (int64_t o = begin; o < end; o += kMaxPanels * kPanel) {
      const int outputs = static_cast<int>(std::min<int64_t>(end - o, kMaxPanels * kPanel));
      const int panels = (outputs + kPanel - 1) / kPanel;
      const Weight* from = weight + o * channels;
      if (packs) {
        // Pairs of bfloat16 are moved as one value.
        const int64_t words = channels * sizeof(Weight) / sizeof(float);
        for (int p = 0; p < panels; ++p) {
          kernels.pack(reinterpret_cast<const float*>(from) + p * kPanel * words, words,
                       std::min(kPanel, outputs - p * kPanel), words, made + p * kPanel * words);
        }
        from = reinterpret_cast<const Weight*>(made);
      }
      int64_t c = 0;
      do {
        multiply(x + first * x_stride + c, x_stride, rows, from + c * kPanel, panel_values, panels,
                 std::min(kRun, channels - c), sums, kMaxPanels * kPanel, c > 0);
        c += kRun;
      } while (c < channels);
      finish(sums, kMaxPanels * kPanel, rows,
             args.weight.scale == nullptr ? nullptr : args.weight.scale + o,
             bias == nullptr ? nullptr : bias + o, outputs,
             static_cast<Out*>(args.out) + first * args.num_outputs + o, args.num_outputs);
    }
  });
}

// Rows of BFloat16 as float32, packed.
const float* widened(const LinearArgs& args, const ProductKernels& kernels, int num_threads) {
  thread_local Scratch scratch;
  float* const rows = scratch.floats(args.num_rows * args.num_channels);
  const int64_t at_once =
      std::max<int64_t>(1, kTaskWeights / std::max<int64_t>(1, args.num_channels));
  parallel_for(ceil_div(args.num_rows, at_once), num_threads, [&](int, size_t i) {
    const int64_t first = static_cast<int64_t>(i) * at_once;
    for (int64_t n = first; n < std::min(args.num_rows, first + at_once); ++n) {
      kernels.widen(static_cast<const BFloat16*>(args.x) + n * args.x_stride, args.num_channels,
                    rows + n * args.num_channels);
    }
  });
  return rows;
}

}  // namespace

void linear(const LinearArgs& args, Isa isa, int num_threads) {
  const ProductKernels& kernels = product_kernels("linear", isa);
  const bool narrow = args.type == DType::kBFloat16;
  const Matrix& weight = args.weight;
  const auto require = [](bool ok, const char* rule) {
    if (!ok) throw std::invalid_argument(std::string("linear: ") + rule);
  };
  require(args.type != DType::kFloat16, "x must be float32 or bfloat16, got float16");
  const auto of_rows = narrow ? Matrix::kBFloat16 : Matrix::kFloat32;
  require(weight.type == of_rows || weight.type == Matrix::kInt8,
          "weight must be of the type of x or int8, got another");
  require(weight.packed || weight.type != Matrix::kInt8,
          "weight must be packed if it is int8, got a plain one");
  require(weight.type != Matrix::kBFloat16 || args.num_channels % 2 == 0,
          "num_channels must be even in bfloat16, got an odd number");
  if (args.num_rows == 0 || args.num_outputs == 0) return;
  if (!narrow) {
    const auto* x = static_cast<const float*>(args.x);
    if (weight.type == Matrix::kInt8) {
      run(args, x, args.x_stride, kernels.multiply_int8, kernels.finish, kernels, num_threads);
    } else {
      run(args, x, args.x_stride, kernels.multiply, kernels.finish, kernels, num_threads);
    }
  } else if (weight.type == Matrix::kBFloat16 && kernels.multiply_pairs != nullptr) {
    run(args, static_cast<const BFloat16*>(args.x), args.x_stride, kernels.multiply_pairs,
        kernels.finish_bf16, kernels, num_threads);
  } else {
    const float* x = widened(args, kernels, num_threads);
    if (weight.type == Matrix::kInt8) {
      run(args, x, args.num_channels, kernels.multiply_int8, kernels.finish_bf16, kernels,
          num_threads);
    } else {
      run(args, x, args.num_channels, kernels.multiply_widened, kernels.finish_bf16, kernels,
          num_threads);
    }
  }
}

const ProductKernels& product_kernels(const char* what, Isa isa) {
  switch (resolve_isa(what, isa)) {
    case Isa::kAmx:
      return *amx_product_kernels();
    case Isa::kAvx512Bf16:
      return *avx512_bf16_product_kernels();
    case Isa::kAvx512:
      return *avx512_product_kernels();
    case Isa::kAvx2:
      return *avx2_product_kernels();
    case Isa::kNeon:
      return *neon_product_kernels();
    default:
      return scalar_product_kernels();
  }
}

}  // namespace vtts
