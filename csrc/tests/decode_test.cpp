// The float kernels without Python: what they refuse, and that instruction sets,
// companions and threads do not change what they compute.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/linear.h"
#include "core/paged_attention.h"
#include "core/parallel.h"
#include "core/product_kernels.h"
#include "core/sampling.h"
#include "tests/check.h"
#include "tests/kernels.h"

namespace {

using testing::check;
using testing::isas;
using testing::noise;
using testing::num_failures;
using testing::stored;

// A matrix as it lies in memory, (kOutputs, kChannels) row-major, in panels of 16 outputs: pairs of
// channels side by side where values are of 2 bytes.
template <typename T>
std::vector<T> in_panels(const std::vector<T>& matrix, int64_t num_outputs, int64_t num_channels) {
  constexpr int64_t kTogether = sizeof(T) == 2 ? 2 : 1;
  const int64_t num_panels = (num_outputs + vtts::kPanel - 1) / vtts::kPanel;
  std::vector<T> panels(num_panels * vtts::kPanel * num_channels, T(0));
  for (int64_t o = 0; o < num_outputs; ++o) {
    for (int64_t c = 0; c < num_channels; ++c) {
      const int64_t line = o / vtts::kPanel * num_channels + c / kTogether * kTogether;
      panels[line * vtts::kPanel + o % vtts::kPanel * kTogether + c % kTogether] =
          matrix[o * num_channels + c];
    }
  }
  return panels;
}

// Rows X times weights: exact to rounding, and the same to the bit alone, in any company, on any
// number of threads, packed before and on the way.
template <typename X, typename Weight>
void test_linear(int64_t num_rows, int64_t num_channels, int64_t num_outputs, double rounding,
                 std::mt19937& random) {
  constexpr bool kBytes = sizeof(Weight) == 1;
  const auto values = noise(num_rows * num_channels, random);
  const auto weights = noise(num_outputs * num_channels, random);
  const auto biases = noise(num_outputs, random);
  std::vector<X> x, bias;
  for (const float value : values) x.push_back(X(value));
  for (const float value : biases) bias.push_back(X(value));
  std::vector<Weight> weight;
  for (const float value : weights) weight.push_back(Weight(kBytes ? 30 * value : value));
  const std::vector<Weight> panels = in_panels(weight, num_outputs, num_channels);
  std::vector<float> scale;
  for (int64_t o = 0; o < num_outputs; ++o) scale.push_back(0.01f * static_cast<float>(o % 13 + 1));
  for (const vtts::Isa isa : isas()) {
    vtts::LinearArgs args;
    args.type = sizeof(X) == 2 ? vtts::DType::kBFloat16 : vtts::DType::kFloat32;
    args.x = x.data();
    args.x_stride = num_channels;
    args.weight = {panels.data(),
                   kBytes                ? vtts::Matrix::kInt8
                   : sizeof(Weight) == 2 ? vtts::Matrix::kBFloat16
                                         : vtts::Matrix::kFloat32,
                   true, kBytes ? scale.data() : nullptr, bias.data()};
    args.num_rows = num_rows;
    args.num_channels = num_channels;
    args.num_outputs = num_outputs;
    std::vector<X> together(num_rows * num_outputs), others(num_rows * num_outputs);
    args.out = together.data();
    vtts::linear(args, isa, 3);
    const auto same = [&] {
      return std::memcmp(together.data(), others.data(), together.size() * sizeof(X)) == 0;
    };
    for (const int64_t part : {1, 5}) {
      for (int64_t n = 0; n < num_rows; n += part) {
        args.x = x.data() + n * num_channels;
        args.out = others.data() + n * num_outputs;
        args.num_rows = std::min(part, num_rows - n);
        vtts::linear(args, isa, 1);
      }
      check(same(), "a row is the same in any company");
    }
    if (!kBytes) {
      std::fill(others.begin(), others.end(), X(0));
      args.x = x.data();
      args.out = others.data();
      args.num_rows = num_rows;
      args.weight.values = weight.data();
      args.weight.packed = false;
      vtts::linear(args, isa, 2);
      check(same(), "a plain matrix gives the same as a packed one");
    }
    double worst = 0.0;
    for (int64_t n = 0; n < num_rows; ++n) {
      for (int64_t o = 0; o < num_outputs; ++o) {
        double exact = 0.0;
        for (int64_t c = 0; c < num_channels; ++c) {
          exact += double{x[n * num_channels + c]} * double(weight[o * num_channels + c]);
        }
        exact = exact * (kBytes ? scale[o] : 1.0f) + double{bias[o]};
        const double error = std::abs(double{together[n * num_outputs + o]} - exact);
        worst = std::max(worst, error / (1.0 + std::abs(exact)));
      }
    }
    check(worst < rounding, "products are exact to rounding");
  }
}

void test_linear_refuses() {
  vtts::LinearArgs args;
  const auto refuses = [&](const std::string& part) {
    try {
      vtts::linear(args, vtts::Isa::kAuto, 1);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what()).find(part) != std::string::npos;
    }
    return false;
  };
  args.weight.type = vtts::Matrix::kBFloat16;
  check(refuses("type of x"), "weights of another type are refused");
  args.type = vtts::DType::kBFloat16;
  args.num_channels = 3;
  check(refuses("even"), "an odd number of channels is refused");
  args.type = vtts::DType::kFloat16;
  check(refuses("float16"), "float16 is refused");
  args.type = vtts::DType::kFloat32;
  args.weight.type = vtts::Matrix::kInt8;
  check(refuses("packed"), "plain bytes are refused");
}

void test_attention_refuses() {
  const std::vector<float> zeros(64, 0.0f);
  std::vector<float> out(64);
  const int64_t page = 2, starts[] = {0, 1}, num_keys = 1;
  vtts::PagedAttentionArgs<float> args;
  args.queries = args.keys = args.values = zeros.data();
  args.page_table = &page;
  args.table_stride = 1;
  args.row_starts = starts;
  args.num_keys = &num_keys;
  args.out = out.data();
  args.num_rows = args.num_sequences = args.num_pages = args.page_size = 1;
  args.num_heads = args.num_kv_heads = 1;
  args.head_dim = 8;
  try {
    vtts::paged_attention(args, vtts::Isa::kScalar, 1);
    check(false, "a page outside the pool is refused");
  } catch (const std::invalid_argument& error) {
    check(
        std::string(error.what()) == "paged_attention: page_table must be pages of the pool, got 2",
        error.what());
  }
}

// One sequence of kKeys keys whose pages lie backwards.
template <typename T>
struct AttentionCase {
  static constexpr int64_t kPages = 44, kPageSize = 16, kKeys = kPages * kPageSize - 5;
  static constexpr int kHeads = 6, kKvHeads = 2, kDim = 24;
  static constexpr int64_t kRow = kHeads * kDim, kSlot = kKvHeads * kDim;
  std::vector<T> queries, keys, values;
  std::vector<int64_t> pages;

  explicit AttentionCase(std::mt19937& random)
      : queries(stored<T>(noise(kKeys * kRow, random))),
        keys(stored<T>(noise(kPages * kPageSize * kSlot, random))),
        values(stored<T>(noise(kPages * kPageSize * kSlot, random))) {
    for (int64_t p = 0; p < kPages; ++p) pages.push_back(kPages - 1 - p);
  }

  // Rows from `first` to `end` of the sequence, as far as its keys are there then, to `out`.
  void run(int64_t first, int64_t end, vtts::Isa isa, int num_threads, T* out) const {
    const int64_t starts[] = {0, end - first};
    vtts::PagedAttentionArgs<T> args;
    args.queries = queries.data() + first * kRow;
    args.query_stride = kRow;
    args.keys = keys.data();
    args.values = values.data();
    args.page_table = pages.data();
    args.table_stride = args.num_pages = kPages;
    args.row_starts = starts;
    args.num_keys = &end;
    args.out = out + first * kRow;
    args.num_rows = end - first;
    args.num_sequences = 1;
    args.page_size = kPageSize;
    args.num_heads = kHeads;
    args.num_kv_heads = kKvHeads;
    args.head_dim = kDim;
    args.scale = 0.2f;
    vtts::paged_attention(args, isa, num_threads);
  }

  double exact(int64_t i, int d) const {
    const int64_t head = i % kHeads / 3 * kDim;
    double sum = 0.0, weighted = 0.0;
    for (int64_t j = 0; j <= i / kHeads; ++j) {
      const int64_t at = (pages[j / kPageSize] * kPageSize + j % kPageSize) * kSlot + head;
      double score = 0.0;
      for (int c = 0; c < kDim; ++c) score += double{queries[i * kDim + c]} * double{keys[at + c]};
      const double weight = std::exp(0.2 * score);
      sum += weight;
      weighted += weight * double{values[at + d]};
    }
    return weighted / sum;
  }
};

// A prompt at once, row by row, in parts of any size and on any number of threads: the same bits.
template <typename T>
void test_attention(std::mt19937& random) {
  const AttentionCase<T> prompt(random);
  constexpr int64_t kKeys = prompt.kKeys, kRow = prompt.kRow;
  for (const vtts::Isa isa : isas()) {
    const std::string name = vtts::isa_name(isa);
    std::vector<T> whole(kKeys * kRow, T(NAN)), other = whole;
    prompt.run(0, kKeys, isa, 3, whole.data());
    const auto same = [&](const char* what) {
      const bool is = std::memcmp(whole.data(), other.data(), sizeof(T) * whole.size()) == 0;
      check(is, what + name);
      std::fill(other.begin(), other.end(), T(NAN));
    };
    for (int64_t n = 0; n < kKeys; ++n) prompt.run(n, n + 1, isa, 2, other.data());
    same("attention row by row, ");
    for (int64_t n = 0; n < kKeys;) {
      const int64_t end = std::min<int64_t>(kKeys, n + 1 + random() % 200);
      prompt.run(n, end, isa, 1, other.data());
      n = end;
    }
    same("attention in parts, ");
    double worst = 0.0;
    for (int64_t i = 0; i < kKeys * prompt.kHeads; i += 7) {
      const double exact = prompt.exact(i, i % prompt.kDim);
      const double error = std::abs(double{whole[i * prompt.kDim + i % prompt.kDim]} - exact);
      worst = std::max(worst, error / (1.0 + std::abs(exact)));
    }
    check(worst < (sizeof(T) == sizeof(float) ? 1e-6 : 0x1p-8), "attention is exact to rounding");
  }
}

void test_sample(std::mt19937& random) {
  constexpr int64_t kRows = 5, kLogits = 5003;
  std::vector<float> logits = noise(kRows * kLogits, random), logprobs(kRows);
  logits[4711] = logits[4712] = 9.0f;
  logits[4 * kLogits + 17] = NAN;
  double sum = 0.0;
  for (int i = 0; i < kLogits; ++i) sum += std::exp(double{logits[i]} - 9.0);
  const std::vector<float> temperature = {0.0f, 1.0f, 0.5f, 0.5f, 1.0f};
  const std::vector<double> top_p = {1.0, 1.0, 0.5, 0.9, 1.0};
  const std::vector<int64_t> top_k = {0, 0, 0, 1, 0}, places(4 * kRows, 7);
  std::vector<int64_t> tokens(kRows), expected;
  const vtts::SampleArgs<float> args = {
      logits.data(), kRows,        kLogits,       kLogits,       temperature.data(),
      top_k.data(),  top_p.data(), places.data(), tokens.data(), logprobs.data()};
  for (const vtts::Isa isa : isas()) {
    for (const int num_threads : {1, 3}) {
      vtts::sample(args, isa, num_threads);
      if (expected.empty()) expected = tokens;
      check(tokens == expected, "a choice depends on instructions or threads");
      check(std::abs(logprobs[0] + std::log(sum)) < 1e-6, "log-probability of the maximum");
    }
  }
  check(tokens[0] == 4711, "the first maximum is chosen");
  check(tokens[4] == -1, "a NaN is not hidden");
  const auto row = logits.begin() + 3 * kLogits;
  check(row + tokens[3] == std::max_element(row, row + kLogits), "the only one of a top-k of 1");
}

// Calls of many sizes in a row, calls within calls, and an exception in between: each task runs
// exactly once, whatever the threads that are kept were doing.
void test_threads_that_are_kept() {
  for (int round = 0; round < 2000; ++round) {
    const size_t num_tasks = round % 7;
    std::vector<std::atomic<int>> runs(num_tasks);
    vtts::parallel_for(num_tasks, 1 + round % 4, [&](int worker, size_t i) {
      check(worker >= 0 && worker < 1 + round % 4, "workers are numbered");
      if (round % 10 == 0) {
        vtts::parallel_for(2, 2, [&](int, size_t) { ++runs[i]; });
      } else {
        runs[i] += 2;
      }
    });
    for (const auto& count : runs) check(count == 2, "every task runs once");
    if (round % 100 == 0) {
      try {
        vtts::parallel_for(5, 3, [](int, size_t i) {
          if (i == 3) throw std::runtime_error("task 3");
        });
        check(false, "an exception comes through");
      } catch (const std::runtime_error&) {
      }
    }
  }
}

}  // namespace

int main() {
#if defined(VTTS_EMULATED)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::printf("skipped: the emulation stands on AVX2\n");
    return 0;
  }
#endif
  std::mt19937 random(0);
  for (const int64_t rows : {1, 7, 61}) {
    test_linear<float, float>(rows, 203, 149, 1e-4, random);
    test_linear<float, int8_t>(rows, 203, 149, 1e-4, random);
    test_linear<vtts::BFloat16, vtts::BFloat16>(rows, 302, 149, 1.0 / 256, random);
    test_linear<vtts::BFloat16, int8_t>(rows, 203, 149, 1.0 / 256, random);
  }
  test_linear<float, float>(3, 0, 5, 1e-6, random);
  test_linear_refuses();
  test_attention_refuses();
  test_attention<float>(random);
  test_attention<vtts::BFloat16>(random);
  test_sample(random);
  test_threads_that_are_kept();
  std::printf("%s (best: %s)\n", num_failures == 0 ? "all passed" : "failed",
              vtts::isa_name(vtts::resolve_isa("test", vtts::Isa::kAuto)));
  return num_failures == 0 ? 0 : 1;
}
